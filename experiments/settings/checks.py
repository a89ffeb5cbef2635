"""Checks a configuration and makes it typed: no unknown key, wrong type or bad value passes."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import config_dict

from experiments.settings import method_names
from experiments.settings.config import (
    DIAGNOSTICS,
    NORMS,
    AttackLoss,
    Border,
    Config,
    GradientPoint,
    Init,
    Measure,
    MeshConfig,
    OptimizerName,
    Precision,
    RegularizerConfig,
    Rounding,
    Schedule,
)
from experiments.settings.errors import ExperimentError

_REGULARIZERS = dataclasses.fields(RegularizerConfig)


def from_config_dict(source: config_dict.ConfigDict | Mapping[str, Any]) -> Config:
    """Converts and validates a configuration; missing keys take their defaults.

    Old spellings of method names are accepted.

    Raises:
      ExperimentError: for an unknown key, a value of the wrong type, or a value out of range.
    """
    if isinstance(source, config_dict.ConfigDict):
        source = source.to_dict()
    config = _convert(Config, method_names.updated(source), prefix="")
    _validate(config)
    return config


def _convert(target: type, source: Any, prefix: str) -> Any:
    if not isinstance(source, Mapping):
        name = prefix.rstrip(".")
        raise ExperimentError(
            f"config.{name}: expected a group of settings, got {source!r}; set config.{name}.<key>"
        )
    hints = typing.get_type_hints(target)
    for key in source:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            advice = f"use one of {', '.join(hints)}"
            if close:
                advice = f"did you mean {prefix}{close[0]}?"
            raise ExperimentError(f"unknown config key {prefix}{key}: {advice}")
    values = {}
    for key, value in source.items():
        hint = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[key] = _convert(hint, value, f"{prefix}{key}.")
        else:
            values[key] = _typed(value, hint, f"config.{prefix}{key}")
    return target(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
    if typing.get_origin(hint) is Literal:
        hint = str  # `_validate` compares the names
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ExperimentError(f"{name}: expected a tuple like (1, 2), got {value!r}")
        items = typing.get_args(hint)
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise ExperimentError(f"{name}: expected {len(items)} values, got {tuple(value)!r}")
        return tuple(_typed(item, items[0], name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ExperimentError(
            f"{name}: expected {hint.__name__}, got {value!r} ({type(value).__name__})"
        )
    return value


def _validate(config: Config) -> None:
    def require(condition: bool, key: str, expectation: str) -> None:
        if not condition:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            raise ExperimentError(f"config.{key} must be {expectation}, got {value!r}")

    def at_least(bound: float, *keys: str) -> None:
        for key in keys:
            group, _, name = key.rpartition(".")
            value = getattr(getattr(config, group) if group else config, name)
            require(bound <= value < math.inf, key, f">= {bound}")

    def one_of(key: str, names: tuple[str, ...]) -> None:
        group, name = key.split(".")
        listed = ", ".join(map(repr, names[:-1]))
        require(getattr(getattr(config, group), name) in names, key, f"{listed} or {names[-1]!r}")

    def fraction(*keys: str) -> None:
        for key in keys:
            group, name = key.split(".")
            require(0 <= getattr(getattr(config, group), name) <= 1, key, "in [0, 1]")

    robust = config.robust
    at_least(1, "seeds", "train.epochs", "train.batch_size", "relaxation.steps")
    at_least(1, "adversary.restarts", "evaluation.every", "evaluation.batch_size")
    at_least(1, "evaluation.pgd_restarts", "checkpoint.every", "train.diagnostics_every")
    at_least(1, "evaluation.draws")
    at_least(2, "diversity.draws")
    at_least(0, "data.train", "data.validation", "augment.crop")
    at_least(0, "evaluation.pgd_steps", "evaluation.images")
    at_least(0, "random.prior_std", "random.initial_std", "random.kl", "diversity.weight")
    require(0 <= config.seed < 2**31, "seed", "in [0, 2**31)")
    require(all(std > 0 for std in config.model.std), "model.std", "positive")
    one_of("train.precision", typing.get_args(Precision))
    require(
        all(name in DIAGNOSTICS for name in config.train.diagnostics),
        "train.diagnostics",
        f"some of {', '.join(DIAGNOSTICS)}",
    )
    one_of("model.init", typing.get_args(Init))
    require(
        len(config.random.noise) in (0, 2) and all(0 <= s < math.inf for s in config.random.noise),
        "random.noise",
        "() or two standard deviations >= 0, before the first convolution and all others",
    )
    one_of("diversity.measure", typing.get_args(Measure))
    one_of("diversity.at", typing.get_args(GradientPoint))
    one_of("augment.border", typing.get_args(Border))
    one_of("optim.name", typing.get_args(OptimizerName))
    require(0 < config.optim.lr < math.inf, "optim.lr", "positive")
    require(0 < config.optim.factor <= 1, "optim.factor", "in (0, 1]")
    require(
        all(0 <= m < config.train.epochs for m in config.optim.milestones),
        "optim.milestones",
        f"epochs in [0, train.epochs), {config.train.epochs}",
    )
    at_least(0, "optim.clip_norm", "optim.momentum", "optim.weight_decay")
    one_of("robust.norm", tuple(NORMS))
    one_of("robust.schedule", typing.get_args(Schedule))
    at_least(0, "robust.eps_train", "robust.eps_test", "robust.eps_start")
    at_least(0, "robust.warmup_epochs", "robust.ramp_epochs")
    if robust.norm == "inf":
        for key in ("robust.eps_train", "robust.eps_test"):
            eps = getattr(robust, key.split(".")[1])
            require(eps < 1, key, f"in pixels of [0, 1], e.g. {eps:g}/255 = {eps / 255:.6f}")
    require(robust.eps_start <= robust.eps_train, "robust.eps_start", "<= robust.eps_train")
    require(
        robust.eps_start == 0 or robust.schedule == "stairs",
        "robust.eps_start",
        "0 unless robust.schedule='stairs'",
    )
    require(
        robust.warmup_epochs + robust.ramp_epochs <= config.train.epochs,
        "robust.ramp_epochs",
        f"at most train.epochs - robust.warmup_epochs = "
        f"{config.train.epochs - robust.warmup_epochs:g}, or the radius never reaches eps_train",
    )
    require(all(0 <= k <= 1 for k in robust.kappa), "robust.kappa", "two weights in [0, 1]")
    require(all(0 <= b <= 1 for b in robust.beta), "robust.beta", "two weights in [0, 1]")
    at_least(0, "relaxation.projections", "relaxation.step_size")
    fraction("relaxation.p", "relaxation.q", "adversary.alpha", "adversary.box")
    at_least(0, "adversary.steps", "adversary.step_size", "adversary.scale", "adversary.split")
    at_least(0, "adversary.taps_scale", *(f"regularizers.{f.name}" for f in _REGULARIZERS))
    require(config.regularizers.tau > 0, "regularizers.tau", "positive")
    require(len(config.evaluation.methods) > 0, "evaluation.methods", "at least one method")
    require(
        len(config.evaluation.attack_draws) > 0
        and all(number >= 1 for number in config.evaluation.attack_draws),
        "evaluation.attack_draws",
        "numbers of draws >= 1, at least one",
    )
    require(all(0 <= eps < math.inf for eps in config.evaluation.radii), "evaluation.radii", ">= 0")
    one_of("evaluation.pgd_loss", typing.get_args(AttackLoss))
    one_of("evaluation.rounding", typing.get_args(Rounding))
    require(0 < config.evaluation.timeout < math.inf, "evaluation.timeout", "positive, in seconds")
    axes = [f.name for f in dataclasses.fields(MeshConfig)]
    for axis in axes:
        size = getattr(config.mesh, axis)
        require(size == -1 or size >= 1, f"mesh.{axis}", ">= 1, or -1 for the remaining devices")
    remaining = [axis for axis in axes if getattr(config.mesh, axis) == -1]
    if len(remaining) > 1:
        raise ExperimentError(
            f"config.mesh: at most one axis can be -1, got {' and '.join(remaining)}"
        )

"""The typed configuration of a run. ml-collections stops here: all else sees these dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ml_collections import config_dict

from experiments.errors import ExperimentError


class Norm(NamedTuple):
    """A norm of the configuration: its order p, and how it is printed."""

    order: float
    label: str


NORMS = {"inf": Norm(math.inf, "l-inf"), "2": Norm(2.0, "l2")}


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    `dir` is a folder with the files of the data set; `tfds_dir` is where TFDS keeps its data
    (empty: its default).
    """

    name: str = "digits"
    dir: str = ""
    tfds_dir: str = ""
    validation: int = 0  # the last training images, held out for selection; 0 trains on all


@dataclass(frozen=True)
class ModelConfig:
    """A name of `experiments.models`, and the normalisation of its first layer (empty: none).

    `init` is how k x k convolutions start: `"fan_in"`, uniform in `+-1/sqrt(k^2 in)`, or
    `"fan_out"`, normal with variance `2 / (k^2 out)`.
    """

    name: str = "tiny"
    init: str = "fan_in"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """How long, in batches of how many images (over all devices), and how these are varied.

    `augment` is `"none"` or `"flip_crop"`: mirrored at random, and moved by up to 4 pixels.
    """

    epochs: int = 1
    batch_size: int = 128
    augment: str = "none"


@dataclass(frozen=True)
class OptimConfig:
    """Adam; the learning rate is multiplied by `factor` at each of `milestones` (epochs)."""

    lr: float = 5e-4
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    clip_norm: float = 0.0  # global gradient norm; 0: not clipped


@dataclass(frozen=True)
class RobustConfig:
    """The training method and its schedules.

    Radii are in pixels of `[0, 1]`, in the norm `norm`: `"inf"` or `"2"` (a name, because JSON has
    no infinity). Everything is in that norm: training, certificates and attacks.
    """

    method: str = "crown_ibp"
    norm: str = "inf"
    eps_train: float = 0.1
    eps_test: float = 0.1
    schedule: str = "linear"
    warmup_epochs: float = 0.0  # natural training at radius 0
    ramp_epochs: float = 1.0  # radius 0 -> eps_train
    kappa: tuple[float, float] = (
        1.0,
        0.0,
    )  # weight of the natural loss at radius 0 and at eps_train
    beta: tuple[float, float] = (1.0, 0.0)  # weight of the linear bounds, likewise
    clip: bool = True  # intersect the ball with the pixel range [0, 1]

    @property
    def order(self) -> float:
        """The order p of the norm, 2 or infinity."""
        return NORMS[self.norm].order

    @property
    def norm_label(self) -> str:
        """How the norm is printed: `l2` or `l-inf`."""
        return NORMS[self.norm].label


@dataclass(frozen=True)
class EvaluationConfig:
    """How errors are measured.

    `methods` are those of `boundjax.certify`; their union is reported as well.
    """

    methods: tuple[str, ...] = ("interval", "crown-ibp")
    selection_method: str = "interval"
    every: int = 1  # epochs between evaluations on the validation images
    batch_size: int = 500
    pgd_steps: int = 40
    pgd_restarts: int = 2
    pgd_loss: str = "margin"


@dataclass(frozen=True)
class CheckpointConfig:
    """Every how many steps the state is written."""

    every: int = 500


@dataclass(frozen=True)
class Config:
    """A run. On one machine, two runs of one configuration end bit-identically."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of what JSON can hold."""
        return _jsonable(dataclasses.asdict(self))


def to_config_dict(config: Config) -> config_dict.ConfigDict:
    """The same configuration as an editable ConfigDict, for config files and command-line flags."""
    return config_dict.ConfigDict(dataclasses.asdict(config))


def from_config_dict(source: Mapping[str, Any]) -> Config:
    """Converts and validates; keys that are left out take their defaults.

    Raises:
      ExperimentError: for an unknown key, a value of the wrong type, or a value out of range.
    """
    if isinstance(source, config_dict.ConfigDict):
        source = source.to_dict()
    config = _convert(Config, source, prefix="")
    _validate(config)
    return config


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, the keys that are newer than it at their defaults.

    The default of a new key is what the code did before there was the key. Nothing else is changed:
    unknown keys and bad values stay as they are.
    """
    return _filled(stored, Config().to_dict())


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys on which two nested dictionaries differ, sorted."""
    names = []
    for key in sorted(set(one) | set(other)):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key}")
    return names


def _filled(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **stored}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, tuple) else value


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
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ExperimentError(f"unknown config key {prefix}{key}: {hint}")
    values = {}
    for key, value in source.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _convert(hint, value, f"{prefix}{key}.")
        else:
            values[key] = _typed(value, hint, f"config.{prefix}{key}")
    return target(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
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
    def need(condition: bool, key: str, expectation: str) -> None:
        if not condition:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            raise ExperimentError(f"config.{key} must be {expectation}, got {value!r}")

    robust, train, evaluation = config.robust, config.train, config.evaluation
    need(0 <= config.seed < 2**31, "seed", "in [0, 2**31)")
    need(config.data.validation >= 0, "data.validation", ">= 0")
    need(all(std > 0 for std in config.model.std), "model.std", "positive")
    need(config.model.init in ("fan_in", "fan_out"), "model.init", "'fan_in' or 'fan_out'")
    need(train.epochs >= 1, "train.epochs", ">= 1")
    need(train.batch_size >= 1, "train.batch_size", ">= 1")
    need(train.augment in ("none", "flip_crop"), "train.augment", "'none' or 'flip_crop'")
    need(0 < config.optim.lr < math.inf, "optim.lr", "positive")
    need(0 < config.optim.factor <= 1, "optim.factor", "in (0, 1]")
    need(all(m >= 0 for m in config.optim.milestones), "optim.milestones", "epochs >= 0")
    need(0 <= config.optim.clip_norm < math.inf, "optim.clip_norm", ">= 0 (0: not clipped)")
    need(robust.norm in NORMS, "robust.norm", "'inf' or '2'")
    need(0 <= robust.eps_train < math.inf, "robust.eps_train", ">= 0")
    need(0 <= robust.eps_test < math.inf, "robust.eps_test", ">= 0")
    need(robust.schedule in ("linear", "smoothed"), "robust.schedule", "'linear' or 'smoothed'")
    need(0 <= robust.warmup_epochs < math.inf, "robust.warmup_epochs", ">= 0")
    need(0 <= robust.ramp_epochs < math.inf, "robust.ramp_epochs", ">= 0")
    need(all(0 <= k <= 1 for k in robust.kappa), "robust.kappa", "two weights in [0, 1]")
    need(all(0 <= b <= 1 for b in robust.beta), "robust.beta", "two weights in [0, 1]")
    need(len(evaluation.methods) > 0, "evaluation.methods", "at least one method")
    need(evaluation.every >= 1, "evaluation.every", ">= 1")
    need(evaluation.batch_size >= 1, "evaluation.batch_size", ">= 1")
    need(evaluation.pgd_steps >= 0, "evaluation.pgd_steps", ">= 0")
    need(evaluation.pgd_restarts >= 1, "evaluation.pgd_restarts", ">= 1")
    need(
        evaluation.pgd_loss in ("margin", "cross_entropy"),
        "evaluation.pgd_loss",
        "'margin' or 'cross_entropy'",
    )
    need(config.checkpoint.every >= 1, "checkpoint.every", ">= 1")

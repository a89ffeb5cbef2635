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

    `init` is how weights start: `"fan_in"`, uniform in `+-1/sqrt(fan_in)`; `"fan_out"`, the same
    but k x k convolutions normal with variance `2 / (k^2 out)`; `"ibp"`, normal with standard
    deviation `sqrt(2 pi) / fan_in` but for the last layer (Shi et al. 2021).
    """

    name: str = "tiny"
    init: str = "fan_in"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """How long, in batches of how many images (over all devices).

    `precision` is that of the products in a step on an accelerator (`boundjax.training_precision`);
    what is certified is computed at the highest in any case.
    """

    epochs: int = 1
    batch_size: int = 128
    precision: str = "highest"


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied at random; by default they are not.

    `flip` mirrors them, `crop` moves them by up to so many pixels, over a border of `"zeros"` or of
    the `"edge"` pixels.
    """

    flip: bool = False
    crop: int = 0
    border: str = "zeros"


@dataclass(frozen=True)
class OptimConfig:
    """`"adam"` or `"sgd"`; the learning rate times `factor` at each of `milestones` (epochs).

    `momentum` is of SGD. `weight_decay` adds so many times the parameters to their gradient.
    """

    name: str = "adam"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    clip_norm: float = 0.0  # global gradient norm; 0: not clipped


@dataclass(frozen=True)
class RobustConfig:
    """The training method and its schedules.

    Radii are in pixels of `[0, 1]`, in the norm `norm`: `"inf"` or `"2"` (a name, because JSON has
    no infinity). Everything is in that norm: training, certificates and attacks.

    `schedule` is `"linear"`, `"smoothed"` (Shi et al. 2021) or `"stairs"`: constant in every epoch,
    from `eps_start` (Wong & Kolter 2018).
    """

    method: str = "crown_ibp"
    norm: str = "inf"
    eps_train: float = 0.1
    eps_test: float = 0.1
    eps_start: float = 0.0
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
class RelaxationConfig:
    """The linear bounds of the methods that train on them.

    `fused` is CROWN-IBP with one row per image instead of one per class. `steps` signed-gradient
    steps of `step_size` optimise the slopes of `one_step`; `p` and `q` are the probabilities of
    `pq_slopes` (`boundjax.slopes.random`). `projections` random rows estimate the norms of `cap`
    (0: they are exact).
    """

    fused: bool = False
    steps: int = 1
    step_size: float = 2.0
    p: float = 0.0
    q: float = 1.0
    projections: int = 0


@dataclass(frozen=True)
class AdversaryConfig:
    """The methods that train on attacked images: PGD, SABR, TAPS and the expressive losses.

    The attack takes `steps` steps of `step_size` times its radius, which is `scale` times the
    radius of the schedule, from `restarts` random points. `alpha` is the weight of the interval
    bounds in `mtl_ibp`, `cc_ibp` and `exp_ibp`; `box` the radius of SABR's and STAPS' boxes as a
    part of the schedule's; `split` the number of layers in the first block of TAPS, and
    `taps_scale` the weight of its gradient through the attack.
    """

    steps: int = 8
    step_size: float = 0.25
    restarts: int = 1
    scale: float = 1.0
    alpha: float = 0.5
    box: float = 0.1
    split: int = 0
    taps_scale: float = 4.0


@dataclass(frozen=True)
class RegularizerConfig:
    """Weights of terms that are added to the loss (`boundjax.training`); 0 leaves one out.

    `tightness` and `relu_balance` fall with the radius, to 0 at `eps_train` (Shi et al. 2021, with
    the tolerance `tau`). `gap` and `slack`, d and r of the tightness regularizers (REG), rise with
    it. `relu_stability` (Xiao et al. 2019) and `l1`, of the kernels, are constant.
    """

    tightness: float = 0.0
    relu_balance: float = 0.0
    tau: float = 0.5
    gap: float = 0.0
    slack: float = 0.0
    relu_stability: float = 0.0
    l1: float = 0.0


@dataclass(frozen=True)
class EvaluationConfig:
    """How errors are measured.

    `methods` are those of `boundjax.certify`; their union is reported as well. `precise_bn` takes
    the statistics of batch normalisation anew from all training images before every evaluation.
    """

    methods: tuple[str, ...] = ("interval", "crown-ibp")
    selection_method: str = "interval"
    every: int = 1  # epochs between evaluations on the validation images
    batch_size: int = 500
    pgd_steps: int = 40
    pgd_restarts: int = 2
    pgd_loss: str = "margin"
    precise_bn: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """Every how many steps the state is written."""

    every: int = 500


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes divide the work; -1 of one axis: what the others leave.

    `data` divides the batch, `fsdp` divides it too, and the parameters and the optimizer's state
    with it; `spec` divides the rows of the specification (classes) of linear bounds.
    """

    data: int = -1
    fsdp: int = 1
    spec: int = 1


@dataclass(frozen=True)
class Config:
    """A run. On one machine, two runs of one configuration end bit-identically.

    With `seeds` above 1 it is a run for each of `seed`, `seed + 1`, ..., and their mean.
    """

    seed: int = 0
    seeds: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    relaxation: RelaxationConfig = field(default_factory=RelaxationConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    regularizers: RegularizerConfig = field(default_factory=RegularizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

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

    def at_least(bound: float, *keys: str) -> None:
        for key in keys:
            group, _, name = key.rpartition(".")
            value = getattr(getattr(config, group) if group else config, name)
            need(bound <= value < math.inf, key, f">= {bound}")

    def among(key: str, *names: str) -> None:
        group, name = key.split(".")
        listed = ", ".join(map(repr, names[:-1]))
        need(getattr(getattr(config, group), name) in names, key, f"{listed} or {names[-1]!r}")

    def fraction(*keys: str) -> None:
        for key in keys:
            group, name = key.split(".")
            need(0 <= getattr(getattr(config, group), name) <= 1, key, "in [0, 1]")

    robust = config.robust
    at_least(1, "seeds", "train.epochs", "train.batch_size", "relaxation.steps")
    at_least(1, "adversary.restarts", "evaluation.every", "evaluation.batch_size")
    at_least(1, "evaluation.pgd_restarts", "checkpoint.every")
    at_least(0, "data.validation", "augment.crop", "evaluation.pgd_steps")
    need(0 <= config.seed < 2**31, "seed", "in [0, 2**31)")
    need(all(std > 0 for std in config.model.std), "model.std", "positive")
    among("train.precision", "highest", "high", "default")
    among("model.init", "fan_in", "fan_out", "ibp")
    among("augment.border", "zeros", "edge")
    among("optim.name", "adam", "sgd")
    need(0 < config.optim.lr < math.inf, "optim.lr", "positive")
    need(0 < config.optim.factor <= 1, "optim.factor", "in (0, 1]")
    need(
        all(0 <= m < config.train.epochs for m in config.optim.milestones),
        "optim.milestones",
        f"epochs in [0, train.epochs), {config.train.epochs}",
    )
    at_least(0, "optim.clip_norm", "optim.momentum", "optim.weight_decay")
    among("robust.norm", *NORMS)
    among("robust.schedule", "linear", "smoothed", "stairs")
    at_least(0, "robust.eps_train", "robust.eps_test", "robust.eps_start")
    at_least(0, "robust.warmup_epochs", "robust.ramp_epochs")
    if robust.norm == "inf":
        for key in ("robust.eps_train", "robust.eps_test"):
            eps = getattr(robust, key.split(".")[1])
            need(eps < 1, key, f"in pixels of [0, 1], e.g. {eps:g}/255 = {eps / 255:.6f}")
    need(robust.eps_start <= robust.eps_train, "robust.eps_start", "<= robust.eps_train")
    need(
        robust.eps_start == 0 or robust.schedule == "stairs",
        "robust.eps_start",
        "0 unless robust.schedule='stairs'",
    )
    need(
        robust.warmup_epochs + robust.ramp_epochs <= config.train.epochs,
        "robust.ramp_epochs",
        f"at most train.epochs - robust.warmup_epochs = "
        f"{config.train.epochs - robust.warmup_epochs:g}, or the radius never reaches eps_train",
    )
    need(all(0 <= k <= 1 for k in robust.kappa), "robust.kappa", "two weights in [0, 1]")
    need(all(0 <= b <= 1 for b in robust.beta), "robust.beta", "two weights in [0, 1]")
    at_least(0, "relaxation.projections", "relaxation.step_size")
    fraction("relaxation.p", "relaxation.q", "adversary.alpha", "adversary.box")
    at_least(0, "adversary.steps", "adversary.step_size", "adversary.scale", "adversary.split")
    at_least(0, "adversary.taps_scale", *(f"regularizers.{f.name}" for f in _REGULARIZERS))
    need(config.regularizers.tau > 0, "regularizers.tau", "positive")
    need(len(config.evaluation.methods) > 0, "evaluation.methods", "at least one method")
    among("evaluation.pgd_loss", "margin", "cross_entropy")
    axes = [f.name for f in dataclasses.fields(MeshConfig)]
    for axis in axes:
        size = getattr(config.mesh, axis)
        need(size == -1 or size >= 1, f"mesh.{axis}", ">= 1, or -1 for what the others leave")
    left_over = [axis for axis in axes if getattr(config.mesh, axis) == -1]
    if len(left_over) > 1:
        raise ExperimentError(
            f"config.mesh: at most one axis can be -1, got {' and '.join(left_over)}"
        )


_REGULARIZERS = dataclasses.fields(RegularizerConfig)

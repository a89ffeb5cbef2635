"""The typed configuration of a run. ml-collections stops here: all else sees these dataclasses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ml_collections import config_dict


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

    method: str = "crown-ibp"
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
    steps of `step_size` optimise the slopes of `one-step`; `p` and `q` are the probabilities of
    `pq-slopes` (`boundjax.slopes.random`). `projections` random rows estimate the norms of `cap`
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
    bounds in `mtl-ibp`, `cc-ibp` and `exp-ibp`; `box` the radius of SABR's and STAPS' boxes as a
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


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, tuple) else value

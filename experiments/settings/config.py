"""The typed configuration of a run, the only form that code beyond `experiments.settings` sees."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from ml_collections import config_dict

Precision: TypeAlias = Literal["highest", "high", "default"]
Init: TypeAlias = Literal["fan_in", "fan_out", "ibp"]
Border: TypeAlias = Literal["zeros", "edge"]
OptimizerName: TypeAlias = Literal["adam", "sgd"]
Schedule: TypeAlias = Literal["linear", "smoothed", "stairs", "constant"]
AttackLoss: TypeAlias = Literal["margin", "cross_entropy"]
Rounding: TypeAlias = Literal["auto", "nearest", "real", "float32"]
Measure: TypeAlias = Literal["kappa", "mean", "dpp", "max", "smoothmax"]
GradientPoint: TypeAlias = Literal["attacked", "clean"]


class Norm(NamedTuple):
    """A norm: its order p and its printed name."""

    order: float
    label: str


DIAGNOSTICS = ("landscape", "relaxation", "relus", "norms", "gradients")
NORMS = {"inf": Norm(math.inf, "l-inf"), "2": Norm(2.0, "l2")}


@dataclass(frozen=True)
class DataConfig:
    """The data set.

    `dir` is a folder with the files of the data set; `tfds_dir` is the data folder of TFDS (empty:
    its default). `train` keeps only the first training images.
    """

    name: str = "digits"
    dir: str = ""
    tfds_dir: str = ""
    train: int = 0  # how many training images to use, before any are held out; 0: all
    validation: int = 0  # how many of the last training images to hold out for selection


@dataclass(frozen=True)
class ModelConfig:
    """A network of `experiments.models` and the normalisation of its first layer (empty: none).

    `init` is the distribution of the initial weights: `"fan_in"` is uniform in `+-1/sqrt(fan_in)`;
    `"fan_out"` is the same except for k x k convolutions, which are normal with variance
    `2 / (k^2 out)`; `"ibp"` is normal with standard deviation `sqrt(2 pi) / fan_in` except for the
    last layer (Shi et al. 2021).
    """

    name: str = "tiny"
    init: Init = "fan_in"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class RandomConfig:
    """What the network draws in every pass (`boundjax.stochastic`); nothing by default.

    `noise` are the standard deviations of Gaussian noise before the first convolution and before
    all others (RSE has 0.2 and 0.1). With a positive `prior_std` every parameter is Gaussian
    (Adv-BNN): this is the standard deviation of the prior, and `initial_std` that of every
    parameter at first. The method `adv-bnn` adds the divergence from the prior, times `kl` over
    the number of training images.
    """

    noise: tuple[float, ...] = ()
    prior_std: float = 0.0  # 0: weights are not random
    initial_std: float = 0.0  # 0: as the prior's
    kl: float = 0.02

    @property
    def draws(self) -> bool:
        """Whether the network is random."""
        return bool(self.noise) or self.prior_std > 0


@dataclass(frozen=True)
class TrainConfig:
    """The length of the training and the batch size over all devices.

    `precision` is the precision of the products in a step on an accelerator
    (`boundjax.training_precision`); certificates always use the highest.

    `diagnostics` names measures that are written to `landscape.jsonl` every `diagnostics_every`
    steps, from `DIAGNOSTICS`: `"landscape"`, the loss along the update at the scheduled and at the
    final radius; `"relaxation"`, slopes and the relaxed gradient; `"relus"`, states, slopes and
    widths of bounds by layer; `"norms"`, the spectral norms of the layers and their product;
    `"gradients"`, how far the gradients of a random network's draws point the same way. They do not
    change the training.
    """

    epochs: int = 1
    batch_size: int = 128
    precision: Precision = "highest"
    diagnostics: tuple[str, ...] = ()
    diagnostics_every: int = 100  # steps


@dataclass(frozen=True)
class AugmentConfig:
    """Random variations of the training images; none by default.

    `flip` mirrors them; `crop` is the number of pixels by which they may shift, over a border of
    `"zeros"` or of the `"edge"` pixels.
    """

    flip: bool = False
    crop: int = 0
    border: Border = "zeros"


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; its learning rate is multiplied by `factor` at each epoch in `milestones`.

    Only SGD uses `momentum`. `weight_decay` times the parameters is added to their gradient.
    """

    name: OptimizerName = "adam"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    clip_norm: float = 0.0  # largest norm of the whole gradient; 0: no clipping


@dataclass(frozen=True)
class RobustConfig:
    """The training method and its schedules.

    Radii are in pixels of `[0, 1]`. Training, certificates and attacks all use the norm `norm`,
    `"inf"` or `"2"` (a name, because JSON has no infinity).

    `schedule` is `"linear"`, `"smoothed"` (Shi et al. 2021) or `"stairs"`, which starts at
    `eps_start` and is constant within every epoch (Wong & Kolter 2018). With `"constant"` the
    radius is `eps_train` from the first step on, and the ramp, which is linear, is that of
    GradDiv's weight alone (Lee et al. 2022).
    """

    method: str = "crown-ibp"
    norm: Literal["inf", "2"] = "inf"
    eps_train: float = 0.1
    eps_test: float = 0.1
    eps_start: float = 0.0
    schedule: Schedule = "linear"
    warmup_epochs: float = 0.0  # natural training at radius 0
    ramp_epochs: float = 1.0  # radius 0 -> eps_train
    # Weights at radius 0 and at eps_train: of the natural loss, and of the linear bounds.
    kappa: tuple[float, float] = (1.0, 0.0)
    beta: tuple[float, float] = (1.0, 0.0)
    clip: bool = True  # intersect the ball with the pixel range [0, 1]

    @property
    def order(self) -> float:
        """The order p of the norm, 2 or infinity."""
        return NORMS[self.norm].order

    @property
    def norm_label(self) -> str:
        """The printed name of the norm, `l2` or `l-inf`."""
        return NORMS[self.norm].label


@dataclass(frozen=True)
class RelaxationConfig:
    """The linear bounds of the methods that train on them.

    `fused` gives CROWN-IBP one row per image instead of one per class. `steps` signed-gradient
    steps of `step_size` optimise the slopes of `one-step`; `p` and `q` are the probabilities of
    `pq-slopes` (`boundjax.slopes.random`). `projections` random rows estimate the norms of `cap`;
    with 0 the norms are exact.
    """

    fused: bool = False
    steps: int = 1
    step_size: float = 2.0
    p: float = 0.0
    q: float = 1.0
    projections: int = 0


@dataclass(frozen=True)
class AdversaryConfig:
    """The methods that train on attacked images: PGD, SABR, TAPS, expressive losses, Adv-BNN.

    The attack takes `steps` steps of `step_size` times its radius from `restarts` random points;
    its radius is `scale` times the radius of the schedule. `alpha` weighs the interval bounds in
    `mtl-ibp`, `cc-ibp` and `exp-ibp`. `box` is the radius of the boxes of SABR and STAPS as a
    fraction of the schedule's radius. `split` is the number of layers in the first block of TAPS,
    and `taps_scale` weighs its gradient through the attack.
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
    """Weights of terms that are added to the loss (`boundjax.training`); 0 leaves a term out.

    The weights `tightness` and `relu_balance` fall to 0 as the radius grows to `eps_train` (Shi et
    al. 2021, with the tolerance `tau`). `gap` and `slack`, d and r of the tightness regularizers
    (REG), grow with the radius. `relu_stability` (Xiao et al. 2019) and `l1` (of the kernels) are
    constant.
    """

    tightness: float = 0.0
    relu_balance: float = 0.0
    tau: float = 0.5
    gap: float = 0.0
    slack: float = 0.0
    relu_stability: float = 0.0
    l1: float = 0.0


@dataclass(frozen=True)
class DiversityConfig:
    """GradDiv's term in the loss of a random network (Lee et al. 2022); weight 0 leaves it out.

    `measure` is one of `boundjax.training.gradient_diversity_loss`, of the input gradients of
    `draws` new draws at the attacked or the clean images. The weight grows over the ramp.
    """

    weight: float = 0.0
    measure: Measure = "kappa"
    draws: int = 3
    at: GradientPoint = "attacked"


@dataclass(frozen=True)
class EvaluationConfig:
    """How errors are measured.

    `methods` name bounds of `boundjax.certify`; their union is reported as well. `rounding` is what
    they are to hold for, as in `boundjax.certify`: "real", "float32" or "nearest"; "auto" is "real"
    where op and device have a proof. `timeout` is the limit in seconds for one image with the
    method "complete". `precise_bn` recomputes the statistics of batch normalisation from all
    training images before every evaluation.

    A random network has no bounds. It predicts by the mean softmax of `draws` draws, and EOT-PGD
    attacks it with each of `attack_draws` draws per gradient at each of `radii`; EOT-FGSM has the
    most of them. Without `radii` the radius is `robust.eps_test`.
    """

    methods: tuple[str, ...] = ("interval", "crown-ibp")
    selection_method: str = "interval"
    every: int = 1  # epochs between evaluations on the validation images
    batch_size: int = 500
    images: int = 0  # how many of the first test images to evaluate on; 0: all
    pgd_steps: int = 40
    pgd_restarts: int = 2
    pgd_loss: AttackLoss = "margin"
    rounding: Rounding = "auto"
    timeout: float = 60.0
    precise_bn: bool = False
    draws: int = 20
    attack_draws: tuple[int, ...] = (1, 5, 10, 20)
    radii: tuple[float, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the state is written."""

    every: int = 500  # steps


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes divide the work; one axis may be -1, the remaining devices.

    `data` divides the batch; `fsdp` divides the batch, the parameters and the optimizer's state;
    `spec` divides the rows of the specification (classes) of linear bounds.
    """

    data: int = -1
    fsdp: int = 1
    spec: int = 1


@dataclass(frozen=True)
class Config:
    """A run; on the same machine, two runs of one configuration end with identical bits.

    With `seeds` above 1 there is a run for each of `seed`, `seed + 1`, ..., and their mean.
    """

    seed: int = 0
    seeds: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    random: RandomConfig = field(default_factory=RandomConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    relaxation: RelaxationConfig = field(default_factory=RelaxationConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    regularizers: RegularizerConfig = field(default_factory=RegularizerConfig)
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def to_dict(self) -> dict[str, Any]:
        """Converts to nested dictionaries that JSON can hold."""
        return _jsonable(dataclasses.asdict(self))


def to_config_dict(config: Config) -> config_dict.ConfigDict:
    """Converts to an editable ConfigDict for config files and command-line flags."""
    return config_dict.ConfigDict(dataclasses.asdict(config))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, tuple) else value

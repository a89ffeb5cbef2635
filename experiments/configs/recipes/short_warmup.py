"""FAST: "Fast Certified Robust Training with Short Warmup" (Shi et al. 2021), l-inf."""

from __future__ import annotations

from typing import NamedTuple

from experiments.configs import common
from experiments.configs.recipes import datasets

METHODS = ("fast", "ibp", "crown-ibp")
NETS = ("cnn7", "wide_resnet", "resnext")
# The parts of "fast" that the paper's ablation keeps.
PARTS = ("all", "init", "init+tightness", "init+relu", "regularizers")


class Length(NamedTuple):
    """Epochs in all, at radius 0 and of the ramp; the rate drops to a fifth at the milestones."""

    epochs: int
    batch_size: int
    warmup: float
    ramp: float
    milestones: tuple[float, ...]


MNIST = Length(70, 256, 0.0, 20.0, (50.0, 60.0))
CIFAR10 = {
    "70": Length(70, 128, 1.0, 20.0, (50.0, 60.0)),
    "160": Length(160, 128, 1.0, 80.0, (120.0, 140.0)),
}
TINY_IMAGENET = Length(80, 128, 1.0, 20.0, (61.0, 71.0))
# MNIST for 2 CPU cores: our own size.
TWO_CORES = Length(30, 128, 0.0, 12.0, (20.0, 26.0))


def trained(config: common.ConfigDict, length: Length, eps_train: float, eps: float) -> None:
    """Sets the optimiser and the schedule, without a natural loss after the warm-up."""
    config.train.epochs, config.train.batch_size = length.epochs, length.batch_size
    config.optim.lr, config.optim.factor, config.optim.clip_norm = 5e-4, 0.2, 10.0
    config.optim.milestones = length.milestones
    config.robust.schedule = "smoothed"
    config.robust.warmup_epochs, config.robust.ramp_epochs = length.warmup, length.ramp
    config.robust.eps_train, config.robust.eps_test = eps_train, eps
    config.robust.kappa = (0.0, 0.0)


def initialised(config: common.ConfigDict, weight: float) -> None:
    """Sets the paper's initialization, and its regularizers with this weight."""
    config.model.init = "ibp"
    config.regularizers.tightness = config.regularizers.relu_balance = weight


def method(config: common.ConfigDict, name: str, weight: float = 0.5) -> None:
    """Sets `"fast"` or one of its baselines: IBP, and CROWN-IBP with loss fusion."""
    config.robust.method = "crown-ibp" if name == "crown-ibp" else "ibp"
    if name == "fast":
        initialised(config, weight)
    if name == "crown-ibp":
        config.relaxation.fused = True
        config.robust.beta = (1.0, 0.0)


def ablate(config: common.ConfigDict, parts: str) -> None:
    """Reduces `"fast"` to `parts`, one of `PARTS`."""
    if parts == "regularizers":
        config.model.init = "fan_in"
    if parts in ("init", "init+relu"):
        config.regularizers.tightness = 0.0
    if parts in ("init", "init+tightness"):
        config.regularizers.relu_balance = 0.0


def certified_by(config: common.ConfigDict, *methods: str) -> None:
    """Sets the published size, with certificates by `methods`; the first of them selects."""
    common.published_size(config)
    config.evaluation.methods = methods
    config.evaluation.selection_method = methods[0]


def _mnist(config: common.ConfigDict, length: Length, eps: str) -> None:
    """Trains at `min(0.4, eps + 0.1)`, which for eps 0.4 is 0.4, as in the paper."""
    datasets.prepare(config, "mnist")
    trained(config, length, min(0.4, round(float(eps) + 0.1, 2)), float(eps))


def mnist(config: common.ConfigDict, name: str, net: str, eps: str) -> None:
    """Configures the paper's networks on MNIST."""
    _mnist(config, MNIST, eps)
    config.model.name = net
    method(config, name)
    certified_by(config, "interval", "crown-ibp")


def mnist_two_cores(config: common.ConfigDict, name: str, eps: str) -> None:
    """Configures Small* with batch normalisation."""
    _mnist(config, TWO_CORES, eps)
    common.two_cores(config)
    config.model.name = "small_star_bn"
    config.optim.lr = 1e-3
    method(config, name)


def cifar10(config: common.ConfigDict, name: str, net: str, epochs: str) -> None:
    """Configures CIFAR-10 at 8/255."""
    datasets.prepare(config, "cifar10_fast")
    config.model.name = net
    trained(config, CIFAR10[epochs], 8 / 255, 8 / 255)
    method(config, name)
    certified_by(config, "interval", "crown-ibp")


def tiny_imagenet(config: common.ConfigDict, name: str, net: str) -> None:
    """Configures Tiny ImageNet at 1/255, by intervals alone: linear bounds would be expensive."""
    datasets.prepare(config, "tiny_imagenet_fast")
    config.model.name = f"{net}_tiny"
    trained(config, TINY_IMAGENET, 1 / 255, 1 / 255)
    method(config, name, weight=0.2)
    certified_by(config, "interval")

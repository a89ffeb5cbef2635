"""BCP: "Lipschitz-Certifiable Training with a Tight Outer Bound" (Lee, Lee & Park 2020).

LMT, CAP and IBP use the same recipe. The paper's balls are not clipped to the pixel range; ours are
(`robust.clip`).
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import datasets

CIFAR10_MODELS = {"6c2f": "6c2f", "4c3f": "medium", "wrn": "wrn"}
_CERTIFICATES = {
    "bcp": ("bcp", "lmt"),
    "lmt": ("bcp", "lmt"),
    "ibp": ("interval", "crown-ibp"),
    "cap": ("interval", "crown-ibp", "fast-lin"),
}


def _method(config: common.ConfigDict, method: str, eps: float) -> None:
    """Configures l2 training with a linear radius and kappa from 1 to 0.

    CAP trains on estimates from 50 projections, without a natural loss; its certificates are too
    expensive for every epoch, so nothing is held out for selection.
    """
    config.robust.method, config.robust.norm = method, "2"
    config.robust.eps_train = config.robust.eps_test = eps
    config.robust.kappa = (1.0, 0.0)
    config.evaluation.methods = _CERTIFICATES[method]
    if method == "cap":
        config.data.validation = 0
        config.robust.kappa = (0.0, 0.0)
        config.relaxation.projections = 50
    else:
        config.evaluation.selection_method = "interval" if method == "ibp" else method


def mnist(config: common.ConfigDict, method: str) -> None:
    """Configures MNIST at l2 radius 1.58: 4C3F for 60 epochs."""
    datasets.prepare(config, "mnist")
    common.published_size(config)
    _method(config, method, 1.58)
    config.model.name = "medium"  # 4C3F
    config.train.epochs, config.train.batch_size = 60, 50
    config.optim.lr, config.optim.milestones = 3e-4, (21.0, 30.0, 40.0)
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, 20.0


def mnist_two_cores(config: common.ConfigDict, method: str) -> None:
    """Configures Small* for 20 epochs."""
    datasets.prepare(config, "mnist")
    common.two_cores(config)
    _method(config, method, 1.58)
    config.model.name = "small_star"
    config.train.epochs, config.train.batch_size = 20, 128
    config.optim.lr, config.optim.factor, config.optim.milestones = 1e-3, 0.2, (12.0, 17.0)
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, 8.0


def _cifar10(config: common.ConfigDict, method: str) -> None:
    datasets.prepare(config, "cifar10")
    _method(config, method, 36 / 255)
    config.model.init = "fan_out"
    config.train.batch_size = 128
    config.optim.lr, config.optim.factor = 1e-3, 0.5


def cifar10(config: common.ConfigDict, method: str, net: str) -> None:
    """Configures CIFAR-10 at l2 radius 36/255: one of `CIFAR10_MODELS` for 200 epochs."""
    _cifar10(config, method)
    common.published_size(config)
    config.model.name = CIFAR10_MODELS[net]
    config.train.epochs = 200
    config.robust.warmup_epochs, config.robust.ramp_epochs = 10.0, 121.0
    # Halve the rate every 10 epochs from the end of the ramp on.
    config.optim.milestones = common.every(10, first=131, end=200)


def linf(config: common.ConfigDict) -> None:
    """Configures the paper's row at l-inf radius 8/255: 4C3F."""
    config.robust.norm = "inf"
    config.robust.eps_train = config.robust.eps_test = 8 / 255
    config.model.name = CIFAR10_MODELS["4c3f"]


def cifar10_two_cores(config: common.ConfigDict, method: str) -> None:
    """Configures Small* for 12 epochs."""
    _cifar10(config, method)
    common.two_cores(config)
    config.model.name = "small_star"
    config.train.epochs = 12
    config.optim.milestones = (8.0, 10.0)
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, 6.0


def tiny_imagenet(config: common.ConfigDict, method: str) -> None:
    """Configures Tiny ImageNet at l2 radius 36/255: 8C2F, 100 epochs of SGD."""
    datasets.prepare(config, "tiny_imagenet")
    common.published_size(config)
    _method(config, method, 36 / 255)
    if method == "ibp":  # linear bounds on 199 margins are expensive
        config.evaluation.methods = ("interval",)
    config.model.name, config.model.init = "8c2f", "fan_out"
    config.train.epochs, config.train.batch_size = 100, 5
    config.optim.name, config.optim.lr, config.optim.weight_decay = "sgd", 1e-3, 2e-4
    config.optim.milestones = (50.0, 70.0, 90.0)
    config.robust.warmup_epochs, config.robust.ramp_epochs = 2.0, 50.0

"""CI: the model families A to J and the largest network of CROWN-IBP (Zhang et al. 2020).

"Improved Training of Certifiably Robust Models" (REG) adds its regularizer r to both.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import datasets, short_warmup

# REG trains longer and halves the rate every 20 epochs.
_MILESTONES = {"100": (70.0, 80.0, 90.0), "140": (80.0, 100.0, 120.0)}
SLACK = 0.5  # weight of r where REG adds it to CROWN-IBP


def _mixed(config: common.ConfigDict, method: str) -> None:
    """Mixes linear bounds that give way to intervals; no epoch is selected."""
    config.robust.method = method
    config.robust.kappa = (1.0, 0.5)
    config.robust.beta = (1.0, 0.0)
    config.evaluation.methods = ("interval", "crown-ibp")
    config.evaluation.every = 5


def mnist(config: common.ConfigDict, method: str, family: str, epochs: str) -> None:
    """Configures a family, `"a"` to `"j"`, at 0.3, trained at 0.4 with a ramp in epochs 1 to 61."""
    datasets.prepare(config, "mnist", selects=False)
    _mixed(config, method)
    config.model.name = f"family_{family}"
    config.train.epochs, config.train.batch_size = int(epochs), 256
    config.optim.lr, config.optim.factor = 5e-4, 0.5
    config.optim.milestones = _MILESTONES[epochs]
    config.robust.eps_train, config.robust.eps_test = 0.4, 0.3
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, 60.0
    config.evaluation.pgd_steps = 100
    config.checkpoint.every = 1000


def mnist_two_cores(config: common.ConfigDict) -> None:
    """Takes 60 epochs instead of 100, with the ramp in epochs 1 to 21: few have linear bounds."""
    config.train.epochs = 60
    config.optim.milestones = (42.0, 48.0, 54.0)
    config.robust.ramp_epochs = 20.0


def mnist_fast(config: common.ConfigDict, family: str) -> None:
    """Trains a family by FAST's recipe for MNIST, without batch normalisation."""
    mnist(config, "ibp", family, "100")
    short_warmup.trained(config, short_warmup.MNIST, 0.4, 0.3)
    short_warmup.method(config, "fast")


def mnist_large(config: common.ConfigDict, eps: str) -> None:
    """Configures CROWN-IBP's largest network at 0.3, trained at 0.4, or at 0.1, trained at 0.2."""
    datasets.prepare(config, "mnist", selects=False)
    common.published_size(config)
    _mixed(config, "crown-ibp")
    config.model.name = "large"
    config.robust.eps_test = float(eps)
    if eps == "0.3":
        config.robust.eps_train = 0.4
        config.train.epochs, config.train.batch_size = 200, 256
        config.optim.lr, config.optim.milestones = 5e-4, (130.0, 190.0)
        config.robust.warmup_epochs, config.robust.ramp_epochs = 10.0, 50.0
    else:
        config.robust.eps_train = 0.2
        config.train.epochs, config.train.batch_size = 100, 100
        config.optim.lr, config.optim.milestones = 1e-3, (25.0, 42.0)
        config.robust.warmup_epochs, config.robust.ramp_epochs = 3.0, 17.0


def cifar10_large(config: common.ConfigDict, eps: str) -> None:
    """Configures CROWN-IBP's largest network, without a natural loss.

    It trains for 3 200 epochs at 1.1 times eps (in 255ths). At 2/255 the linear bounds keep their
    weight, as in the authors' settings.
    """
    datasets.prepare(config, "cifar10_crown_ibp", selects=False)
    common.published_size(config)
    _mixed(config, "crown-ibp")
    config.model.name = "large"
    config.train.epochs, config.train.batch_size = 3200, 1024
    config.optim.lr, config.optim.milestones = 5e-4, (2600.0, 3040.0)
    config.robust.schedule = "smoothed"
    config.robust.warmup_epochs, config.robust.ramp_epochs = 320.0, 1600.0
    config.robust.eps_test = float(eps) / 255
    config.robust.eps_train = 1.1 * config.robust.eps_test
    config.robust.kappa = (0.0, 0.0)
    config.robust.beta = (1.0, 1.0 if eps == "2" else 0.0)

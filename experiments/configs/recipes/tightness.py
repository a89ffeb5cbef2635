"""CAP (Wong & Kolter 2018), and REG: "Improved Training of Certifiably Robust Models".

The radius has stairs in the first 20 epochs, there is no natural loss, and all images are trained
on: exact certificates are too dear to select on them.
"""

from __future__ import annotations

import types

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import datasets

# (eps, by projections or exact) -> weights of REG's d and r on MNIST, of the small network; the
# paper has none of 2x100 by projections.
_MNIST_WEIGHTS = {
    ("0.1", False): (5e-3, 0.5),
    ("0.1", True): (0.0, 0.5),
    ("0.3", False): (5e-3, 0.5),
    ("0.3", True): (2e-3, 0.2),
}
_MLP_WEIGHTS = {"0.1": (2e-3, 1.0), "0.3": (5e-3, 5e-3)}
# The paper has those of the small network only.
_CIFAR10_WEIGHTS = {"2": (5e-3, 0.5), "8": (1e-3, 0.1)}


def _cap(config: config_dict.ConfigDict, projections: str) -> None:
    common.published_size(config)
    config.robust.method = "cap"
    config.robust.kappa = (0.0, 0.0)
    config.robust.schedule = "stairs"
    config.robust.warmup_epochs, config.robust.ramp_epochs = 0.0, 20.0
    config.relaxation.projections = int(projections)
    config.evaluation.methods = ("interval", "crown-ibp", "fast-lin")
    config.train.epochs, config.train.batch_size = 80, 50
    config.optim.lr, config.optim.factor = 1e-3, 0.5
    config.optim.milestones = common.every(10, first=30, end=80)


def mnist(config: config_dict.ConfigDict, given: types.SimpleNamespace) -> None:
    """REG on MNIST; CAP itself is `regularizers.gap` and `.slack` 0."""
    datasets.prepare(config, "mnist", selects=False)
    _cap(config, given.projections)
    config.model.name = {"mlp": "mlp_2x100", "small": "small_star"}[given.net]
    config.robust.eps_start = 0.01
    config.robust.eps_train = config.robust.eps_test = float(given.eps)
    weights = _MNIST_WEIGHTS[given.eps, given.projections != "0"]
    if given.net == "mlp" and given.projections == "0":
        weights = _MLP_WEIGHTS[given.eps]
    config.regularizers.gap, config.regularizers.slack = weights


def mnist_two_cores(config: config_dict.ConfigDict) -> None:
    """30 epochs instead of 80, the stairs in the first 8."""
    common.two_cores(config)
    config.train.epochs = 30
    config.robust.ramp_epochs = 8.0
    config.optim.milestones = common.every(5, first=13, end=30)


def cifar10(config: config_dict.ConfigDict, given: types.SimpleNamespace) -> None:
    """REG on CIFAR-10, eps in 255ths."""
    datasets.prepare(config, "cifar10_cap", selects=False)
    _cap(config, given.projections)
    config.model.name = {"small": "small_star", "large": "medium"}[given.net]
    config.robust.eps_start = 0.001
    config.robust.eps_train = config.robust.eps_test = float(given.eps) / 255
    config.regularizers.gap, config.regularizers.slack = _CIFAR10_WEIGHTS[given.eps]


def cap_adam(config: config_dict.ConfigDict) -> None:
    """How long CAP itself is trained: 60 epochs, on MNIST with REG's Adam."""
    config.train.epochs = 60
    config.optim.milestones = common.every(10, first=30, end=60)


def cap_sgd(config: config_dict.ConfigDict) -> None:
    """How CAP itself is trained on CIFAR-10: 60 epochs of SGD."""
    cap_adam(config)
    config.optim.name = "sgd"
    config.optim.lr, config.optim.momentum, config.optim.weight_decay = 0.05, 0.9, 5e-4
    config.optim.clip_norm = 1.0


def baseline(config: config_dict.ConfigDict) -> None:
    """Without REG's terms."""
    config.regularizers.gap = config.regularizers.slack = 0.0

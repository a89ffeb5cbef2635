"""RS: adversarial training with a penalty on unstable ReLUs (Xiao et al. 2019), l-inf.

The weights on MNIST are those of the authors' released settings, which are for 0.1; those on
CIFAR-10 are recalled from the publication and not checked against it. The number of epochs is not
published; ours is a choice of our own.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import datasets

# Epochs, weight of the l1 norm, weight of the penalty.
_MNIST = (100, 2e-5, 1e-4)
_CIFAR10 = {"2": (200, 1e-5, 1e-3), "8": (200, 1e-5, 2e-3)}


def _trained(
    config: common.ConfigDict, eps: float, epochs: int, l1: float, stability: float
) -> None:
    """Configures Small* with PGD of 8 steps, whose radius grows in the first half of training."""
    common.published_size(config)
    config.model.name = "small_star"
    config.train.epochs, config.train.batch_size = epochs, 64
    config.optim.lr = 1e-4
    config.robust.method = "pgd"
    config.robust.kappa = (0.0, 0.0)
    config.robust.eps_train = config.robust.eps_test = eps
    config.robust.ramp_epochs = epochs / 2
    config.adversary.steps, config.adversary.step_size = 8, 0.3
    config.regularizers.l1, config.regularizers.relu_stability = l1, stability
    # Training does not bound the margins, so intervals alone would certify next to nothing.
    config.evaluation.methods = ("interval", "crown-ibp", "crown")


def mnist(config: common.ConfigDict, eps: str) -> None:
    """Configures MNIST at `eps`."""
    datasets.prepare(config, "mnist", selects=False)
    _trained(config, float(eps), *_MNIST)


def cifar10(config: common.ConfigDict, eps: str) -> None:
    """Configures CIFAR-10, with eps in 255ths."""
    datasets.prepare(config, "cifar10", selects=False)
    _trained(config, float(eps) / 255, *_CIFAR10[eps])

"""Parts that experiments are composed of: each returns a ConfigDict or changes one in place."""

from __future__ import annotations

from ml_collections import config_dict

from experiments.config import Config, to_config_dict
from experiments.errors import ExperimentError


def base() -> config_dict.ConfigDict:
    """Every key with its default (`experiments/config.py` documents them)."""
    return to_config_dict(Config())


def check_variant(variant: str, known: tuple[str, ...]) -> None:
    """Raises a one-line error for a variant that is not among `known` (`""` is the default)."""
    if variant not in known:
        names = ", ".join(f":{name}" for name in known if name) or "none"
        raise ExperimentError(f"unknown variant :{variant}: this config has {names}")


def mnist(config: config_dict.ConfigDict, validation: int) -> None:
    """MNIST at test radius 0.1, trained at 0.2: at 0.1 it overfits (Lee et al. 2021)."""
    config.data.name = "mnist"
    config.data.validation = validation
    config.robust.eps_train = 0.2
    config.robust.eps_test = 0.1


def mnist_paper(config: config_dict.ConfigDict) -> None:
    """MNIST as in "Loss Landscape Matters" (Lee et al. 2021): Large, ramp from epoch 10 to 59."""
    mnist(config, validation=5000)
    config.model.name = "large"
    config.train.epochs = 200
    config.train.batch_size = 100
    config.optim.lr = 5e-4
    config.optim.milestones = (130.0, 190.0)
    config.optim.factor = 0.1
    config.robust.schedule = "linear"
    config.robust.warmup_epochs = 10.0
    config.robust.ramp_epochs = 49.0
    config.robust.kappa = (1.0, 0.0)
    config.evaluation.pgd_steps = 100
    config.evaluation.batch_size = 200
    config.checkpoint.every = 1000


def mnist_two_cores(config: config_dict.ConfigDict) -> None:
    """MNIST for 2 CPU cores: Small*, and all 60 000 images, so there is nothing to select on.

    In so few epochs the training radius 0.15 has a lower standard error than 0.2 at about the same
    verified error on the last 5 000 training images (docs/results.md).
    """
    mnist(config, validation=0)
    config.model.name = "small_star"
    config.train.batch_size = 128
    config.optim.lr = 1e-3
    config.optim.factor = 0.2
    config.robust.eps_train = 0.15
    config.robust.warmup_epochs = 1.0
    config.robust.kappa = (1.0, 0.5)
    config.evaluation.every = 5
    config.checkpoint.every = 200

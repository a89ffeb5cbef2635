"""GradDiv (Lee et al. 2022; chapter 2 of Lee's thesis): random networks, l-inf, Table A.1.

The attack of the training has its full radius from the first step on, and the weight of GradDiv
grows over the ramp. The thesis does not say at which images and with which draws the regularizer
takes its gradients (here at the attacked ones, with new draws), nor the first standard deviation of
Adv-BNN's weights (here the prior's, as in the authors' scripts of Adv-BNN). It trains RSE with
Adam, the authors of RSE with SGD; here it is Adam.
"""

from __future__ import annotations

import types
from typing import NamedTuple

from experiments.configs import common
from experiments.configs.recipes import datasets

DEFENCES = ("adv-bnn", "rse", "adv-train", "none")
MEASURES = ("kappa", "mean", "dpp", "max", "smoothmax")


class _Recipe(NamedTuple):
    """The line of a data set in Table A.1, its radii, the prior and the best weight of GradDiv."""

    preparation: str
    model: str
    epochs: int
    milestones: tuple[float, ...]
    warmup: float
    ramp: float
    eps: float
    radii: tuple[float, ...]
    prior_std: float
    measure: str
    weight: float


_HUNDREDTHS = tuple(number / 100 for number in range(1, 8))
_RECIPES = {
    "mnist": _Recipe(
        *("mnist", "graddiv_mnist", 60, (30.0,), 3.0, 20.0),
        *(0.3, (0.1, 0.2, 0.3, 0.32, 0.34, 0.36, 0.38, 0.4), 0.05, "kappa", 1.0),
    ),
    "cifar10": _Recipe(
        *("cifar10_plain", "vgg16", 200, (80.0, 140.0, 180.0), 6.0, 90.0),
        *(0.03, _HUNDREDTHS, 0.1, "dpp", 1.0),
    ),
    "stl10": _Recipe(
        *("stl10", "graddiv_stl10", 120, (60.0, 100.0), 6.0, 60.0),
        *(0.03, _HUNDREDTHS, 0.15, "mean", 0.7),
    ),
}


def choices(name: str) -> dict[str, common.Choices]:
    """The arguments of a data set's configuration; its best regularizer is the default."""
    best = _RECIPES[name].measure
    alternatives = tuple(measure for measure in MEASURES if measure != best)
    return {"defence": DEFENCES, "graddiv": (best, "none", *alternatives)}


def train(config: common.ConfigDict, name: str, options: types.SimpleNamespace) -> None:
    """Configures a defence on a data set, with or without GradDiv."""
    recipe = _RECIPES[name]
    datasets.prepare(config, recipe.preparation, selects=False)
    common.published_size(config)
    config.model.name = recipe.model
    config.train.epochs, config.train.batch_size = recipe.epochs, 128
    config.optim.lr, config.optim.milestones = 1e-3, recipe.milestones
    config.robust.method = "natural" if options.defence == "none" else options.defence
    config.robust.eps_train = config.robust.eps_test = recipe.eps
    if name == "cifar10":  # trained at 8/255, which is not among the radii of the tables
        config.robust.eps_train = 8 / 255
    config.robust.schedule = "constant"
    config.robust.warmup_epochs, config.robust.ramp_epochs = recipe.warmup, recipe.ramp
    config.adversary.steps, config.adversary.step_size = 10, 0.25
    config.evaluation.pgd_steps, config.evaluation.pgd_loss = 20, "cross_entropy"
    config.evaluation.radii = recipe.radii
    config.evaluation.methods = ("interval",)
    if options.defence == "adv-bnn":
        config.random.prior_std = recipe.prior_std
    elif options.defence == "rse":
        config.random.noise = (0.2, 0.1)
    else:  # a deterministic network has nothing to diversify
        common.exclude(options, f"defence={options.defence}", "graddiv")
        return
    if options.graddiv != "none":
        config.diversity.measure, config.diversity.weight = options.graddiv, recipe.weight


def mnist_two_cores(config: common.ConfigDict) -> None:
    """Shortens MNIST for 2 CPU cores: a smaller network, 12,000 images, 10 epochs, 5 steps.

    In so few steps nothing is learned at the full radius, so that the radius grows over the ramp.
    """
    config.model.name = "small_star_leaky"
    config.data.train = 12_000
    config.train.epochs, config.train.precision = 10, "highest"
    config.optim.milestones = (8.0,)
    config.robust.schedule = "linear"
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, 3.0
    config.adversary.steps = 5
    config.checkpoint.every = 94
    config.evaluation.images = 1000
    config.evaluation.attack_draws, config.evaluation.radii = (5, 20), (0.3, 0.36, 0.4)

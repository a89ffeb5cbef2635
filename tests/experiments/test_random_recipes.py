"""GradDiv's recipes, in literal values (Table A.1 of Lee's thesis)."""

import importlib

import numpy as np
import pytest

from experiments.settings.checks import from_config_dict
from experiments.settings.differences import differing_keys
from experiments.train.step import create_schedule


def _config(name, variant=""):
    module = importlib.import_module(f"experiments.configs.{name}")
    return from_config_dict(module.get_config(variant))


def _epochs(config, *epochs, steps=10):
    """The weights at the beginning of these epochs."""
    schedule = create_schedule(config.robust, steps)
    return [schedule(round(epoch * steps)) for epoch in epochs]


# Network, epochs, milestones, warm-up and ramp (Table A.1), radius in training, prior, best measure
# and its weight, pixels of the crop.
GRADDIV = {
    "mnist": ("graddiv_mnist", 60, (30,), 3, 20, 0.3, 0.05, "kappa", 1.0, 0),
    "stl10": ("graddiv_stl10", 120, (60, 100), 6, 60, 0.03, 0.15, "mean", 0.7, 4),
    "cifar10": ("vgg16", 200, (80, 140, 180), 6, 90, 8 / 255, 0.1, "dpp", 1.0, 4),
}


@pytest.mark.parametrize("data", GRADDIV)
def test_graddiv(data):
    config = _config(f"{data}_graddiv")
    settings = (
        *(config.model.name, config.train.epochs, config.optim.milestones),
        *(config.robust.warmup_epochs, config.robust.ramp_epochs, config.robust.eps_train),
        *(config.random.prior_std, config.diversity.measure, config.diversity.weight),
        config.augment.crop,
    )
    assert settings == GRADDIV[data]
    assert (config.train.batch_size, config.optim.name, config.optim.lr) == (128, "adam", 1e-3)
    assert (config.random.kl, config.optim.factor, config.diversity.draws) == (0.02, 0.1, 3)
    assert (config.adversary.steps, config.adversary.step_size) == (10, 0.25)
    # The attack has its radius in the warm-up as well; the weight of GradDiv grows behind it.
    first, middle, end = _epochs(
        config,
        0,
        config.robust.warmup_epochs + config.robust.ramp_epochs / 2,
        settings[4] + settings[3],
    )
    assert float(first.eps) == np.float32(config.robust.eps_train)
    np.testing.assert_allclose([first.ramp, middle.ramp, end.ramp], [0, 0.5, 1], atol=1e-6)
    # Pixels in [0, 1], nothing held out.
    assert (config.model.mean, config.model.std, config.data.validation) == ((), (), 0)
    grid = (0.1, 0.2, 0.3, 0.32, 0.34, 0.36, 0.38, 0.4)
    if data != "mnist":
        assert config.augment.flip
        grid = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07)
    evaluation = config.evaluation
    assert (evaluation.radii, evaluation.pgd_steps, evaluation.draws) == (grid, 20, 20)
    assert evaluation.attack_draws == (1, 5, 10, 20)
    rse = _config(f"{data}_graddiv", "defence=rse,graddiv=none")
    assert (rse.robust.method, rse.random.noise, rse.random.prior_std) == ("rse", (0.2, 0.1), 0)
    assert rse.diversity.weight == 0
    plain = _config(f"{data}_graddiv", "defence=adv-train")
    assert (plain.robust.method, plain.random.draws) == ("adv-train", False)
    assert _config(f"{data}_graddiv", "defence=none").robust.method == "natural"


def test_graddiv_on_two_cores():
    config = _config("mnist_graddiv", "cpu")
    assert (config.model.name, config.data.train, config.train.epochs) == (
        *("small_star_leaky", 12_000, 10),
    )
    assert (config.robust.warmup_epochs, config.robust.ramp_epochs) == (1, 3)
    np.testing.assert_allclose(
        [weights.eps for weights in _epochs(config, 1, 4, 5)], [0, 0.3, 0.3], rtol=1e-6
    )
    without = _config("mnist_graddiv", "cpu,graddiv=none").to_dict()
    assert differing_keys(config.to_dict(), without) == ["diversity.weight"]

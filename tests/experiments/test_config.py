import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from experiments import methods
from experiments.evaluation.evaluate import Options
from experiments.settings import radius
from experiments.settings.checks import from_config_dict
from experiments.settings.config import Config, to_config_dict
from experiments.settings.differences import differing_keys, with_defaults
from experiments.settings.errors import ExperimentError
from experiments.train.step import create_learning_rate, create_schedule

pytestmark = pytest.mark.quick


def _get_config(name, variant):
    return importlib.import_module(f"experiments.configs.{name}").get_config(variant)


def test_the_paper_size_is_the_default():
    config = from_config_dict(_get_config("mnist_crown", ""))
    assert (config.model.name, config.train.epochs, config.train.batch_size) == ("large", 200, 100)
    assert (config.robust.eps_train, config.robust.eps_test) == (0.2, 0.1)
    schedule = create_schedule(config.robust, steps_per_epoch=550)
    # The papers' code: start 10, length 50 ramps over 49 epochs.
    assert float(schedule(10 * 550).eps) == 0.0
    assert float(schedule(59 * 550 - 1).eps) < 0.2
    assert schedule(59 * 550).eps == jnp.float32(0.2)


@pytest.mark.parametrize(
    ("name", "eps", "start", "end"),
    [("mnist_bcp", 1.58, 1, 21), ("cifar10_lmt", 36 / 255, 10, 131)],
)
def test_the_radius_ends_at_its_target(name, eps, start, end):
    # The authors' code goes on beyond it, by a part of an epoch's increase, and with it kappa < 0.
    config = from_config_dict(_get_config(name, ""))
    steps = 55_000 // config.train.batch_size
    schedule = create_schedule(config.robust, steps)
    assert (config.robust.norm, config.robust.order) == ("2", 2.0)
    assert float(schedule(start * steps).eps) == 0.0
    assert 0.0 < float(schedule(start * steps + 1).eps) < 1e-3
    assert float(schedule(end * steps - 1).eps) < np.float32(eps)
    for step in (end * steps, end * steps + 1, end * steps + steps // 2, 10**7):
        assert schedule(step).eps == jnp.float32(eps)
        assert float(schedule(step).kappa) == 0.0


def test_the_learning_rate_is_halved_every_ten_epochs_after_the_ramp():
    config = from_config_dict(_get_config("cifar10_bcp", ""))
    rate = create_learning_rate(config.optim, steps_per_epoch=10)
    result = [float(rate(10 * epoch)) for epoch in (0, 130, 131, 141, 151, 191, 199)]
    np.testing.assert_allclose(result, 1e-3 / 2.0 ** np.array([0, 0, 1, 2, 3, 7, 7]), rtol=1e-5)


def test_keys_that_are_newer_than_a_run_have_their_defaults():
    config = from_config_dict({"seed": 3, "robust": {"eps_test": 0.3}})
    old = config.to_dict()
    del old["robust"]["norm"], old["train"], old["data"]["validation"]
    assert with_defaults(old) == config.to_dict()
    assert from_config_dict(old) == config
    # What is unknown stays, to be told of.
    assert differing_keys(with_defaults(old | {"old": 1}), config.to_dict()) == ["old"]
    assert with_defaults({"robust": 3})["robust"] == 3


def test_round_trip():
    config = Config()
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict({}) == config
    assert from_config_dict(config.to_dict()) == config  # from JSON: lists instead of tuples


def test_integers_serve_as_floats():
    config = from_config_dict({"train": {"epochs": 3}, "optim": {"lr": 1, "milestones": (1, 2.5)}})
    assert isinstance(config.optim.lr, float)
    assert config.optim.milestones == (1.0, 2.5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"robust": {"esp_test": 0.1}},
            r"unknown config key robust\.esp_test: did you mean robust",
        ),
        ({"zzz": 1}, r"unknown config key zzz: use one of seed, seeds"),
        ({"robust": 3}, r"config\.robust: expected a group of settings, got 3"),
        (
            {"robust": {"eps_test": "a"}},
            r"config\.robust\.eps_test: expected float, got 'a' \(str\)",
        ),
        ({"train": {"epochs": 2.5}}, r"config\.train\.epochs: expected int, got 2\.5"),
        ({"train": {"epochs": True}}, r"config\.train\.epochs: expected int, got True"),
        ({"robust": {"clip": 1}}, r"config\.robust\.clip: expected bool, got 1"),
        ({"robust": {"kappa": (1.0,)}}, r"config\.robust\.kappa: expected 2 values"),
        ({"optim": {"milestones": 3}}, r"config\.optim\.milestones: expected a tuple"),
        ({"robust": {"eps_test": -0.1}}, r"config\.robust\.eps_test must be >= 0, got -0\.1"),
        ({"robust": {"eps_train": float("nan")}}, r"eps_train must be >= 0, got nan"),
        ({"robust": {"kappa": (2.0, 0.0)}}, r"config\.robust\.kappa must be two weights in"),
        ({"robust": {"schedule": "cosine"}}, r"'stairs' or 'constant', got 'cosine'"),
        ({"robust": {"norm": "1"}}, r"config\.robust\.norm must be 'inf' or '2', got '1'"),
        ({"robust": {"norm": 2}}, r"config\.robust\.norm: expected str, got 2"),
        ({"train": {"augment": "crop"}}, r"unknown config key train\.augment: use one of epochs"),
        ({"augment": {"border": "wrap"}}, r"augment\.border must be 'zeros' or 'edge', got 'wrap'"),
        ({"augment": {"crop": -1}}, r"config\.augment\.crop must be >= 0, got -1"),
        (
            {"optim": {"milestones": (100.0,)}},
            r"optim\.milestones must be epochs in \[0, train\.epochs\), \d+, got \(100\.0,\)",
        ),
        ({"robust": {"eps_train": 8.0}}, r"pixels of \[0, 1\], e\.g\. 8/255 = 0\.031373, got 8\.0"),
        ({"robust": {"eps_start": 0.01}}, r"eps_start must be 0 unless robust\.schedule='stairs'"),
        ({"robust": {"ramp_epochs": 2.0}}, r"at most train\.epochs - robust\.warmup_epochs = 1,"),
        ({"optim": {"name": "lion"}}, r"config\.optim\.name must be 'adam' or 'sgd', got 'lion'"),
        ({"relaxation": {"p": 1.5}}, r"config\.relaxation\.p must be in \[0, 1\], got 1\.5"),
        ({"regularizers": {"tau": 0.0}}, r"config\.regularizers\.tau must be positive, got 0\.0"),
        ({"model": {"init": "he"}}, r"config\.model\.init must be 'fan_in', 'fan_out' or 'ibp'"),
        ({"optim": {"lr": 0.0}}, r"config\.optim\.lr must be positive, got 0\.0"),
        ({"seeds": 0}, r"config\.seeds must be >= 1, got 0"),
        (
            {"train": {"epochs": 0}, "robust": {"ramp_epochs": 0.0}},
            r"config\.train\.epochs must be >= 1, got 0",
        ),
        ({"checkpoint": {"every": 0}}, r"config\.checkpoint\.every must be >= 1, got 0"),
        ({"evaluation": {"pgd_loss": "dlr"}}, r"'margin' or 'cross_entropy', got 'dlr'"),
        ({"evaluation": {"methods": ()}}, r"at least one method"),
        ({"random": {"noise": (0.1,)}}, r"random\.noise must be \(\) or two standard deviations"),
        ({"random": {"noise": (0.1, -0.1)}}, r"random\.noise must be \(\) or two standard dev"),
        ({"random": {"prior_std": -0.1}}, r"config\.random\.prior_std must be >= 0, got -0\.1"),
        ({"diversity": {"draws": 1}}, r"config\.diversity\.draws must be >= 2, got 1"),
        ({"diversity": {"measure": "rho"}}, r"'max' or 'smoothmax', got 'rho'"),
        ({"evaluation": {"draws": 0}}, r"config\.evaluation\.draws must be >= 1, got 0"),
        ({"evaluation": {"attack_draws": (5, 0)}}, r"attack_draws must be numbers of draws >= 1"),
        ({"data": {"train": -1}}, r"config\.data\.train must be >= 0, got -1"),
    ],
)
def test_mistakes_are_one_line_errors(source, message):
    with pytest.raises(ExperimentError, match=message) as caught:
        from_config_dict(config_dict.ConfigDict(source))
    assert "\n" not in str(caught.value)


def test_differing_keys():
    one = Config().to_dict()
    other = from_config_dict({"seed": 3, "robust": {"clip": False}}).to_dict()
    assert differing_keys(one, other) == ["robust.clip", "seed"]
    assert differing_keys(one, one) == []
    assert differing_keys(one, one | {"new": 1}) == ["new"]


def test_learning_rate_falls_at_the_milestones():
    optim = {"lr": 1.0, "milestones": (2.0, 3.5), "factor": 0.1}
    config = from_config_dict({"train": {"epochs": 4}, "optim": optim})
    rate = create_learning_rate(config.optim, steps_per_epoch=10)
    values = [float(rate(step)) for step in (0, 19, 20, 34, 35, 100)]
    np.testing.assert_allclose(values, [1.0, 1.0, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


def test_phases_of_crown_ibp():
    config = from_config_dict(
        {
            "robust": {"warmup_epochs": 1.0, "ramp_epochs": 2.0, "schedule": "smoothed"},
            "train": {"epochs": 10},
        }
    ).robust
    schedule = create_schedule(config, steps_per_epoch=100)

    def phases(name, steps, **settings):
        full = from_config_dict({"robust": {"method": name}, **settings})
        method = methods.create(None, full)
        return [int(method.phase(schedule(step))) for step in steps]

    assert phases("crown-ibp", (0, 100, 101, 299, 300, 999)) == [0, 0, 2, 2, 1, 1]
    assert phases("ibp", (100, 101, 300)) == [0, 2, 2]
    assert phases("natural", (300,)) == [0]
    # Regularizers that fall with the radius have phases of their own, the warm-up included.
    falling = {"regularizers": {"tightness": 0.5}}
    assert phases("ibp", (100, 101, 299, 300), **falling) == [3, 5, 5, 2]
    assert phases("crown-ibp", (100, 101, 300), **falling) == [3, 5, 1]
    # Where a regularizer needs the relaxation, interval bounds alone do not do.
    assert phases("crown-ibp", (300,), regularizers={"slack": 0.5}) == [2]
    split = {"adversary": {"split": 3}}
    assert phases("taps", (101, 299, 300), **split) == [1, 1, 2]


def test_options_change_of_a_configuration_what_they_name():
    config = from_config_dict(
        {
            "seed": 3,
            "robust": {"norm": "2", "eps_test": 0.4, "clip": False},
            "evaluation": {"methods": ("lmt", "bcp", "lmt"), "pgd_steps": 7, "pgd_restarts": 5},
        }
    )
    same = Options(pgd_steps=None, pgd_restarts=None).applied(config)
    assert differing_keys(config.to_dict(), same.to_dict()) == ["evaluation.methods"]
    assert same.evaluation.methods == ("lmt", "bcp")  # each once
    changed = Options(
        methods=("crown",), eps=0.0, norm="inf", clip=True, seed=0, batch_size=9, pgd_steps=0
    ).applied(config)
    assert (changed.seed, changed.robust.eps_test, changed.robust.norm) == (0, 0.0, "inf")
    assert changed.robust.clip
    assert changed.evaluation.methods == ("crown",)
    attack = (changed.evaluation.pgd_steps, changed.evaluation.pgd_restarts)
    assert (attack, changed.evaluation.batch_size) == ((0, 2), 9)


def test_radii_are_numbers_or_fractions():
    assert radius.parse("8/255") == 8 / 255
    assert radius.parse("0.0314") == 0.0314
    assert radius.parse("1e-2") == 0.01

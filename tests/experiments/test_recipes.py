"""Every experiment with every argument, and what the papers' recipes say, in literal values."""

import ast
import importlib
import json
import pathlib
import re

import numpy as np
import pytest

from boundjax.certification.presets import METHODS as CERTIFICATES
from experiments import configs, data, methods
from experiments.configs import common
from experiments.configs.recipes.datasets import PREPARATIONS
from experiments.settings.checks import from_config_dict
from experiments.settings.config import Config
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ExperimentError
from experiments.train.step import create_learning_rate, create_schedule

FOLDER = pathlib.Path(configs.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*_*.py") if path.stem != "__init__")
NETWORKS = {
    *("tiny", "mlp_2x100", "small", "small_star", "small_star_bn", "medium", "large"),
    *("large_star", "cnn7", "cnn7_tiny", "6c2f", "8c2f", "wrn", "wide_resnet"),
    *("graddiv_mnist", "small_star_leaky", "vgg16", "graddiv_stl10"),
    *("wide_resnet_tiny", "resnext", "resnext_tiny", *(f"family_{x}" for x in "abcdefghij")),
}
DATA = {"digits", "mnist", "cifar10", "svhn", "stl10", "tiny_imagenet"}
COMBINATIONS = [
    ("mnist_ibp", "cpu60,eps=0.2"),
    ("mnist_one_step", "eps=0.3,kappa=0,eps_train=same,steps=7"),
    ("cifar10_one_step", "eps=2,eps_train=1.1x,epochs=100"),
    ("cifar10_slopes", "slopes=random,epochs=400,kappa=0"),
    ("cifar10_slopes", "eps=2,eps_train=1.1x,epochs=100,kappa=1"),
    ("cifar10_slopes", "slopes=0-1,stability=10"),
    ("cifar10_l2", "method=ibp,net=wrn"),
    ("cifar10_bcp", "linf,net=4c3f"),
    ("mnist_tightness", "cpu,eps=0.3,net=small,projections=50,baseline"),
    ("mnist_tightness", "eps=0.3,net=xlarge,baseline"),
    ("mnist_tightness", "cap_adam,net=small,projections=50,baseline"),
    ("cifar10_tightness", "eps=8,net=large,cap_sgd,baseline"),
    ("mnist_families", "net=j,method=one-step,r,epochs=140"),
    ("mnist_families", "cpu,net=b,method=one-step"),
    ("mnist_families", "net=b,fused,epochs=140"),
    ("mnist_families", "net=c,method=fast"),
    ("mnist_short_warmup", "cpu,method=ibp"),
    ("mnist_short_warmup", "cpu,eps=0.3"),
    ("mnist_expressive", "eps=0.3,method=exp-ibp"),
    ("cifar10_expressive", "eps=8,method=cc-ibp"),
    ("mnist_ctbench", "eps=0.3,method=taps"),
    ("cifar10_ctbench", "eps=8,method=staps"),
    ("mnist_graddiv", "cpu,graddiv=none"),
    ("cifar10_graddiv", "defence=rse,graddiv=kappa"),
]


def _dict(name, variant=""):
    return importlib.import_module(f"experiments.configs.{name}").get_config(variant)


def _config(name, variant=""):
    return from_config_dict(_dict(name, variant))


def _arguments(name):
    """Every argument of a config alone, from the message that lists them."""
    with pytest.raises(ExperimentError) as caught:
        _dict(name, "?")
    listed = re.fullmatch(r"unknown argument '\?': this config has (.*)", str(caught.value))[1]
    for argument in listed.split(", ") if listed != "no arguments" else ():
        key, _, values = argument.partition("=")
        yield from (f"{key}={value}" for value in values.split("|")) if values else (key,)


def _epochs(config, *epochs, steps=10):
    """The weights at the beginning of these epochs."""
    schedule = create_schedule(config.robust, steps)
    return [schedule(round(epoch * steps)) for epoch in epochs]


def _radii(config, *epochs):
    return [float(weights.eps) for weights in _epochs(config, *epochs)]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_a_valid_run(name):
    result = ["", *_arguments(name), *(v for n, v in COMBINATIONS if n == name)]
    for variant in result:
        config = _config(name, variant)
        assert config.model.name in NETWORKS, variant
        assert config.data.name in DATA, variant
        assert config.robust.method in methods.METHODS, variant
        certificates = (*config.evaluation.methods, config.evaluation.selection_method)
        assert set(certificates) <= set(CERTIFICATES), variant
        end = config.robust.warmup_epochs + config.robust.ramp_epochs
        assert end < config.train.epochs, variant
        milestones = config.optim.milestones
        assert list(milestones) == sorted(set(milestones)), variant
        assert not milestones or milestones[-1] < config.train.epochs, variant
        assert config.robust.eps_test <= config.robust.eps_train, variant
        taps = methods.METHODS[config.robust.method].needs_split
        assert (config.adversary.split > 0) == taps, variant
        json.dumps(config.to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_but_the_defaults_changes_something(name):
    default = _config(name).to_dict()
    seen = {}
    for variant in _arguments(name):
        changed = differing_keys(default, _config(name, variant).to_dict())
        seen.setdefault(variant.partition("=")[0], []).append(bool(changed))
    for key, changes in seen.items():
        alone = [True] if len(changes) == 1 else [False] + [True] * (len(changes) - 1)
        # The default is listed first; digits_crown has a `cpu` that is the default.
        assert changes == alone or name == "digits_crown", key


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_the_commands(name):
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    commands = re.findall(rf"--config=experiments/configs/{name}\.py(?::(\S+))?", text)
    assert commands
    for variant in commands:
        _config(name, variant)
    assert re.search(r"not\s+run\s+yet|minute", text, flags=re.IGNORECASE)


def test_no_two_files_share_a_block():
    # The longest allowed common run is a call of a recipe and what stands around it.
    blocks = {}
    for path in sorted((*FOLDER.glob("*.py"), *FOLDER.glob("recipes/*.py"))):
        tree = ast.parse(path.read_text())
        for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
            statements = [
                ast.dump(inner)
                for inner in ast.walk(function)
                if isinstance(inner, ast.Assign | ast.AugAssign)
            ]
            for start in range(len(statements) - 3):
                blocks.setdefault(tuple(statements[start : start + 4]), set()).add(path.name)
    shared = [sorted(files) for files in blocks.values() if len(files) > 1]
    assert not shared


# ------------------------------------------------------------------------------ arguments


def test_arguments():
    choices = {"cpu": False, "eps": ("0.1", "0.2")}
    options = common.arguments("", **choices)
    assert (options.cpu, options.eps, options.texts) == (False, "0.1", ())
    options = common.arguments("eps=0.2,cpu", **choices)
    assert (options.cpu, options.eps, options.texts) == (True, "0.2", ("eps=0.2", "cpu"))
    assert common.arguments("").texts == ()


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ("gpu", "unknown argument 'gpu'"),
        ("eps=0.3", "unknown argument 'eps=0.3'"),
        ("eps", "unknown argument 'eps'"),
        ("eps=", "unknown argument 'eps='"),
        ("cpu=1", "unknown argument 'cpu=1'"),
        ("cpu,", "unknown argument ''"),
        ("cpu, eps=0.1", "unknown argument ' eps=0.1'"),
        ("cpu,cpu", "'cpu' is given twice"),
        ("eps=0.1,eps=0.2", "'eps' is given twice"),
    ],
)
def test_wrong_arguments_are_one_line_errors(variant, problem):
    with pytest.raises(ExperimentError) as caught:
        common.arguments(variant, cpu=False, eps=("0.1", "0.2"))
    assert str(caught.value) == f"{problem}: this config has cpu, eps=0.1|0.2"


def test_a_config_without_arguments_says_so():
    with pytest.raises(ExperimentError, match=r"unknown argument 'cpu': this config has no arg"):
        _dict("svhn_cap", "cpu")


@pytest.mark.parametrize(
    ("name", "variant", "one", "other"),
    [
        ("mnist_ibp", "cpu,kappa=0", "cpu", "kappa=0"),
        ("mnist_ibp", "cpu60,cpu", "cpu", "cpu60"),
        ("mnist_crown", "beta=0,cpu", "cpu", "beta=0"),
        ("cifar10_bcp", "linf,net=wrn", "linf", "net=wrn"),
        ("cifar10_lmt", "cpu,net=4c3f", "cpu", "net=4c3f"),
        ("mnist_tightness", "net=xlarge,projections=50", "net=xlarge", "projections=50"),
        ("mnist_families", "r,fused", "fused", "r"),
        ("mnist_tightness", "cpu,cap_adam", "cpu", "cap_adam"),
        ("mnist_families", "r,method=ibp", "method=ibp", "r"),
        ("mnist_families", "r,method=fast", "method=fast", "r"),
        ("mnist_families", "method=fast,epochs=140", "method=fast", "epochs=140"),
        ("mnist_families", "cpu,epochs=140", "cpu", "epochs=140"),
        ("mnist_short_warmup", "net=resnext,cpu", "cpu", "net=resnext"),
        ("stl10_graddiv", "defence=none,graddiv=dpp", "defence=none", "graddiv=dpp"),
    ],
)
def test_arguments_that_exclude_each_other(name, variant, one, other):
    with pytest.raises(ExperimentError) as caught:
        _dict(name, variant)
    assert str(caught.value) == f"{one!r} excludes {other!r}: leave one out"


def test_milestones_end_before_the_training():
    assert common.every(10, first=30, end=60) == (30.0, 40.0, 50.0)
    assert common.every(2.5, first=5, end=10.1) == (5.0, 7.5, 10.0)
    assert common.every(10, first=60, end=60) == ()


# ------------------------------------------------------------------------------ recipes


def test_runs_that_were_made_keep_their_settings():
    # The two-core runs of docs/results.md.
    ibp, crown = _config("mnist_ibp", "cpu"), _config("mnist_crown", "cpu")
    for config in (ibp, crown):
        assert (config.model.name, config.train.batch_size, config.data.validation) == (
            *("small_star", 128, 0),
        )
        assert (config.robust.eps_train, config.robust.eps_test) == (0.15, 0.1)
        assert (config.optim.lr, config.optim.factor) == (1e-3, 0.2)
        assert (config.evaluation.every, config.checkpoint.every) == (5, 200)
    assert (ibp.train.epochs, ibp.optim.milestones, ibp.robust.ramp_epochs) == (25, (18, 22), 6)
    assert (crown.train.epochs, crown.optim.milestones, crown.robust.ramp_epochs) == (
        *(16, (11, 14), 2),
    )
    for name in ("bcp", "lmt"):
        config = _config(f"mnist_{name}", "cpu")
        assert (config.train.epochs, config.optim.milestones) == (20, (12, 17))
        assert (config.robust.warmup_epochs, config.robust.ramp_epochs) == (1, 8)
        assert (config.robust.norm, config.robust.eps_train) == ("2", 1.58)


def test_family_a_with_ibp_differs_from_the_defaults_in_this_alone():
    expected = {
        "data": {"name": "mnist"},
        "model": {"name": "family_a"},
        "train": {"epochs": 100, "batch_size": 256},
        "optim": {"lr": 5e-4, "factor": 0.5, "milestones": (70, 80, 90)},
        "robust": {
            **{"method": "ibp", "eps_train": 0.4, "eps_test": 0.3, "kappa": (1, 0.5)},
            **{"warmup_epochs": 1, "ramp_epochs": 60},
        },
        "evaluation": {"methods": ("interval", "crown-ibp"), "pgd_steps": 100, "every": 5},
        "checkpoint": {"every": 1000},
    }
    assert _config("mnist_families", "net=a,method=ibp") == from_config_dict(expected)


def test_landscape_on_cifar10():
    config = _config("cifar10_one_step", "eps=2,kappa=0,steps=7")
    assert (config.model.name, config.train.epochs, config.train.batch_size) == ("medium", 400, 128)
    np.testing.assert_allclose(_radii(config, 20, 140, 260, 399), [0, 1 / 255, 2 / 255, 2 / 255])
    assert (config.robust.kappa, config.robust.beta) == ((0, 0), (1, 1))
    assert (config.relaxation.steps, config.relaxation.step_size) == (7, 0.1)
    rate = create_learning_rate(config.optim, 10)
    result = [float(rate(10 * epoch)) for epoch in (0, 269, 270, 280, 390, 399)]
    np.testing.assert_allclose(result, 3e-4 / 2.0 ** np.array([0, 0, 1, 2, 13, 13]), rtol=1e-5)
    assert (config.augment.flip, config.augment.crop, config.augment.border) == (True, 4, "zeros")
    assert config.model.mean == config.model.std == ()
    wider = _config("cifar10_one_step", "eps=2,eps_train=1.1x")
    np.testing.assert_allclose(255 * wider.robust.eps_train, 2.2)


def test_landscape_on_mnist_and_svhn():
    for eps, eps_train in (("0.1", 0.2), ("0.2", 0.3), ("0.3", 0.4), ("0.4", 0.4)):
        assert _config("mnist_ibp", f"eps={eps}").robust.eps_train == eps_train
        assert _config("mnist_ibp", f"eps={eps},eps_train=same").robust.eps_train == float(eps)
    large = _config("mnist_one_step")
    assert (large.optim.lr, large.optim.factor, large.optim.milestones) == (5e-4, 0.1, (130, 190))
    assert (large.robust.kappa, large.robust.beta) == ((1, 0), (1, 1))
    assert (large.robust.schedule, large.evaluation.selection_method) == ("linear", "one-step")
    cap = _config("mnist_cap")
    assert (cap.model.name, cap.train.batch_size) == ("large_star", 32)
    assert (cap.robust.kappa, cap.relaxation.projections) == ((0, 0), 50)
    svhn = _config("svhn_one_step")
    assert (svhn.model.name, svhn.train.batch_size) == ("large", 80)
    assert _config("svhn_ibp").train.batch_size == 128
    assert (svhn.augment.flip, svhn.augment.crop) == (False, 4)
    assert svhn.model.std == (0.1980, 0.2010, 0.1970)
    np.testing.assert_allclose(_radii(svhn, 10, 70, 130), [0, 0.005, 0.01], rtol=1e-6)


def test_slopes():
    config = _config("cifar10_slopes", "slopes=0.5-1")
    assert config.robust.method == "pq-slopes"
    assert (config.relaxation.p, config.relaxation.q) == (0.5, 1)
    assert _config("cifar10_slopes", "slopes=random").robust.method == "random-slopes"
    # The settings of the paper's figures.
    default = _config("cifar10_slopes")
    assert (default.robust.method, default.train.epochs, default.optim.lr) == ("cap-ibp", 200, 1e-3)
    assert (default.robust.kappa, default.robust.beta) == ((0, 0), (1, 1))
    assert (default.robust.warmup_epochs, default.robust.ramp_epochs) == (10, 120)
    np.testing.assert_allclose(255 * default.robust.eps_test, 8)
    # One-step slopes by the same settings, the last column of that table.
    ours = _config("cifar10_one_step", "epochs=200,kappa=0").to_dict()
    changed = differing_keys(default.to_dict(), ours)
    assert changed == ["robust.method"]
    stable = _config("cifar10_slopes", "slopes=0-1,stability=10")
    assert (stable.relaxation.q, stable.regularizers.relu_stability) == (1, 10)
    first_look = _config("cifar10_slopes", "eps=2,epochs=100,kappa=1")
    assert (first_look.robust.kappa, first_look.optim.lr) == ((1, 0), 3e-4)
    np.testing.assert_allclose(255 * first_look.robust.eps_train, 2)


def test_stairs_of_the_tightness_regularizers():
    config = _config("mnist_tightness", "eps=0.3,net=small,projections=50")
    stairs = np.linspace(0.01, 0.3, 20)
    np.testing.assert_allclose(_radii(config, 0, 0.9, 1, 18, 19, 79), stairs[[0, 0, 1, 18, 19, 19]])
    assert (config.regularizers.gap, config.regularizers.slack) == (2e-3, 0.2)
    assert config.optim.milestones == (30, 40, 50, 60, 70)
    mlp = _config("mnist_tightness").regularizers
    assert (mlp.gap, mlp.slack) == (2e-3, 1)
    plain = _config("mnist_tightness", "baseline").regularizers
    assert (plain.gap, plain.slack) == (0, 0)
    large = _config("mnist_tightness", "eps=0.3,net=xlarge")
    assert (large.robust.method, large.model.name) == ("crown-ibp", "large")
    assert (large.robust.eps_train, large.regularizers.slack) == (0.4, 0.5)
    own = _config("mnist_tightness", "cap_adam,baseline")
    assert (own.optim.name, own.optim.lr, own.train.epochs) == ("adam", 1e-3, 60)
    assert own.optim.milestones == (30, 40, 50)
    two_cores = _config("mnist_tightness", "cpu")
    assert (two_cores.train.epochs, two_cores.optim.milestones) == (30, (13, 18, 23, 28))


def test_tightness_on_cifar10():
    config = _config("cifar10_tightness", "eps=8,cap_sgd")
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("sgd", 0.05, 5e-4)
    assert (config.optim.clip_norm, config.train.epochs) == (1, 60)
    np.testing.assert_allclose(_radii(config, 0, 19), [0.001, 8 / 255], rtol=1e-6)
    assert config.model.std == (0.225, 0.225, 0.225)
    large = _config("cifar10_tightness", "eps=8,net=xlarge")
    np.testing.assert_allclose(255 * large.robust.eps_train, 8.8)
    assert (large.train.epochs, large.optim.milestones) == (3200, (2600, 3040))


def test_families():
    config = _config("mnist_families", "net=b,r,epochs=140")
    assert config.optim.milestones == (80, 100, 120)
    start, middle, end = _epochs(config, 1, 31, 61)
    np.testing.assert_allclose([start.eps, middle.eps, end.eps], [0, 0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose([middle.kappa, end.kappa, end.beta], [0.75, 0.5, 0], atol=1e-6)
    assert config.regularizers.slack == 0.5
    assert _config("mnist_families", "fused").relaxation.fused
    fast = _config("mnist_families", "net=b,method=fast")
    assert (fast.model.name, fast.model.init, fast.robust.method) == ("family_b", "ibp", "ibp")
    assert (fast.train.epochs, fast.optim.milestones) == (70, (50, 60))
    assert (fast.robust.eps_train, fast.robust.eps_test, fast.robust.kappa) == (0.4, 0.3, (0, 0))
    assert (fast.regularizers.tightness, fast.regularizers.relu_balance) == (0.5, 0.5)
    two_cores = _config("mnist_families", "cpu,method=one-step")
    assert (two_cores.train.epochs, two_cores.optim.milestones) == (60, (42, 48, 54))
    assert (two_cores.robust.warmup_epochs, two_cores.robust.ramp_epochs) == (1, 20)


def test_short_warmup():
    config = _config("cifar10_short_warmup", "epochs=70")
    assert (config.robust.method, config.model.init) == ("ibp", "ibp")
    assert (config.regularizers.tightness, config.regularizers.relu_balance) == (0.5, 0.5)
    assert (config.optim.clip_norm, config.optim.milestones) == (10, (50, 60))
    assert (config.robust.kappa, config.robust.schedule) == ((0, 0), "smoothed")
    result = np.array(_radii(config, 1, 6, 11, 21)) * 255 / 8
    np.testing.assert_allclose(result, [0, 0.076923, 0.384615, 1], rtol=1e-5)
    assert (config.augment.crop, config.augment.border) == (2, "edge")
    vanilla = _config("cifar10_short_warmup", "method=ibp")
    assert (vanilla.model.init, vanilla.regularizers) == ("fan_in", Config().regularizers)
    for parts, result in (
        ("init", ("ibp", 0, 0)),
        ("init+tightness", ("ibp", 0.5, 0)),
        ("init+relu", ("ibp", 0, 0.5)),
        ("regularizers", ("fan_in", 0.5, 0.5)),
    ):
        part = _config("cifar10_short_warmup", f"parts={parts}")
        weights = (part.regularizers.tightness, part.regularizers.relu_balance)
        assert (part.model.init, *weights) == result
    fused = _config("cifar10_short_warmup", "method=crown-ibp")
    assert (fused.relaxation.fused, fused.robust.beta) == (True, (1, 0))
    tiny = _config("tiny_imagenet_short_warmup", "net=resnext")
    assert (tiny.model.name, tiny.regularizers.tightness) == ("resnext_tiny", 0.2)
    assert tiny.robust.eps_test == 1 / 255
    small = _config("mnist_short_warmup", "cpu")
    assert (small.model.name, small.train.epochs) == ("small_star_bn", 30)
    assert (small.robust.eps_train, small.robust.eps_test) == (0.2, 0.1)
    assert (small.robust.warmup_epochs, small.robust.ramp_epochs) == (0, 12)
    assert (small.optim.lr, small.optim.milestones) == (1e-3, (20, 26))
    wider = _config("mnist_short_warmup", "cpu,eps=0.3")
    assert (wider.model.name, wider.train.epochs) == ("small_star_bn", 30)
    for config, eps_train, eps_test in (
        (wider, 0.4, 0.3),
        (_config("mnist_short_warmup"), 0.4, 0.4),
        (_config("mnist_short_warmup", "eps=0.3"), 0.4, 0.3),
        (_config("mnist_short_warmup", "cpu,eps=0.1"), 0.2, 0.1),
    ):
        assert (config.robust.eps_train, config.robust.eps_test) == (eps_train, eps_test)


def test_ctbench():
    config = _config("mnist_ctbench")
    assert (config.robust.method, config.robust.eps_train) == ("ibp", 0.2)
    np.testing.assert_allclose(config.robust.kappa, 0.3)
    assert (config.regularizers.l1, config.regularizers.tightness) == (2e-6, 0.5)
    assert (config.model.init, config.evaluation.precise_bn) == ("ibp", True)
    taps = _config("mnist_ctbench", "eps=0.3,method=taps")
    assert (taps.adversary.split, taps.adversary.taps_scale) == (13, 4)
    np.testing.assert_allclose(taps.robust.eps_train, 0.4)
    sabr = _config("cifar10_ctbench", "method=sabr")
    assert (sabr.adversary.box, sabr.train.epochs) == (0.1, 160)
    np.testing.assert_allclose(sabr.robust.eps_train, 0.011764, rtol=1e-4)
    mtl = _config("cifar10_ctbench", "method=mtl-ibp")
    assert (mtl.adversary.alpha, mtl.adversary.scale) == (0.01, 2)
    assert (mtl.adversary.steps, mtl.adversary.step_size) == (1, 2)
    eight = _config("cifar10_ctbench", "eps=8,method=crown-ibp")
    assert (eight.train.epochs, eight.robust.ramp_epochs) == (240, 120)
    assert (eight.optim.milestones, eight.robust.beta) == ((200, 220), (1, 1))
    assert _config("tiny_imagenet_ctbench", "method=sabr").adversary.box == 0.4


# Weight of the interval bounds, l1 norm, epochs, attack steps, radii of attack and training in
# terms of the test radius.
EXPRESSIVE = {
    ("mnist", "eps=0.1,method=mtl-ibp"): (0.01, 1e-5, 70, 1, 1, 2),
    ("mnist", "eps=0.1,method=cc-ibp"): (0.1, 2e-6, 70, 1, 1, 2),
    ("mnist", "eps=0.3,method=mtl-ibp"): (0.08, 1e-6, 70, 1, 1, 4 / 3),
    ("mnist", "eps=0.3,method=cc-ibp"): (0.3, 3e-6, 70, 1, 1, 4 / 3),
    ("cifar10", "eps=2,method=mtl-ibp"): (4e-3, 3e-6, 160, 8, 2.1, 1),
    ("cifar10", "eps=2,method=cc-ibp"): (0.01, 3e-6, 160, 8, 2.1, 1),
    ("cifar10", "eps=2,method=exp-ibp"): (0.095, 4e-6, 160, 8, 2.1, 1),
    ("cifar10", "eps=8,method=mtl-ibp"): (0.5, 1e-7, 260, 1, 1, 1),
    ("cifar10", "eps=8,method=exp-ibp"): (0.5, 0, 260, 1, 1, 1),
    ("tiny_imagenet", "method=mtl-ibp"): (0.01, 5e-5, 160, 1, 1, 1),
    ("tiny_imagenet", "method=exp-ibp"): (0.04, 5e-5, 160, 1, 1, 1),
}


@pytest.mark.parametrize(("data", "variant"), EXPRESSIVE)
def test_expressive_losses_as_in_their_own_paper(data, variant):
    config = _config(f"{data}_expressive", variant)
    adversary, robust = config.adversary, config.robust
    assert robust.method == variant.rpartition("=")[2]
    result = (adversary.alpha, config.regularizers.l1, config.train.epochs, adversary.steps)
    ratio = robust.eps_train / robust.eps_test
    np.testing.assert_allclose(
        (*result, adversary.scale, ratio), EXPRESSIVE[data, variant], rtol=1e-6
    )
    assert (robust.kappa, adversary.restarts) == ((0, 0), 1)
    assert config.regularizers.tightness == (0.2 if data == "tiny_imagenet" else 0.5)
    if config.train.epochs == 260:
        assert config.optim.milestones == (180, 220)
        assert (robust.warmup_epochs, robust.ramp_epochs) == (1, 80)


def test_ctbench_takes_what_it_has_no_recipe_for_from_that_paper():
    for eps in ("2", "8"):
        variant = f"eps={eps},method=cc-ibp"
        theirs = _config("cifar10_ctbench", variant).to_dict()
        own = _config("cifar10_expressive", variant).to_dict()
        assert differing_keys(theirs, own) == ["evaluation.precise_bn"]
    # It has one of MTL-IBP.
    assert _config("cifar10_ctbench", "eps=8,method=mtl-ibp").adversary.alpha == 0.6


def test_relu_stability():
    config = _config("mnist_relu_stability")
    assert (config.robust.method, config.model.name) == ("pgd", "small_star")
    assert (config.regularizers.relu_stability, config.regularizers.l1) == (1e-4, 2e-5)
    assert (config.robust.eps_train, config.adversary.steps, config.optim.lr) == (0.1, 8, 1e-4)
    np.testing.assert_allclose(_radii(config, 0, 25, 50, 99), [0, 0.05, 0.1, 0.1], rtol=1e-6)
    wide = _config("cifar10_relu_stability", "eps=8")
    assert (wide.regularizers.relu_stability, wide.regularizers.l1) == (2e-3, 1e-5)
    np.testing.assert_allclose(255 * wide.robust.eps_test, 8)


def test_tiny_imagenet_in_l2():
    config = _config("tiny_imagenet_bcp")
    assert (config.model.name, config.optim.name, config.optim.lr) == ("8c2f", "sgd", 1e-3)
    assert (config.train.batch_size, config.optim.weight_decay) == (5, 2e-4)
    assert (config.robust.warmup_epochs, config.robust.ramp_epochs) == (2, 50)
    assert config.optim.milestones == (50, 70, 90)
    ibp = _config("tiny_imagenet_l2")
    assert (ibp.robust.method, ibp.robust.norm, ibp.model.name) == ("ibp", "2", "8c2f")
    assert ibp.evaluation.methods == ("interval",)
    linf = _config("cifar10_l2", "method=ibp,linf")
    assert (linf.robust.norm, linf.model.name) == ("inf", "medium")
    np.testing.assert_allclose(255 * linf.robust.eps_test, 8)


@pytest.mark.parametrize("preparation", PREPARATIONS.values(), ids=list(PREPARATIONS))
def test_a_preparation_has_one_mean_and_deviation_per_channel_or_none(preparation):
    channels = data.DATASETS[preparation.name].shape[-1]
    assert len(preparation.mean) == len(preparation.std)
    assert len(preparation.mean) in (0, channels)
    assert all(0 < value < 1 for value in (*preparation.mean, *preparation.std))

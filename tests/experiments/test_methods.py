"""Every training method of the table: it learns, it resumes, and its losses are the papers'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax import training
from experiments import data, methods, models
from experiments.methods.method import Batch, Coefficients
from experiments.records.checkpoints import Checkpoints
from experiments.settings.checks import from_config_dict
from experiments.settings.config import DataConfig
from experiments.settings.errors import ExperimentError
from experiments.train.step import (
    create_optimizer,
    create_schedule,
    create_state,
    create_train_step,
)
from experiments.train.variables import nothing_selected

NETWORKS = {
    "test_mlp": {"hidden": (12, 10)},
    # Convolutions over the whole image and of one pixel, both normalised.
    "test_conv": {
        "convolutions": (models.Convolution(12, 8, 1, 0), models.Convolution(10, 1, 1, 0)),
        "batch_norm": True,
    },
}
EPS = 0.05
# Little noise, and a prior that 64 images are not drawn to.
GAUSSIAN = {"prior_std": 0.3, "initial_std": 0.02, "kl": 0.002}
# What a method needs beside its name.
SETTINGS = {
    "cap, projected": {"robust": {"method": "cap"}, "relaxation": {"projections": 8}},
    "crown-ibp, fused": {"robust": {"method": "crown-ibp"}, "relaxation": {"fused": True}},
    "crown-ibp, slack": {
        "robust": {"method": "crown-ibp"},
        "regularizers": {"slack": 0.5, "gap": 0.01},
    },
    "one-step, 7 steps": {
        "robust": {"method": "one-step"},
        "relaxation": {"steps": 7, "step_size": 0.1},
    },
    "short warm-up": {
        "robust": {"method": "ibp"},
        "regularizers": {"tightness": 0.5, "relu_balance": 0.5, "l1": 1e-5},
        "model": {"init": "ibp"},
    },
    "relu stability": {
        "robust": {"method": "pgd"},
        "regularizers": {"relu_stability": 0.01},
    },
    "lmt": {"robust": {"norm": "2"}},
    "bcp": {"robust": {"norm": "2"}},
    "taps": {"adversary": {"split": 4}},
    "staps": {"adversary": {"split": 4, "box": 0.5}},
    "rse": {"model": {"name": "test_conv"}, "random": {"noise": (0.1, 0.05)}},
    "adv-bnn": {"random": GAUSSIAN},
    "adv-bnn, graddiv": {
        "robust": {"method": "adv-bnn"},
        "random": GAUSSIAN,
        "diversity": {"weight": 0.02, "measure": "mean"},
    },
}
NAMES = [*methods.METHODS, *(name for name in SETTINGS if name not in methods.METHODS)]


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    for name, network in NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def _config(name, **groups):
    settings = {
        "data": {"name": "digits"},
        "model": {"name": "test_mlp"},
        "train": {"epochs": 10, "batch_size": 64},
        "optim": {"lr": 1e-2, "clip_norm": 10.0},
        "robust": {
            "method": name,
            "eps_train": EPS,
            "eps_test": EPS,
            "ramp_epochs": 0.0,
            "kappa": (0.5, 0.25),
            "beta": (0.5, 0.5),
        },
        "adversary": {"steps": 2},
    }
    for source in (SETTINGS.get(name, {}), groups):
        for group, values in source.items():
            settings[group] = settings.get(group, {}) | values
    return from_config_dict(settings)


def _batch():
    train = data.load(DataConfig(name="digits")).train.take(slice(64))
    return Batch(jnp.asarray(train.images), jnp.asarray(train.labels))


def _prepared(config, step=0):
    """The state and the compiled step that is due after `step` steps."""
    model = models.from_config(config.model, config.random)
    method = methods.create(model, config, images=64)
    optimizer = create_optimizer(config.optim, 10)
    schedule = create_schedule(config.robust, 10)
    key = jax.random.key(config.seed)
    state = create_state(method, model, optimizer, (8, 8, 1), key)
    state["step"] = state["step"] + step
    objective = method.objectives[int(method.phase(schedule(step)))]
    return state, jax.jit(create_train_step(model, objective, optimizer, schedule, 10, key))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sampled(6)
def test_a_method_lowers_its_robust_loss_and_resumes(name, tmp_path):
    # So small that more is learned than how frequent the classes are, which is worth 2 to 4 %.
    config = _config(name, robust={"eps_train": 0.01, "eps_test": 0.01})
    state, train_step = _prepared(config)
    batch = _batch()
    losses = []
    for step in range(24):
        if step == 20:
            with Checkpoints(tmp_path, config) as checkpoints:
                checkpoints.save(step, state, nothing_selected(state, False), 0.0)
        state, metrics = train_step(state, *batch)
        losses.append(float(metrics["robust_loss"]))
    assert np.isfinite(losses).all()
    # Of means, because attacks, slopes and projections are drawn anew at every step.
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    assert 0.0 <= float(metrics["standard_error"]) <= float(metrics["verified_error"]) <= 1.0

    # Killed after the checkpoint, in another process as it were: the same to the last bit.
    again, _ = _prepared(config)
    with Checkpoints(tmp_path, config) as checkpoints:
        again, _, _ = checkpoints.restore(again, nothing_selected(again, False))
    for _ in range(4):
        again, _ = train_step(again, *batch)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def _outcome(name, weights, **groups):
    """An untrained network's parameters, what its objective says, and the gradient."""
    config = _config(name, **groups)
    model = models.from_config(config.model)
    method = methods.create(model, config)
    batch = _batch()
    params = model.init(jax.random.key(1), batch.images)["params"]
    weights = Coefficients(*(jnp.float32(value) for value in weights))
    objective = method.objectives[int(method.phase(weights))]

    def loss(params):
        return objective(params, {"batch_stats": {}}, batch, weights, jax.random.key(2))

    (value, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return params, batch, float(value), outcome, gradient, jax.jit(lambda p: loss(p)[0])


def _numpy_bounds(params, images, labels, eps):
    """Merged interval margins `[B, 9]`, clean margins, logits and pre-activations in float64."""
    layers = [params[f"Dense_{index}"] for index in range(3)]
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in layers]
    biases = [np.asarray(layer["bias"], np.float64) for layer in layers]
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    lower, upper, clean = np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1), x
    met = []
    for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
        center, radius = (lower + upper) / 2 @ kernel + bias, (upper - lower) / 2 @ np.abs(kernel)
        met.append((center - radius, center + radius))
        lower, upper = (np.maximum(center + s * radius, 0) for s in (-1, 1))
        clean = np.maximum(clean @ kernel + bias, 0)
    others = (np.asarray(labels)[:, None] + 1 + np.arange(9)) % 10
    kernel = kernels[-1][:, labels].T[:, None] - kernels[-1].T[others]  # [B, 9, h]
    bias = biases[-1][labels][:, None] - biases[-1][others]

    def product(values, weights):
        return np.einsum("bh,bmh->bm", values, weights)

    center, radius = (lower + upper) / 2, (upper - lower) / 2
    margins = product(center, kernel) - product(radius, np.abs(kernel)) + bias
    return margins, product(clean, kernel) + bias, met


def _robust_ce(margins):
    return np.log1p(np.exp(-margins).sum(axis=-1))


WEIGHTS = (EPS, 0.25, 0.5, 0.4)  # eps, kappa, beta, ramp


@pytest.mark.parametrize(
    ("name", "combine", "groups"),
    [
        ("ibp", lambda ibp, clean: _robust_ce(ibp), {}),
        ("mtl-ibp", lambda ibp, clean: 0.3 * _robust_ce(ibp) + 0.7 * _robust_ce(clean), {}),
        ("cc-ibp", lambda ibp, clean: _robust_ce(0.3 * ibp + 0.7 * clean), {}),
        ("exp-ibp", lambda ibp, clean: _robust_ce(ibp) ** 0.3 * _robust_ce(clean) ** 0.7, {}),
        ("pgd", lambda ibp, clean: _robust_ce(clean), {}),
        ("sabr", lambda ibp, clean: _robust_ce(ibp), {"adversary": {"box": 1.0, "steps": 0}}),
    ],
)
@pytest.mark.sampled(4)
def test_objectives_are_what_numpy_says(name, combine, groups):
    # An attack of no steps leaves the images as they are.
    adversary = {"alpha": 0.3, "steps": 0, **groups.get("adversary", {})}
    result = _outcome(name, WEIGHTS, adversary=adversary)
    params, batch, value, outcome, gradient, loss = result
    ibp, clean, met = _numpy_bounds(params, batch.images, batch.labels, EPS)
    robust = np.mean(combine(ibp, clean))
    expected = 0.25 * np.mean(_robust_ce(clean)) + 0.75 * robust
    assert value == pytest.approx(expected, rel=1e-4)
    assert float(outcome.metrics["robust_loss"]) == pytest.approx(robust, rel=1e-4)
    total = sum(low.size for low, _ in met)
    unstable = sum(((low < 0) & (up > 0)).sum() for low, up in met) / total
    assert float(outcome.metrics["unstable_relus"]) == pytest.approx(unstable, abs=1e-5)
    # The gradient against the difference along it.
    length = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))
    ends = [
        float(loss(jax.tree.map(lambda p, g, s=s: p + s * g, params, gradient)))
        for s in (1e-2, -1e-2)
    ]
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(length, rel=0.05)


def test_regularizers_come_in_with_their_schedules():
    plain = _outcome("ibp", WEIGHTS)
    weights = {"tightness": 0.5, "relu_balance": 0.3, "l1": 0.01, "relu_stability": 0.2}
    params, batch, value, *_ = _outcome("ibp", WEIGHTS, regularizers=weights)
    _, _, met = _numpy_bounds(params, batch.images, batch.labels, EPS)
    intervals = {str(index): training_interval(low, up) for index, (low, up) in enumerate(met)}
    images = np.asarray(batch.images)
    around = training_interval(np.clip(images - EPS, 0, 1), np.clip(images + EPS, 0, 1))
    expected = (
        plain[2]
        + 0.6 * 0.5 * float(training.tightness_loss(around, intervals))
        + 0.6 * 0.3 * float(training.relu_balance_loss(intervals))
        + 0.2 * float(training.relu_stability_loss(intervals))
        + 0.01 * float(training.l1_norm(params))
    )
    assert value == pytest.approx(expected, rel=1e-4)
    # Widths are compared with those that the first weights see.
    scaled = {"model": {"mean": (0.0,), "std": (0.25,)}}
    without = _outcome("ibp", WEIGHTS, **scaled)[2]
    params, _, value, *_ = _outcome("ibp", WEIGHTS, **scaled, regularizers={"tightness": 0.5})
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"] / 0.25
    _, _, met = _numpy_bounds(params, batch.images, batch.labels, EPS)
    intervals = {str(index): training_interval(low, up) for index, (low, up) in enumerate(met)}
    normalised = training_interval(around.lower / 0.25, around.upper / 0.25)
    term = 0.6 * 0.5 * float(training.tightness_loss(normalised, intervals))
    assert value - without == pytest.approx(term, rel=1e-3)
    # In the warm-up the loss is natural, and the bounds are those of a tiny radius.
    warmup = (0.0, 0.0, 1.0, 0.0)
    *_, natural, first, _, _ = _outcome("ibp", warmup, regularizers={"tightness": 0.5})
    assert 0 <= natural - float(first.metrics["natural_loss"]) <= 0.5 + 1e-5
    assert natural > float(first.metrics["natural_loss"])


def training_interval(lower, upper):
    import boundjax as bj

    return bj.Interval(jnp.asarray(lower, jnp.float32), jnp.asarray(upper, jnp.float32))


@pytest.mark.slow
def test_relaxations_are_ordered_as_their_bounds_are():
    # At beta = 1 on one untrained network: IBP is loosest, and one step of the slopes better than
    # the random slopes that it starts from.
    weights = (EPS, 0.0, 1.0, 1.0)
    robust = {"beta": (1.0, 1.0)}
    loss = {
        name: float(_outcome(name, weights, robust=robust | extra)[3].metrics["robust_loss"])
        for name, extra in (
            ("ibp", {}),
            ("crown-ibp", {}),
            ("one-step", {}),
            ("random-slopes", {}),
            ("cap", {}),
            ("crown-ibp, fused", {"method": "crown-ibp"}),
        )
    }
    assert loss["one-step"] < loss["random-slopes"] < loss["ibp"]
    assert max(loss["crown-ibp"], loss["crown-ibp, fused"], loss["cap"]) < loss["ibp"]


def test_beta_mixes_the_margins():
    robust = {"beta": (1.0, 1.0)}
    both = [
        float(_outcome("crown-ibp", (EPS, 0.0, beta, 1.0), robust=robust)[2])
        for beta in (1e-7, 0.5, 1.0)
    ]
    ibp = float(_outcome("ibp", (EPS, 0.0, 0.0, 1.0))[2])
    assert both[0] == pytest.approx(ibp, rel=1e-4)
    assert both[0] > both[1] > both[2]


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("sabr", {"robust": {"norm": "2"}}, r"'sabr' needs robust\.norm='inf', got '2'$"),
        ("taps", {"adversary": {"split": 0}}, r"'taps' needs adversary\.split"),
        ("ibp", {"regularizers": {"slack": 0.5}}, r"gap and \.slack need one of crown-ibp"),
        (
            "crown-ibp",
            {"relaxation": {"fused": True}, "regularizers": {"gap": 0.5}},
            r"^regularizers\.gap and \.slack need one of crown-ibp, one-step, cap-ibp, "
            r"random-slopes, pq-slopes, cap \(not fused\), got robust\.method='crown-ibp'$",
        ),
        ("natural", {"regularizers": {"l1": 0.5}}, r"l1 needs a method that trains on intervals"),
        ("bcp", {"regularizers": {"tightness": 0.5}}, r"tightness needs a method that trains on"),
    ],
)
def test_settings_that_a_method_has_nothing_to_do_with(name, groups, message):
    with pytest.raises(ExperimentError, match=message):
        methods.create(None, _config(name, **groups))


def test_sgd_momentum_and_weight_decay():
    config = dataclasses.replace(
        _config("natural").optim,
        name="sgd",
        lr=0.1,
        momentum=0.5,
        weight_decay=0.2,
        clip_norm=0.0,
        milestones=(),
    )
    optimizer = create_optimizer(config, 10)
    params = {"w": jnp.asarray([1.0, -2.0])}
    state = optimizer.init(params)
    gradient = {"w": jnp.asarray([0.5, 1.0])}
    first, state = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(first["w"], -0.1 * (gradient["w"] + 0.2 * params["w"]), rtol=1e-6)
    second, _ = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(second["w"], 1.5 * first["w"], rtol=1e-6)

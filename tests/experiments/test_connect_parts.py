"""The parts of a curve between two runs: its objective, losses of networks, the verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connected import EPS, connected_config, tiny_networks

from boundjax.diagnostics import bezier
from experiments.connectivity.connect import verdict
from experiments.connectivity.curve import on_curve, prepare_curve, target
from experiments.connectivity.points import Measurement
from experiments.methods import Batch
from experiments.records.connection import LOSSES
from experiments.settings.errors import ContradictionError, ExperimentError
from experiments.train.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def _tiny_networks():
    with tiny_networks():
        yield


def test_the_loss_of_a_control_point_is_that_of_a_network_on_the_curve():
    prepared = prepare(connected_config())
    objective = prepared.method.objectives[-1]
    start, control, end = (prepared.initial_state(seed)["params"] for seed in range(3))
    images, labels = (jnp.asarray(part[:16]) for part in prepared.splits.train)
    batch, key = Batch(images, labels), jax.random.key(5)
    coefficients = target(prepared.config.robust)
    collections = {"batch_stats": {}, "start": start, "end": end}
    of_curve = jax.jit(jax.value_and_grad(on_curve(objective), has_aux=True))
    (loss, outcome), gradient = of_curve(control, collections, batch, coefficients, key)
    t = jax.random.uniform(jax.random.split(key)[0])
    point = bezier(t, start, control, end)
    (expected, _), of_network = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        point, {"batch_stats": {}}, batch, coefficients, key
    )
    assert 0.05 < t < 0.95
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert outcome.metrics["loss"] == loss
    scaled = jax.tree.map(lambda leaf: 2 * t * (1 - t) * leaf, of_network)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, scaled
    )


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "one-step"])
def test_the_loss_is_that_of_the_method_at_the_final_radius(method):
    config = connected_config(robust={"method": method, "ramp_epochs": 0.0, "beta": (1.0, 1.0)})
    prepared = prepare(config)
    curve = prepare_curve(prepared)
    assert curve.phases.tolist() == [0] * prepared.total_steps
    for step in (0, 7):
        expected = {"eps": EPS, "kappa": 0.0, "beta": 1.0, "ramp": 1.0}
        values = {k: float(v) for k, v in curve.schedule(step)._asdict().items()}
        assert values == pytest.approx(expected)
    assert int(prepared.method.phase(curve.schedule(0))) == 2  # neither natural nor IBP alone


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("interval loss", np.inf, ExperimentError, "the interval loss must be finite along the pa"),
        ("one-step loss", np.nan, ExperimentError, "the one-step loss must be finite along the pa"),
        ("one-step verified", True, ContradictionError, "image 1 is verified but misclassified"),
    ],
)
def test_losses_that_mean_nothing(name, value, error, message):
    prepared = prepare(connected_config())
    measure = Measurement(prepared, prepared.splits.test.take(slice(4)))
    values = {f"{loss} loss": np.ones(2, np.float32) for loss in LOSSES}
    values |= {f"{loss} verified": np.zeros(2, bool) for loss in LOSSES}
    values["correct"] = np.array([True, False])
    measure._of_batch = lambda *_: values
    assert measure({})["one-step"] == {"loss": 1.0, "spread": 0.0, "verified_error": 1.0}
    values[name] = values[name].copy()
    values[name][1] = value
    with pytest.raises(error, match=message):
        measure({})


@pytest.mark.parametrize(
    ("barrier", "text"),
    [
        (
            {"exists": True, "height": 0.5, "loss": 2.0, "ends": [1.5, 1.0]},
            "barrier under the interval loss: at t = 0.250 it is 2.0000, at the ends 1.5000 and "
            "1.0000, so it rises above both by 0.5000, more than twice its spread over batches "
            "(0.1000)",
        ),
        (
            {"exists": False, "height": 0.125, "loss": 1.625, "ends": [1.5, 1.0]},
            "no barrier under the interval loss: at t = 0.250 it is 1.6250, at the ends 1.5000 and "
            "1.0000, so it rises above both by 0.1250, no more than twice its spread over batches "
            "(0.1000)",
        ),
        (
            {"exists": False, "height": 0.0, "loss": 1.5, "ends": [1.5, 1.0]},
            "no barrier under the interval loss: nowhere along the curve is it above the ends, "
            "1.5000 and 1.0000",
        ),
    ],
)
def test_the_verdict_is_one_line(barrier, text):
    barriers = {"curve": {"interval": {"t": 0.25, "spread": 0.1, **barrier}}}
    assert verdict({"trained_on": "interval", "barriers": barriers}) == text

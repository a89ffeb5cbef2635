"""Every training objective on a two-layer net: its value in NumPy, its gradient by differences."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain_objectives as plain
import pytest

from experiments import methods, models
from experiments.methods.method import Batch, Coefficients, one_example
from experiments.settings.checks import from_config_dict
from experiments.settings.config import ModelConfig

IMAGE, CLASSES = (2, 2, 1), 3
TWO_LAYERS, THREE_LAYERS = (5,), (5, 4)
WEIGHTS = Coefficients(eps=0.1, kappa=0.3, beta=0.6, ramp=0.4)
AFTER_RAMP = WEIGHTS._replace(ramp=1.0)
WARM_UP = WEIGHTS._replace(eps=0.0, ramp=0.0)
STEP = 1e-6


class Case(NamedTuple):
    """A method's robust loss of one image, and the configuration that it is tried with.

    `estimated`: the gradient is no derivative. `rel`: how exact differences are. `seed`: of the
    weights and images.
    """

    loss_of: Callable[[plain.Image], plain.Found]
    method: str
    groups: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    hidden: tuple[int, ...] = TWO_LAYERS
    weights: Coefficients = WEIGHTS
    estimated: bool = False
    rel: float = 1e-6
    seed: int = 27


def _attack(**changed):
    adversary = {"steps": 3, "step_size": 0.4, "scale": 1.2, "alpha": 0.3, "box": 0.3}
    return {"adversary": adversary | {"taps_scale": 3.0} | changed}


FALLING = {"tightness": 0.5, "relu_balance": 0.3, "tau": 0.9}
NORMALISED = {"model": {"mean": (0.4,), "std": (0.7,)}}
REG = {"regularizers": {"gap": 0.3, "slack": 0.5}}
L2, L2_UNCLIPPED = {"robust": {"norm": "2"}}, {"robust": {"norm": "2", "clip": False}}

CASES = {
    "natural": Case(plain.natural, "natural"),
    "pgd": Case(plain.pgd, "pgd", _attack()),
    "pgd, relu stability": Case(
        plain.pgd, "pgd", _attack() | {"regularizers": {"relu_stability": 0.2}}
    ),
    "ibp": Case(plain.ibp, "ibp"),
    "ibp, l2": Case(plain.ibp, "ibp", L2_UNCLIPPED),
    "ibp, regularized": Case(
        plain.ibp,
        "ibp",
        NORMALISED | {"regularizers": FALLING | {"relu_stability": 0.2, "l1": 0.01}},
        THREE_LAYERS,
    ),
    # Widths of 1e-6 lose digits.
    "ibp, warm-up": Case(plain.ibp, "ibp", {"regularizers": FALLING}, weights=WARM_UP, rel=1e-4),
    "crown-ibp": Case(plain.mixed(plain.adaptive), "crown-ibp"),
    "crown-ibp, l2": Case(plain.mixed(plain.adaptive), "crown-ibp", L2_UNCLIPPED),
    "crown-ibp, gap and slack": Case(plain.mixed(plain.adaptive), "crown-ibp", REG, THREE_LAYERS),
    "crown-ibp, fused": Case(plain.fused, "crown-ibp", {"relaxation": {"fused": True}}),
    # Where some steps raise the loss, and the interval margins decide on the direction of others.
    "one-step": Case(plain.one_step, "one-step", seed=218),
    "one-step, 7 steps": Case(
        plain.one_step, "one-step", {"relaxation": {"steps": 7, "step_size": 0.1}}, seed=218
    ),
    "cap-ibp": Case(plain.mixed(plain.parallel), "cap-ibp"),
    "random-slopes": Case(plain.mixed(plain.uniform), "random-slopes"),
    "pq-slopes": Case(
        plain.mixed(plain.zero_or_one), "pq-slopes", {"relaxation": {"p": 0.4, "q": 0.6}}
    ),
    "cap": Case(plain.cap, "cap"),
    "cap, gap and slack": Case(plain.cap, "cap", REG, THREE_LAYERS),
    "cap, projected": Case(plain.cap_projected, "cap", {"relaxation": {"projections": 3}}),
    "cap, all projected": Case(
        plain.cap_all_projected, "cap", {"relaxation": {"projections": 5}}, THREE_LAYERS
    ),
    "lmt": Case(plain.lmt, "lmt", L2),
    "bcp": Case(plain.bcp, "bcp", L2),
    "sabr": Case(plain.sabr, "sabr", _attack()),
    "mtl-ibp": Case(plain.mtl_ibp, "mtl-ibp", _attack()),
    "exp-ibp": Case(plain.exp_ibp, "exp-ibp", _attack()),
    "cc-ibp": Case(plain.cc_ibp, "cc-ibp", _attack()),
    # Split before the ReLU; behind it the rest is linear.
    "taps": Case(plain.taps, "taps", _attack(split=3, steps=1), weights=AFTER_RAMP, estimated=True),
    "taps, at a corner": Case(plain.taps_at_a_corner, "taps", _attack(split=4), weights=AFTER_RAMP),
    "staps": Case(
        plain.staps, "staps", _attack(split=3, steps=1), weights=AFTER_RAMP, estimated=True
    ),
}


def test_every_method_is_tried():
    # `test_random_objectives` has those of random networks.
    names = {name for name, method in methods.METHODS.items() if method.draws == "none"}
    assert {case.method for case in CASES.values()} == names


def _params(rng, hidden):
    sizes = [np.prod(IMAGE), *hidden, CLASSES]
    params = {
        f"Dense_{number}": {
            "kernel": 1.5 * rng.normal(size=(n, m)) / np.sqrt(n),
            "bias": 0.3 * rng.normal(size=m),
        }
        for number, (n, m) in enumerate(itertools.pairwise(sizes))
    }
    # The first kinks lie in the middle of the pixels' range: many ReLUs are unstable.
    params["Dense_0"]["bias"] -= 0.5 * np.sum(params["Dense_0"]["kernel"], axis=0)
    return params


def _labels(params, images):
    """What the network says, but for the last image."""
    layers = plain.layers_of(params, ModelConfig())
    labels = np.argmax(plain.values(layers, images.reshape(len(images), -1))[-1], axis=1)
    labels[-1] = (labels[-1] + 1) % CLASSES
    return labels


def _moved(params, direction, step):
    return jax.tree.map(lambda p, d: p + step * d, params, direction)


def _product(gradient, direction):
    products = jax.tree.map(lambda g, d: np.sum(np.asarray(g) * d), gradient, direction)
    return sum(jax.tree.leaves(products))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(4)
def test_an_objective_is_what_numpy_says_and_so_is_its_gradient(name):
    case = CASES[name]
    robust = {"method": case.method} | case.groups.get("robust", {})
    config = from_config_dict(case.groups | {"robust": robust})
    rng = np.random.default_rng(case.seed)
    params, direction = _params(rng, case.hidden), _params(rng, case.hidden)
    images = rng.uniform(size=(4, *IMAGE))
    labels = _labels(params, images)
    with jax.enable_x64(True):
        model = models.ConvolutionalClassifier(
            hidden=case.hidden,
            num_classes=CLASSES,
            mean=config.model.mean or None,
            std=config.model.std or None,
        )
        method, key = methods.create(model, config), jax.random.key(2)
        weights = Coefficients(*map(jnp.float64, case.weights))
        objective = method.objectives[int(method.phase(weights))]
        batch = Batch(jnp.asarray(images), jnp.asarray(labels))

        @jax.jit
        def run(params, own):
            return jax.value_and_grad(objective, has_aux=True)(
                params, {"batch_stats": {}, **own}, batch, weights, key
            )

        function = one_example(model, params, {})
        own = method.init(function, jax.ShapeDtypeStruct(IMAGE, np.float64), jax.random.key(1))
        vector = np.ravel(own["spectral"]["Dense_0"]) if own else None
        bound_key, _, image_key = jax.random.split(key, 3)
        given = images, labels, jax.random.split(image_key, len(labels)), bound_key, vector
        expected = functools.partial(
            plain.objective, case.loss_of, config, case.weights, given, held=params
        )

        (value, outcome), gradient = run(params, own)
        for metric, number in expected(params).items():
            assert float(outcome.metrics[metric]) == pytest.approx(number, rel=1e-9), metric
        assert float(value) == float(outcome.metrics["loss"])

        ahead, behind = _moved(params, direction, STEP), _moved(params, direction, -STEP)
        difference = (expected(ahead)["loss"] - expected(behind)["loss"]) / (2 * STEP)
        assert _product(gradient, direction) == pytest.approx(difference, rel=case.rel)
        if case.estimated:
            return
        # Against differences of itself; the vectors, which a gradient holds constant, converged.
        for label in own.get("spectral", {}):
            vector = np.linalg.svd(params[label]["kernel"])[0][:, 0]
            own["spectral"][label] = jnp.asarray(vector).reshape(own["spectral"][label].shape)
        difference = (run(ahead, own)[0][0] - run(behind, own)[0][0]) / (2 * STEP)
        slope = _product(run(params, own)[1], direction)
        assert slope == pytest.approx(float(difference), rel=case.rel)

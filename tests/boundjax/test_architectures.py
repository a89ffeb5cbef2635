"""Every architecture family, every method: bounds contain samples and attacks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import points

import boundjax as bj
from experiments.models import families

# Two steps are enough: the first starts from constants, and all others are alike.
FAMILIES = families.FAMILIES | {
    "lstm": dataclasses.replace(families.FAMILIES["lstm"], input_shape=(2, 4))
}

METHODS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "fast-lin": functools.partial(
        bj.linear, slopes="parallel", intermediate="linear", intersect=False
    ),
    "crown": functools.partial(bj.linear, intermediate="linear"),
    "alpha-crown": functools.partial(
        bj.linear,
        slopes=bj.optimized(1, optax.sgd(0.1), per_spec=True, optimize_intermediate=True),
        intermediate="linear",
    ),
}
# Compilation dominates the cost, so the deeper methods run on some families only. The networks of
# test_soundness.py cover the parts of the others.
DEEPER = {
    "crown": ("mlp", "cnn", "resnet", "unet", "vit", "resnet (nnx)"),
    "fast-lin": ("resnet (nnx)",),
    "alpha-crown": ("resnet (nnx)",),
}
# Flax's LSTM keeps float32 carries, NNX's attention computes in float32, whatever the input is.
FLOAT32 = ("lstm", "vit (nnx)")
# Tiny, typical, and far beyond what can be certified.
RADII = (0.0, 1e-3, 0.02, 0.2)


def dtype_of(family: str):
    return jnp.float32 if family in FLOAT32 else jnp.float64


@functools.cache
def family_model(family: str):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return FAMILIES[family].model(0, dtype_of(family))


def relaxed(function):
    """`function` with Flax's own promotions and broadcasts allowed, compiled."""
    compiled = jax.jit(function)

    def call(*arguments):
        with (
            jax.enable_x64(True),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            return jax.device_get(compiled(*arguments))

    return call


@functools.cache
def samples(family: str, eps: float):
    """Points of the box and the model's logits on them: corners, faces, and an attack's."""
    shape = FAMILIES[family].input_shape
    rng = np.random.default_rng(0)
    centre = rng.uniform(size=shape).astype(dtype_of(family))
    eps = centre.dtype.type(eps)
    inputs = points(rng, centre - eps, centre + eps, 400)

    directions = np.concatenate([np.eye(4), -np.eye(4)]).astype(centre.dtype)
    attacked = attack(family)(centre, directions, eps)
    inputs = np.concatenate([inputs, np.clip(attacked, centre - eps, centre + eps)])
    return centre, values(family)(inputs)


@functools.cache
def values(family: str):
    return relaxed(family_model(family))


@functools.cache
def attack(family: str):
    model = family_model(family)

    def run(centre, directions, eps):
        def climb(direction):
            def step(x, _):
                gradient = jax.grad(lambda x: model(x[None])[0] @ direction)(x)
                moved = x + 0.4 * eps * jnp.sign(gradient)
                return jnp.clip(moved, centre - eps, centre + eps), None

            return jax.lax.scan(step, centre, None, length=6)[0]

        return jax.vmap(climb)(directions)

    return relaxed(run)


@functools.cache
def bounds_of(family: str, method: str):
    model = family_model(family)
    transform = METHODS[method](lambda x: model(x[None])[0])
    return relaxed(lambda centre, eps: transform(bj.LpBall(centre, eps)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(f, m, marks=pytest.mark.xdist_group(f), id=f"{f}-{m}")
        for f in FAMILIES
        for m in METHODS
        if f in DEEPER.get(m, FAMILIES)
    ],
)
def test_bounds_contain_samples_and_attacks(family, method):
    for eps in RADII:
        centre, logits = samples(family, eps)
        bounds = bounds_of(family, method)(centre, eps)
        interval = bounds_of(family, "interval")(centre, eps)
        precision = 1e-9 if bounds.lower.dtype == np.float64 else 1e-5
        slack = precision * (1.0 + np.abs(interval.lower) + np.abs(interval.upper))
        assert np.isfinite(bounds.width).all()
        assert (logits >= bounds.lower - slack).all(), eps
        assert (logits <= bounds.upper + slack).all(), eps
        if eps == 0 and bounds.lower.dtype == np.float64:
            assert (bounds.width <= 1e-5 + 10 * slack).all()
        # With interval pre-activations a layer norm can be too wide for any line to help.
        if method not in ("interval", "crown-ibp") and eps == 1e-3:
            assert bounds.width.sum() < interval.width.sum()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.xdist_group(f), *marks])
        for f, marks in (
            ("mlp", []),
            ("cnn", []),
            ("resnet", [pytest.mark.slow]),
            ("unet", [pytest.mark.slow]),
        )
    ],
)
@pytest.mark.sampled(3)
def test_crown_is_useful_at_a_small_radius(family):
    """CROWN's bounds are at most three times as wide as the attained range."""
    centre, logits = samples(family, 1e-3)
    attained = logits.max(0) - logits.min(0)
    width = bounds_of(family, "crown")(centre, 1e-3).width
    assert width.sum() <= 3.0 * attained.sum()


@pytest.mark.parametrize(
    "family", ["mlp", pytest.param("cnn", marks=pytest.mark.slow), "resnet (nnx)"]
)
@pytest.mark.sampled(3)
def test_certify_takes_the_model(family):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = FAMILIES[family].model(0)
        x = np.random.default_rng(0).uniform(size=(2, *FAMILIES[family].input_shape))
        certificate = bj.certify(model, x.astype(np.float32), 1e-5)
    assert certificate.verified.all()

"""Wrong answers of other libraries, each reproduced there once, are right here."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import METHODS

import boundjax as bj

SCALAR_CASES = {
    # jax_verify linearised exp above 12 in the upper chord too: 651,019 instead of 3,269,017.
    "exp on [13, 15]": (jnp.exp, 13.0, 15.0),
    # jax_verify treated every leaky relu as convex.
    "leaky relu with slope 3": (lambda x: nn.leaky_relu(x, 3.0), -2.0, 1.0),
    # jax_verify's backward bounds exceeded the function's range: [-0.41, 1.41].
    "sigmoid on [-8, 8]": (jax.nn.sigmoid, -8.0, 8.0),
    # auto_LiRPA on even powers of one sign: 48 instead of 81.
    "x ** 4 on [1, 3]": (lambda x: x**4, 1.0, 3.0),
    "x ** 4 on [-3, -1]": (lambda x: x**4, -3.0, -1.0),
    # auto_LiRPA was wrong after its tracer's opset changed silently.
    "pow(x, 2)": (lambda x: jnp.power(x, 2.0), 0.5, 3.0),
    "x ** 2": (lambda x: x**2, -1.0, 3.0),
    # jax_verify gave NaN unless the user kept a list of intermediate bounds.
    "tanh and softplus in depth": (
        lambda x: jnp.tanh(jax.nn.softplus(jnp.tanh(2.0 * x)) - 1.0),
        -1.0,
        2.0,
    ),
}


@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown", "fast-lin"])
@pytest.mark.parametrize("case", SCALAR_CASES)
@pytest.mark.sampled(4)
def test_wrong_answers_of_others(case, method):
    function, lower, upper = SCALAR_CASES[case]
    with jax.enable_x64(True):
        grid = jnp.linspace(lower, upper, 2001)
        values = np.asarray(function(grid))
        box = bj.Box(jnp.full(1, lower), jnp.full(1, upper))
        bounds = METHODS[method](function)(box)
        assert np.isfinite(bounds.width).all()
        assert bounds.lower[0] <= values.min() + 1e-12
        assert bounds.upper[0] >= values.max() * (1 - 1e-12)
        # The bounds are tight, too: each is intersected with the function's range.
        assert bounds.width[0] <= 1.0001 * (values.max() - values.min()) + 1e-9


@pytest.mark.parametrize("c", [-3.0, -0.5, 0.2, 1.0])
@pytest.mark.parametrize("case", SCALAR_CASES)
@pytest.mark.sampled(4)
def test_wrong_answers_of_others_in_composition(case, c):
    """An unsound relaxation may look right alone and fail inside `f(x) - c x`."""
    function, lower, upper = SCALAR_CASES[case]
    with jax.enable_x64(True):
        grid = jnp.linspace(lower, upper, 2001)
        values = np.asarray(function(grid) - c * grid)
        box = bj.Box(jnp.full(1, lower), jnp.full(1, upper))
        bounds = bj.linear(lambda x: function(x) - c * x, intermediate="linear")(box)
        slack = 1e-12 * np.abs(values).max()
        assert bounds.lower[0] <= values.min() + slack
        assert bounds.upper[0] >= values.max() - slack


def small_network(dtype):
    rng = np.random.default_rng(0)
    weights = [
        tuple(jnp.asarray(a, dtype) for a in (rng.normal(size=(m, n)) / m**0.5, rng.normal(size=n)))
        for m, n in ((5, 8), (8, 8), (8, 3))
    ]

    def apply(x):
        for kernel, bias in weights[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ weights[-1][0] + weights[-1][1]

    return apply


def test_bounds_do_not_depend_on_the_order_of_calls():
    """auto_LiRPA keeps bounds as state of its nodes."""
    apply = small_network(jnp.float32)
    balls = [bj.LpBall(jnp.full(5, 0.1 * k), 0.1) for k in range(2)]
    transforms = [bj.interval(apply), bj.linear(apply), bj.linear(apply, intermediate="linear")]
    first = [t(ball) for t in transforms for ball in balls]
    second = [t(ball) for t in transforms[::-1] for ball in balls[::-1]][::-1]
    for ours, expected in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours.lower, expected.lower)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1e-7, 1e-6, 1e-5])
def test_tiny_radii_in_float64_exclude_nothing_that_is_attained(eps):
    """In float32 both libraries' bounds miss values by up to 1.2e-7; float64 bounds do not."""
    with jax.enable_x64(True):
        apply = small_network(jnp.float64)
        rng = np.random.default_rng(1)
        for x in rng.normal(size=(5, 5)):
            ball = bj.LpBall(jnp.asarray(x), eps)
            inputs = x + eps * rng.choice([-1.0, 1.0], size=(512, 5))
            values = np.asarray(jax.vmap(apply)(jnp.asarray(inputs)))
            for transform in (bj.linear, functools.partial(bj.linear, intermediate="linear")):
                bounds = jax.device_get(transform(apply)(ball))
                assert (values >= bounds.lower - 1e-14).all()
                assert (values <= bounds.upper + 1e-14).all()


def test_nan_is_never_turned_into_a_bound():
    """BCP's code turned NaN translations into 0, and so certified."""
    weights = jnp.full((3, 2), jnp.nan)
    certificate = bj.certify(lambda x: x @ weights, np.zeros((1, 3), np.float32), 0.0)
    assert not certificate.verified.any()


def test_random_projections_are_no_bounds():
    """convex_adversarial returned medians where bounds were expected."""
    estimate = bj.estimate(small_network(jnp.float32), jax.random.key(0))
    result = estimate(bj.LpBall(jnp.zeros(5), 0.1))
    assert isinstance(result, bj.Estimate)
    assert not hasattr(result, "lower")
    with pytest.raises(TypeError, match=r"Interval, but .* returned Estimate"):
        bj.certify(
            jax.vmap(small_network(jnp.float32)),
            np.zeros((2, 5), np.float32),
            0.1,
            method=lambda f: bj.estimate(f, jax.random.key(0)),
        )

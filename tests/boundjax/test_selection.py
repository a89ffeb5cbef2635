"""Predicates on perturbed values, and selections by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from joint_nodes import boxes, linear_alone
from networks import points

import boundjax as bj

pytestmark = pytest.mark.quick


def test_predicates_are_decided_where_the_intervals_decide():
    lower, upper = jnp.array([-1.0, 0.0, 1.0, -2.0, 0.0]), jnp.array([1.0, 0.0, 2.0, -1.0, 1.0])
    expected = {
        "gt": (lambda x: x > 0, [0, 0, 1, 0, 0], [1, 0, 1, 0, 1]),
        "ge": (lambda x: x >= 0, [0, 1, 1, 0, 1], [1, 1, 1, 0, 1]),
        "lt": (lambda x: x < 0, [0, 0, 0, 1, 0], [1, 0, 0, 1, 0]),
        "le": (lambda x: x <= 0, [0, 1, 0, 1, 0], [1, 1, 0, 1, 1]),
        "eq": (lambda x: x == 0, [0, 1, 0, 0, 0], [1, 1, 0, 0, 1]),
        "ne": (lambda x: x != 0, [0, 0, 1, 1, 0], [1, 0, 1, 1, 1]),
        "not": (lambda x: ~(x > 0), [0, 1, 0, 1, 0], [1, 1, 0, 1, 1]),
        "and": (lambda x: (x > 0) & (x < 1.5), [0] * 5, [1, 0, 1, 0, 1]),
        "or": (lambda x: (x > 0) | (x < 0), [0, 0, 1, 1, 0], [1, 0, 1, 1, 1]),
        "xor": (lambda x: (x > 0) ^ jnp.array([True] * 5), [0, 1, 0, 1, 0], [1, 1, 0, 1, 1]),
        "finite": (jnp.isfinite, [1] * 5, [1] * 5),
        "scalar": (lambda x: x > jnp.sum(x), [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]),
        "any": (lambda x: jnp.any(x > 1.5)[None], [0], [1]),
        "all": (lambda x: jnp.all(x > -3.0)[None], [1], [1]),
        "choice": (
            lambda x: jnp.where(x > 0, x < 5.0, x > 0.0),
            [0, 0, 1, 0, 0],
            [1, 0, 1, 0, 1],
        ),
    }
    for name, (function, surely, possibly) in expected.items():
        for transform in (bj.interval, bj.linear):
            bounds = jax.jit(transform(function))(bj.Box(lower, upper))
            assert bounds.lower.dtype == bool
            np.testing.assert_array_equal(bounds.lower, np.array(surely, bool), err_msg=name)
            np.testing.assert_array_equal(bounds.upper, np.array(possibly, bool), err_msg=name)


def test_a_comparison_with_nan_decides_nothing():
    for function in (lambda x: x > 0, lambda x: x != 0, lambda x: x == jnp.nan, jnp.isfinite):
        nan = jnp.full(1, jnp.nan)
        bounds = jax.jit(lambda x, f=function: bj.interval(f)(bj.Box(x, x)))(nan)
        assert not bounds.lower.any()
        assert bounds.upper.all()


SELECTIONS = {
    "two cases": lambda x: jnp.where(x > 0.2, jnp.sin(0.0) + 2 * x, x[::-1] - 1),
    "second constant": lambda x: jnp.where(x > 0.2, x[::-1], 0.3) - x,
    "first constant": lambda x: jnp.where(x <= 0.2, -2.0, x[::-1]) + x,
    "both constant": lambda x: jnp.where(x > 0.2, 1.0, -0.5) + x,
    "apart": lambda x: jnp.where(x > 0.0, 10.0 + x[::-1], x[::-1] - 10.0) - x,
    "apart, turned": lambda x: jnp.where(x > 0.0, x[::-1] - 10.0, 10.0 + x[::-1]) - x,
    "scalar predicate": lambda x: jax.lax.select(x.sum() > 0, x, -2 * x),
    "nested": lambda x: jnp.where((x > 0) & (x[::-1] < 0.5), jnp.where(x < 1, x, 1 - x), 2 * x),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.sampled(4)
def test_selections_contain_samples(name, dtype):
    function = SELECTIONS[name]
    rng = np.random.default_rng(4)
    with jax.enable_x64(dtype == np.float64):
        run = jax.jit(lambda low, up: [f(low, up) for f in runs])
        values = jax.jit(jax.vmap(function))
        runs = [
            lambda low, up: bj.interval(function)(bj.Box(low, up)),
            lambda low, up: linear_alone(function)(bj.Box(low, up)),
            lambda low, up: bj.linear(function, slopes="constant")(bj.Box(low, up)),
            lambda low, up: bj.linear(function, intermediate="linear")(bj.Box(low, up)),
        ]
        for kind, lower, upper in boxes(rng, 4, dtype):
            lower, upper = lower.astype(dtype), upper.astype(dtype)
            outputs = np.asarray(values(points(rng, lower, upper)))
            slack = (1e-5 if dtype == np.float32 else 1e-12) * (10 + np.abs(outputs).max())
            for bounds in run(lower, upper):
                assert (outputs >= np.asarray(bounds.lower) - slack).all(), kind
                assert (outputs <= np.asarray(bounds.upper) + slack).all(), kind
                if kind == "degenerate":
                    assert (bounds.width <= slack).all()


def test_a_decided_selection_is_the_chosen_case():
    """Its planes equal the chosen case, so their difference is bounded by exactly zero."""
    box = bj.Box(jnp.array([1.0, 2.0]), jnp.array([2.0, 3.0]))
    for function in (
        lambda x: jnp.where(x > 0, x, jnp.nan) - x,
        lambda x: jnp.where(x < 0, 3 * x, x) - x,
    ):
        bounds = linear_alone(function)(box)
        np.testing.assert_allclose(bounds.lower, 0, atol=1e-6)
        np.testing.assert_allclose(bounds.upper, 0, atol=1e-6)

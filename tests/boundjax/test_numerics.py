"""Choices between computed values, and their derivatives at ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax import numerics

pytestmark = pytest.mark.quick

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, 2), (2, 1), (3, 3), (-INF, 1), (1, INF), (-INF, -INF), (NAN, 1), (1, NAN), (0.0, -1)],
)
def test_larger_and_smaller_choose_as_numpy_does(first, second):
    first, second = np.float32(first), np.float32(second)
    np.testing.assert_equal(
        np.asarray(numerics.larger(first, second)), np.maximum(first, second), strict=True
    )
    np.testing.assert_equal(
        np.asarray(numerics.smaller(first, second)), np.minimum(first, second), strict=True
    )


@pytest.mark.parametrize(
    ("first", "second", "shares"),
    [
        (1, 2, (0, 1)),
        (2, 1, (1, 0)),
        (-INF, 1, (0, 1)),
        (INF, 1, (1, 0)),
        (0, 0, (0.5, 0.5)),
        (3, 3, (0.5, 0.5)),
        (-INF, -INF, (0.5, 0.5)),
    ],
)
def test_derivative_of_larger_is_that_of_the_operand_chosen(first, second, shares):
    result = jax.grad(numerics.larger, argnums=(0, 1))(jnp.float32(first), jnp.float32(second))
    assert result == shares


@pytest.mark.parametrize("infinite", [0, 1])
def test_the_infinite_derivative_of_what_was_not_chosen_stays_out(infinite):
    values, tangents = np.full(2, 2.0, np.float32), np.ones(2, np.float32)
    values[infinite], tangents[infinite] = 1.0, INF
    assert jax.jvp(numerics.larger, tuple(values), tuple(tangents)) == (2.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_cannot_lose_or_double_a_derivative(dtype):
    """If the comparison were repeated, the shares would depend on the last digit."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        first = rng.normal(size=1000).astype(dtype)
        for ulps in (-4, -1, 1, 4):
            second = first * dtype(1 + ulps * np.finfo(dtype).eps)
            shares = jax.grad(lambda a, b: numerics.larger(a, b).sum(), argnums=(0, 1))(
                jnp.asarray(first), jnp.asarray(second)
            )
            np.testing.assert_allclose(np.asarray(shares), 0.5, atol=5e-3)


def test_gradients_where_interval_and_linear_bounds_are_equal():
    """In a first layer both bounds are exact and differ by rounding only."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=(2, 40, 40)) / 6
        x, weight = rng.normal(size=(2, 40))

        def objective(first):
            bounds = bj.linear(
                lambda x: jnp.tanh(jnp.tanh(x @ first) @ second), intermediate="linear"
            )(bj.LpBall(x, 0.05))
            return weight @ (bounds.lower + bounds.upper)

        run = jax.jit(jax.value_and_grad(objective))
        direction = rng.normal(size=first.shape)
        ours = np.sum(np.asarray(run(first)[1]) * direction)
        ahead, behind = (run(first + sign * 1e-6 * direction)[0] for sign in (1, -1))
        np.testing.assert_allclose(ours, (ahead - behind) / 2e-6, rtol=1e-5)


def test_with_derivative_of_keeps_the_value_and_takes_the_derivative():
    def function(x):
        return numerics.with_derivative_of(jax.lax.stop_gradient(x * x), 3.0 * x)

    value, slope = jax.jit(jax.value_and_grad(function))(2.0)
    assert (value, slope) == (4.0, 3.0)


def test_materialized_is_the_identity_and_so_is_its_derivative():
    def function(x):
        tree = numerics.materialized((jnp.sin(x), None, x > 0, jnp.zeros((0,))))
        assert tree[1] is None
        return tree[0] * jnp.where(tree[2], 2.0, 1.0)

    # NaN, infinite and huge values pass unchanged, too.
    x = jnp.asarray([-1.0, 0.5, NAN, INF, 1.2345e30], jnp.float32)
    for run in (function, jax.jit(function), jax.vmap(function), jax.jit(jax.vmap(function))):
        expected = jnp.sin(x) * jnp.where(x > 0, 2.0, 1.0)
        np.testing.assert_allclose(np.asarray(run(x)), np.asarray(expected), rtol=1e-6)
    slopes = jax.jit(jax.grad(lambda x: function(x).sum()))(x[:2])
    np.testing.assert_allclose(np.asarray(slopes), np.cos([-1.0, 0.5]) * [1, 2], rtol=1e-5)


def test_materialized_values_survive_optimisation_once(optimized):
    """The compiled program has the loop, and computes the sine once for its two consumers."""

    def function(x, y):
        kept = numerics.materialized(jnp.sin(x))
        return jnp.outer(kept, y).sum(0), jnp.outer(kept, 2.0 * y).sum(0)

    compiled = jax.jit(function).lower(jnp.ones(4), jnp.ones(3)).compile().as_text()
    assert "while(" in compiled
    assert compiled.count(" sine(") == 1


def test_signed_parts_add_up():
    x = np.array([-2.0, -0.0, 0.0, 3.0, INF, -INF, NAN], np.float32)
    negative, positive = map(np.asarray, numerics.signed_parts(x))
    np.testing.assert_equal(negative + positive, x)
    assert (negative <= 0).all()
    assert not (positive < 0).any()


def test_lengths():
    run = jax.jit(numerics.length)
    np.testing.assert_allclose(run(jnp.array([[3.0, 0.0], [0.0, -4.0]])), 5.0)
    for scale in (1e-30, 1e30):  # whose squares would overflow or underflow
        np.testing.assert_allclose(run(scale * jnp.array([3.0, 4.0])), 5.0 * scale, rtol=1e-6)
    assert run(jnp.array([1.0, -INF])) == INF
    assert np.isnan(run(jnp.array([1.0, NAN, INF])))
    assert run(jnp.zeros((0, 2))) == 0.0
    np.testing.assert_array_equal(jax.grad(numerics.length)(jnp.zeros(3)), 0.0)
    np.testing.assert_allclose(jax.grad(numerics.length)(jnp.array([3.0, 4.0])), [0.6, 0.8])

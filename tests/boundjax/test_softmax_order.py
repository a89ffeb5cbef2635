"""The order of a softmax's entries, which is that of its logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.tracing.trace import trace

ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "real", "float32"])


def compared(first, second, axis=-1, compare=jnp.greater, rows=1):
    """Compares two parts of the softmax of rows of logits `[rows, 3]`."""

    def function(x):
        weights = nn.softmax(jnp.stack([x, -x][:rows]), axis)
        return compare(weights[first], weights[second])

    return function


def beside_logarithm(x):
    """A weight beside the logarithm of another, which is always less."""
    return nn.softmax(x)[0] > nn.log_softmax(x)[1]


# Functions of logits `[3]`, and whether their graphs need no softmax in real arithmetic.
ORDERS = {
    "larger": (compared((0, 1), (0, 2)), True),
    "not smaller": (compared((0, 0), (0, 2), compare=jnp.greater_equal), True),
    "difference": (compared((0, 1), (0, 2), compare=lambda a, b: a - b <= 0.0), True),
    "logarithm": (lambda x: jnp.less(*nn.log_softmax(x)[:2]), True),
    "columns": (compared(np.s_[:, 0], np.s_[:, 2], rows=2), True),
    "along rows": (compared(0, 1, axis=0, rows=2), True),
    "across rows": (compared(0, 1, rows=2), False),
    "all entries": (compared(np.s_[0, :2], np.s_[:, 1], axis=(0, 1), rows=2), True),
    "a number": (lambda x: nn.softmax(x) > 0.25, False),
    "a logarithm": (beside_logarithm, False),
    "argmax": (lambda x: jnp.argmax(nn.softmax(x)) == 1, False),
    "argmin of rows": (lambda x: jnp.argmin(nn.softmax(jnp.stack([x, -x]), 0), 0) == 1, False),
    "argmin across rows": (lambda x: jnp.argmin(nn.softmax(jnp.stack([x, -x]), 0), 1) == 1, False),
}


@pytest.mark.parametrize("name", ORDERS)
@ROUNDINGS
def test_the_order_of_a_softmax_is_that_of_its_logits(name, rounding):
    """In real arithmetic; rounded exponentials of nearly equal logits may be in any order."""
    function, of_one_row = ORDERS[name]
    as_float = lambda x: function(x).astype(x.dtype)  # noqa: E731
    names = [node.primitive for node in trace(as_float, jnp.zeros(3), rounding).nodes]
    assert ("log_softmax" in names) == (rounding == "float32" or not of_one_row)
    box = bj.Box(jnp.float32([-1.0, 0.5, -0.2]), jnp.float32([0.2, 0.9, 0.4]))
    bounds = bj.linear(as_float, intermediate="linear", rounding=rounding)(box)
    samples = np.random.default_rng(0).uniform(box.lower, box.upper, (200, 3))
    values = np.asarray(jax.vmap(as_float)(jnp.asarray(samples, jnp.float32)))
    bounds = bj.Interval(*map(np.asarray, bounds))
    assert (values >= bounds.lower - 1e-5).all()
    assert (values <= bounds.upper + 1e-5).all()


@pytest.mark.parametrize("rounding", ["nearest", "real"])
@pytest.mark.parametrize(
    "larger",
    [
        lambda weights: weights[0] > weights[1],
        lambda weights: jnp.argmax(weights) == 0,
    ],
)
def test_logits_decide_what_their_exponentials_do_not(larger, rounding):
    """Two logits range over 20, and one is always a little larger."""

    def function(x):
        logits = jnp.stack([x[0] + 0.1, x[0], x[1] - 20.0])
        return larger(nn.softmax(logits)).astype(x.dtype)

    box = bj.Box(jnp.float32([-10.0, -1.0]), jnp.float32([10.0, 1.0]))
    bounds = bj.linear(function, intermediate="linear", rounding=rounding)(box)
    np.testing.assert_allclose(bounds, (1.0, 1.0), atol=1e-6)


@ROUNDINGS
@pytest.mark.parametrize("which", [0, 1, 2])
def test_beside_an_infinite_logit_no_comparison_holds(which, rounding):
    """All weights are NaN there, whichever logit it is."""
    shift = jnp.zeros(3).at[which].set(jnp.inf)

    def function(x):
        weights = nn.softmax(x + shift)
        return (weights[0] > weights[1]).astype(x.dtype)

    box = bj.Box(jnp.float32([2.0, 0.0, 0.0]), jnp.float32([3.0, 1.0, 1.0]))
    assert function(box.lower) == 0.0
    assert not bj.linear(function, rounding=rounding)(box).lower > 0.0


@ROUNDINGS
def test_the_order_of_masked_entries_stays_that_of_their_weights(rounding):
    """Both are 0, whatever the logits say."""
    mask = jnp.array([True, False, False])

    def larger(x):
        weights = nn.softmax(jnp.where(mask, x, -jnp.inf))
        return (weights[1] > weights[2]).astype(x.dtype)

    box = bj.Box(jnp.float32([0.0, 2.0, 0.0]), jnp.float32([1.0, 3.0, 1.0]))
    bounds = bj.linear(larger, rounding=rounding)(box)
    assert bounds.lower <= larger(box.lower) == 0.0

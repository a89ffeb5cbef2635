"""One relaxation for several specifications."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj


def _network():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((4, 6), (6, 5), (5, 3)), strict=True)
    ]

    def function(weights, x):
        for weight in weights[:-1]:
            x = jax.nn.relu(x @ weight)
        return x @ weights[-1]

    return function, weights


BALL = bj.LpBall(jnp.asarray([0.3, 0.6, 0.1, 0.9]), 0.1, clip=(0.0, 1.0))


@pytest.mark.parametrize("intermediate", ["interval", "linear"])
def test_a_relaxation_serves_several_specifications(intermediate):
    function, weights = _network()
    options = {"intermediate": intermediate, "sides": "lower"}
    relaxation = bj.relax(lambda x: function(weights, x), **options)(BALL)
    bounds = bj.linear(lambda x: function(weights, x), has_aux=True, **options)
    rows = bj.margin_specification(jnp.int32(1), 3)
    for specification in (rows, jnp.ones((1, 3))):
        found, aux = relaxation.bounds(specification, has_aux=True)
        expected, expected_aux = bounds(BALL, specification)
        np.testing.assert_array_equal(found.lower, expected.lower)
        np.testing.assert_array_equal(
            relaxation.interval(specification).lower, expected_aux.interval.lower
        )
        assert set(aux.rows) == set(relaxation.pre_activations)
    whole = relaxation.bounds()
    assert whole.lower.shape == (3,)
    assert np.all(whole.lower <= function(weights, BALL.center))


def test_centers_that_are_references_leave_the_gradient_as_it_is():
    # Values and references share one product with the weights; the derivative has both parts.
    function, weights = _network()
    rows = bj.margin_specification(jnp.int32(1), 3, rows="others")

    with jax.enable_x64(True):
        ball, rows = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (BALL, rows))
        exact = [jnp.asarray(np.asarray(weight), jnp.float64) for weight in weights]

        def loss(weights):
            margins = bj.linear(lambda x: function(weights, x), sides="lower")(ball, rows)
            return jnp.sum(margins.lower)

        gradient = jax.grad(loss)(exact)
        length = sum(float(jnp.sum(part**2)) for part in gradient)
        ends = [
            float(loss([w + s * g for w, g in zip(exact, gradient, strict=True)]))
            for s in (1e-7, -1e-7)
        ]
    assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(length, rel=1e-4)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"sides must be 'lower', 'upper' or 'both', got 'left'"):
        bj.relax(jnp.sin, sides="left")

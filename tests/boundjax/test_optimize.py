"""The ascent that moves the parameters of a bound: its steps, its projections, what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import boundjax as bj
from boundjax.transforms.optimize import Ascent, unit_interval

TARGET = {"position": jnp.array([[0.25, 2.0]]), "multiplier": jnp.array([[-1.0, 3.0]])}


def bound(parameters):
    """Largest at `TARGET`."""
    distances = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t), -1), parameters, TARGET)
    return -sum(jax.tree.leaves(distances))


@pytest.mark.parametrize("steps", [0, 1, 3, 40])
def test_steps_one_by_one_are_the_whole_run(steps):
    options = bj.optimized(steps=steps, rule=optax.adam(0.1), per_spec=True)
    start = jax.tree.map(lambda t: jnp.full_like(t, 0.5), TARGET)
    ascent = Ascent(bound, True, options)
    state = ascent.init(start)
    for _ in range(steps):
        state = ascent.step(state)
    for one, whole in zip(
        jax.tree.leaves(ascent.finish(state)), jax.tree.leaves(ascent.run(start)), strict=True
    ):
        np.testing.assert_allclose(one, whole, rtol=1e-6)


def test_every_leaf_has_its_own_projection():
    options = bj.optimized(steps=400, rule=optax.adam(0.1), per_spec=True)
    projection = {"position": unit_interval, "multiplier": lambda value: jnp.maximum(value, 0.0)}
    start = jax.tree.map(lambda t: jnp.full_like(t, 0.5), TARGET)
    best = Ascent(bound, True, options, projection).run(start)
    np.testing.assert_allclose(best.parameters["position"], [[0.25, 1.0]], atol=1e-2)
    np.testing.assert_allclose(best.parameters["multiplier"], [[0.0, 3.0]], atol=1e-2)
    assert best.values[0] >= bound(start)[0]


def test_the_best_iterate_is_kept_and_nan_moves_nothing():
    options = bj.optimized(steps=5, rule=optax.sgd(1e6), per_spec=True)
    start = jax.tree.map(lambda t: jnp.full_like(t, 0.3), TARGET)
    best = Ascent(bound, True, options, lambda value: value).run(start)
    np.testing.assert_array_equal(best.parameters["position"], start["position"])
    np.testing.assert_array_equal(best.values, bound(start))
    broken = Ascent(lambda p: bound(p) * jnp.nan, True, options).run(start)
    np.testing.assert_array_equal(broken.parameters["position"], start["position"])


def test_an_iterate_without_a_bound_never_replaces_one_with_a_bound():
    # Each step adds 0.2; positions beyond 0.35 give NaN.
    def until(parameters):
        position = parameters["position"][:, 0]
        return jnp.where(position > 0.35, jnp.nan, position)

    options = bj.optimized(steps=3, rule=optax.sgd(0.2), per_spec=True)
    best = Ascent(until, True, options).run({"position": jnp.array([[0.0], [0.1]])})
    np.testing.assert_allclose(best.values, [0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(best.parameters["position"], [[0.2], [0.3]], rtol=1e-6)

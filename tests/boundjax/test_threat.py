"""Threat models: the sets that they allow, and the projection that attacks use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import ball_points

import boundjax as bj

pytestmark = pytest.mark.quick

SEEDS = st.integers(0, 2**32 - 1)
NORMS = [1, 2, jnp.inf]


def test_a_threat_is_a_function_from_an_example_to_its_ball():
    x = jnp.array([0.1, 0.9])
    ball = bj.Threat(0.2, 2, (0.0, 1.0))(x)
    assert isinstance(ball, bj.LpBall)
    assert (ball.eps, ball.p, ball.clip, ball.outward) == (0.2, 2, (0.0, 1.0), False)
    np.testing.assert_array_equal(ball.center, x)
    assert bj.Threat(0.2, 2, (0.0, 1.0)).within(0.3) == bj.Threat(0.3, 2, (0.0, 1.0))


def test_radii_of_a_batch_are_mapped_over():
    xs, radii = jnp.zeros((3, 2)), jnp.array([0.0, 0.1, 0.2])
    threat = bj.Threat(radii, jnp.inf, (-0.15, 1.0))
    axes = bj.Threat(0, jnp.inf, None)
    lower, upper = jax.jit(jax.vmap(lambda t, x: t(x).interval(), (axes, 0)))(threat, xs)
    np.testing.assert_allclose(lower[:, 0], [0.0, -0.1, -0.15], rtol=1e-6)
    np.testing.assert_allclose(upper[:, 1], [0.0, 0.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@given(seed=SEEDS)
def test_the_projection_lies_in_the_set(norm, clip, seed):
    rng = np.random.default_rng(seed)
    x, point = rng.uniform(size=(2, 3)), rng.normal(scale=2.0, size=(2, 3))
    eps = rng.choice([0.0, rng.uniform(0, 2)])
    with jax.enable_x64(True):
        projected = np.asarray(bj.Threat(eps, norm, clip).project(jnp.array(point), jnp.array(x)))
    assert projected.shape == x.shape
    assert np.linalg.norm((projected - x).ravel(), norm) <= eps + 1e-12
    if clip is not None:
        assert projected.min() >= 0
        assert projected.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
@given(seed=SEEDS)
def test_no_point_of_the_ball_is_nearer_than_the_projection(norm, seed):
    rng = np.random.default_rng(seed)
    x, point, eps = rng.uniform(size=4), rng.normal(scale=2.0, size=4), rng.uniform(0.1, 1.0)
    with jax.enable_x64(True):
        projected = np.asarray(bj.Threat(eps, norm).project(jnp.array(point), jnp.array(x)))
    samples = ball_points(rng, x, eps, norm, None)
    nearest = np.linalg.norm(samples - point, axis=-1).min()
    assert np.linalg.norm(projected - point) <= nearest + 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_of_the_set_stays(norm):
    x, point = jnp.array([0.25, 0.5]), jnp.array([0.375, 0.5])
    projected = bj.Threat(0.125, norm, (0.0, 1.0)).project(point, x)
    np.testing.assert_array_equal(projected, point)


def test_the_projection_on_a_box_ends_where_bounds_begin():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=1000), jnp.float32)
    threat = bj.Threat(jnp.asarray(rng.uniform(0, 0.1, 1000), jnp.float32), jnp.inf, (0.0, 1.0))
    projected = threat.project(x + 1.0, x)
    np.testing.assert_array_equal(projected, threat(x).interval().upper)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-0.1,), r"eps must be finite and >= 0, got -0.1"),
        ((np.nan,), r"eps must be finite and >= 0, got nan"),
        ((0.1, 0.5), r"norm must be a norm's order >= 1"),
        ((0.1, 2, (1.0, 0.0)), r"clip must be \(low, high\) with low <= high"),
    ],
)
def test_threats_that_are_none_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        bj.Threat(*arguments)


@pytest.mark.parametrize(("eps", "norm"), [(0.1, 3), (np.full(2, 0.1), 2)])
def test_what_cannot_be_projected_is_refused(eps, norm):
    with pytest.raises(ValueError, match=r"project needs norm inf, or 1 or 2 with one radius"):
        bj.Threat(eps, norm).project(jnp.zeros(2), jnp.zeros(2))

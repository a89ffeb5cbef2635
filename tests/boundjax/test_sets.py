"""Input sets: the support function against closed forms, brute force and their own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import ball_points

import boundjax as bj

pytestmark = pytest.mark.quick

NORMS = [1, 1.5, 2, 3, jnp.inf]
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("per_feature", [False, True])
@given(seed=SEEDS)
def test_support_and_interval_contain_samples(p, clip, per_feature, seed):
    rng = np.random.default_rng(seed)
    center = rng.uniform(size=4)
    eps = rng.uniform(0, 0.7, size=4 if per_feature else ())
    samples = ball_points(rng, center, eps, p, clip)
    c = rng.normal(size=4)
    with jax.enable_x64(True):
        ball = bj.LpBall(jnp.asarray(center), jnp.asarray(eps), p=p, clip=clip)
        lower, upper = ball.interval()
        assert (samples >= np.asarray(lower) - 1e-12).all()
        assert (samples <= np.asarray(upper) + 1e-12).all()
        assert (samples @ c).max(initial=-np.inf) <= float(ball.support(jnp.asarray(c))) + 1e-12


@pytest.mark.parametrize("p", NORMS)
@given(seed=SEEDS)
def test_unclipped_support_is_attained(p, seed):
    rng = np.random.default_rng(seed)
    center, eps, c = rng.normal(size=5), rng.uniform(0.1, 2.0, size=5), rng.normal(size=5)
    # The equality case of Hoelder's inequality.
    d = eps * c
    if p == 1:
        direction = np.eye(5)[np.abs(d).argmax()] * np.sign(d)
    elif p == np.inf:
        direction = np.sign(d)
    else:
        q = p / (p - 1)
        direction = np.sign(d) * np.abs(d) ** (q - 1)
        direction /= np.linalg.norm(direction, p)
    best = c @ (center + eps * direction)
    with jax.enable_x64(True):
        support = bj.LpBall(jnp.asarray(center), jnp.asarray(eps), p=p).support(jnp.asarray(c))
    np.testing.assert_allclose(float(support), best, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS)
def test_clipped_inf_ball_is_exact(seed):
    rng = np.random.default_rng(seed)
    center, eps, c = rng.uniform(size=3), rng.uniform(0, 1, size=3), rng.normal(size=3)
    lower, upper = np.clip(center - eps, 0, 1), np.clip(center + eps, 0, 1)
    corners = np.stack(np.meshgrid(*zip(lower, upper, strict=True)), -1).reshape(-1, 3)
    with jax.enable_x64(True):
        ball = bj.LpBall(jnp.asarray(center), jnp.asarray(eps), clip=(0.0, 1.0))
        np.testing.assert_allclose(float(ball.support(jnp.asarray(c))), (corners @ c).max())
        box = bj.Box(jnp.asarray(lower), jnp.asarray(upper))
        np.testing.assert_allclose(float(box.support(jnp.asarray(c))), (corners @ c).max())


@pytest.mark.parametrize("p", [1, 2])
def test_clipped_ball_is_no_looser_than_ball_and_box(p):
    center, c = jnp.array([0.1, 0.9, 0.5]), jnp.array([1.0, -2.0, 3.0])
    clipped = bj.LpBall(center, 0.3, p=p, clip=(0.0, 1.0))
    ball = bj.LpBall(center, 0.3, p=p).support(c)
    box = bj.Box(*clipped.interval()).support(c)
    assert clipped.support(c) <= jnp.minimum(ball, box) + 1e-6


@pytest.mark.parametrize("p", [1, 2, jnp.inf])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_support_neither_underflows_nor_overflows(p, scale):
    # Squares of 1e-30 and 1e30 leave float32; a support of 0 or NaN there would be wrong.
    c = scale * jnp.array([3.0, 4.0], dtype=jnp.float32)
    support = bj.LpBall(jnp.zeros(2), 1.0, p=p).support(c)
    expected = {1: 4.0, 2: 5.0, jnp.inf: 7.0}[p] * scale
    np.testing.assert_allclose(float(support), expected, rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2, jnp.inf])
def test_gradients_are_finite_at_zero(p):
    def support(center, eps, c):
        return bj.LpBall(center, eps, p=p).support(c)

    arguments = (jnp.zeros(3), jnp.float32(0.0), jnp.zeros(3))
    for gradient in jax.grad(support, argnums=(0, 1, 2))(*arguments):
        assert jnp.isfinite(gradient).all()


POINT = jnp.array([1.0, -2.0, 0.0])
DEGENERATE = {
    "box": lambda outward: bj.Box(POINT, POINT, outward),
    "flat box": lambda outward: bj.Box(POINT, POINT + jnp.array([1.0, 0.0, 0.0]), outward),
    "ball and box": lambda outward: bj.BallBox(POINT, jnp.zeros(()), POINT, POINT, outward),
    "ball at a corner": lambda outward: bj.BallBox(
        POINT, jnp.ones(()), POINT, POINT + 1.0, outward
    ),
    **{
        f"{name}, p={p}": lambda outward, p=p, eps=eps, clip=clip: bj.LpBall(
            POINT, eps, p, clip, outward
        )
        for p in (1, 2, 3, jnp.inf)
        for name, eps, clip in (
            ("point", jnp.zeros(()), None),
            ("segment", jnp.array([0.5, 0.0, 0.0]), None),
            ("clipped point", jnp.zeros(()), (-3.0, 3.0)),
            ("clipped to a point", jnp.ones(()), (POINT, POINT)),
        )
    },
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.sampled(4)
def test_gradients_are_finite_over_degenerate_sets(name):
    for outward in (False, True):
        leaves, tree = jax.tree.flatten(DEGENERATE[name](outward))

        def support(c, *leaves, tree=tree):
            return jax.tree.unflatten(tree, leaves).support(c)

        derivatives = jax.jit(jax.value_and_grad(support, argnums=range(1 + len(leaves))))
        for c in (jnp.zeros(3), jnp.array([0.0, 1.0, -1e-30])):
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives(c, *leaves)))


@pytest.mark.parametrize("p", [1, 2, jnp.inf])
def test_sets_are_pytrees_under_jit_vmap_and_grad(p):
    rng = np.random.default_rng(0)
    centers = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    c = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    eps = jnp.linspace(0.0, 0.5, 6, dtype=jnp.float32)

    balls = jax.vmap(lambda x, e: bj.LpBall(x, e, p=p, clip=(-1.0, 1.0)))(centers, eps)
    batched = jax.jit(jax.vmap(lambda ball, c: ball.support(c)))(balls, c)
    single = [
        bj.LpBall(x, e, p=p, clip=(-1.0, 1.0)).support(d)
        for x, e, d in zip(centers, eps, c, strict=True)
    ]
    np.testing.assert_allclose(batched, jnp.stack(single), rtol=1e-5, atol=1e-6)

    # Danskin: the gradient in the centre of an unclipped ball is the coefficient itself.
    gradient = jax.grad(lambda x: bj.LpBall(x, 0.3, p=p).support(c[0]))(centers[0])
    np.testing.assert_allclose(gradient, c[0], rtol=1e-6)


def test_radius_per_feature_keeps_fixed_features_fixed():
    center = jnp.array([[0.2, 0.4], [0.6, 0.8]])
    eps = jnp.array([[0.1, 0.0], [0.0, 0.5]])
    lower, upper = bj.LpBall(center, eps, clip=(0.0, 1.0)).interval()
    np.testing.assert_allclose(lower, [[0.1, 0.4], [0.6, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(upper, [[0.3, 0.4], [0.6, 1.0]], rtol=1e-6)


def test_interval_width_and_degenerate_sets():
    assert bj.LpBall(jnp.ones(3), 0.0).interval().width.max() == 0
    assert bj.Box(jnp.ones(3), jnp.ones(3)).support(jnp.ones(3)) == 3


def test_bad_radius_under_jit_gives_nan_and_never_a_smaller_set():
    lower, upper = jax.jit(lambda e: bj.LpBall(jnp.zeros(2), e).interval())(jnp.float32(-1.0))
    assert jnp.isnan(lower).all()
    assert jnp.isnan(upper).all()
    lower, upper = jax.jit(lambda a, b: bj.Box(a, b).interval())(jnp.ones(2), jnp.zeros(2))
    assert jnp.isnan(lower).all()
    assert jnp.isnan(upper).all()


def test_a_list_of_arrays_of_one_shape_is_an_array():
    rows = [np.zeros(3, np.float32), np.ones(3, np.float32)]
    lower, upper = bj.Box(rows, [row + 1.0 for row in rows]).interval()
    np.testing.assert_array_equal(lower, np.stack(rows))
    np.testing.assert_array_equal(upper, np.stack(rows) + 1.0)
    certificate = bj.certify(lambda x: x, [np.float32([0.1, 0.9]), np.float32([0.9, 0.1])], 0.1)
    assert certificate.verified.all()


@pytest.mark.parametrize(
    ("ends", "match"),
    [
        ((jnp.zeros(3), jnp.ones(2)), "must have two ends of one shape"),
        ((jnp.zeros(3, jnp.int32), jnp.ones(3, jnp.int32)), "assert_type"),
    ],
)
def test_the_interval_of_a_custom_set_is_checked(ends, match):
    class Custom:
        is_box = True

        def interval(self):
            return bj.Interval(*ends)

        def support(self, coefficients):
            return coefficients.sum()

        spread = support

    for transform in (bj.interval, bj.linear, bj.forward_linear):
        with pytest.raises(AssertionError, match=match):
            transform(jnp.tanh)(Custom())

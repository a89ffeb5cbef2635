"""Sets that round outwards, against exact fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rationals import exact

import boundjax as bj
from boundjax.sets.rounding import Arithmetic

pytestmark = pytest.mark.quick
DTYPES = (np.float32, np.float64)


def numbers(random, dtype, size):
    """Numbers of one size or of very different ones, some of them 0."""
    scale = 10.0 ** random.uniform(*random.choice([(-1, 1), (-30, 10)]), size)
    return (random.normal(size=size) * scale * (random.random(size) < 0.9)).astype(dtype)


def drawn(random, dtype, size):
    """Center, radii per feature, coefficients, and a clip range around the center."""
    center = random.normal(size=size).astype(dtype)
    eps = np.abs(numbers(random, dtype, size if random.random() < 0.5 else 1))
    if random.random() < 0.3:
        eps = eps * np.finfo(dtype).eps  # below a spacing of the center
    coefficients = numbers(random, dtype, size)
    clip = None
    if random.random() < 0.5:
        below, above = np.abs(numbers(random, dtype, (2, size)))
        clip = (center - below).astype(dtype), (center + above).astype(dtype)
    return center, eps, coefficients, clip


def members(random, center, eps, p, clip, coefficients):
    """Exact points of a ball: those that a linear function likes, cut to the clip range."""
    radii = exact(np.broadcast_to(eps, center.shape))
    c, x = exact(coefficients), exact(center)
    sign = np.where(coefficients < 0, -1, 1)
    if p == 1:
        weight = np.abs(np.float64(coefficients)) * np.broadcast_to(eps, center.shape)
        share = exact(np.eye(center.size)[np.argmax(weight)])
    elif p == 2:
        pulls = [abs(a) * r for a, r in zip(c, radii, strict=True)]
        total = sum(pull * pull for pull in pulls)
        # A length that is slightly too large keeps the point inside.
        length = Fraction(float(total) ** 0.5 * (1 + 1e-14)) if total else Fraction(1)
        share = np.array([pull / length if length else 0 for pull in pulls], object)
        if sum(s * s for s in share) > 1:
            return
    else:
        share = np.full(center.shape, Fraction(1), object)
    point = x + sign * share * radii
    if clip is not None:
        low, high = map(exact, clip)
        point = np.minimum(np.maximum(point, low), high)
    yield point


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2, np.inf])
@pytest.mark.parametrize("size", [1, 7])
def test_points_of_the_set_are_enclosed(p, dtype, size):
    random = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):

        @jax.jit
        def answers(center, eps, coefficients, clip):
            ball = bj.LpBall(center, eps, p=p, clip=clip).outwards()
            interval = ball.interval()
            spread, support = ball.spread(coefficients), ball.support(coefficients)
            return interval, interval.middle, interval.radius, spread, support, *ball.ball()

        for _ in range(60):
            center, eps, coefficients, clip = drawn(random, dtype, size)
            results = answers(center, eps, coefficients, clip)
            (lower, upper), middle, radius, spread, support, ball, distance = jax.tree.map(
                np.asarray, results
            )
            ends, m, r, b = (exact(lower), exact(upper)), exact(middle), exact(radius), exact(ball)
            c = exact(coefficients)
            for point in members(random, center, eps, p, clip, coefficients):
                assert (ends[0] <= point).all()
                assert (point <= ends[1]).all()
                assert (abs(point - m) <= r).all()
                if np.isfinite(spread):
                    assert sum(c * (point - m)) <= Fraction(float(spread))
                if np.isfinite(support):
                    assert sum(c * point) <= Fraction(float(support))
                if np.isfinite(distance):
                    assert sum((point - b) ** 2) <= Fraction(float(distance)) ** 2


@pytest.mark.parametrize("p", [1, 2, 3, np.inf])
@pytest.mark.parametrize("clipped", [False, True])
def test_little_is_added(p, clipped):
    random = np.random.default_rng(1)
    center = random.uniform(size=784).astype(np.float32)
    coefficients = random.normal(size=784).astype(np.float32)
    ball = bj.LpBall(jnp.asarray(center), 0.1, p=p, clip=(0.0, 1.0) if clipped else None)
    nearest, above = ball.spread(coefficients), ball.outwards().spread(coefficients)
    added = 4 * Arithmetic.of(np.float32).gamma(784) * 0.1 * np.abs(coefficients).sum()
    assert nearest - added <= above < nearest + added


def test_a_radius_that_is_no_float_is_rounded_up():
    ball = bj.LpBall(jnp.zeros(2, jnp.float32), 0.01).outwards()
    assert Fraction(float(np.float32(ball.eps))) >= Fraction(1, 100)
    assert float(ball.interval().upper[0]) > 0.01 > float(np.float32(0.01))


def test_a_radius_of_0_is_the_point():
    x = jnp.float32([1.1, -3e-3, 0.0, 7e20])
    lower, upper = bj.LpBall(x, 0.0).outwards().interval()
    np.testing.assert_array_equal(lower, x)
    np.testing.assert_array_equal(upper, x)


def test_a_set_that_does_not_round_is_refused_in_one_line():
    class Mine:
        is_box = True

        def interval(self):
            return bj.Interval(jnp.zeros(2), jnp.ones(2))

        def support(self, coefficients):
            return jnp.sum(jnp.maximum(coefficients, 0.0))

        def spread(self, coefficients):
            return 0.5 * jnp.sum(jnp.abs(coefficients))

    assert bj.interval(jnp.tanh)(Mine()).lower.shape == (2,)
    with pytest.raises(TypeError, match=r"need an input set with a method outwards\(\), got Mine"):
        bj.interval(jnp.tanh, rounding="real")(Mine())

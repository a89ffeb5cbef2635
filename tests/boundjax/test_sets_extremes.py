"""Sets that round outwards at numbers where rounding is worst, against exact fractions.

Subnormal numbers, radii of about a spacing, numbers near the largest one, corners that a clip range
cuts off, radii of 0, and all of them in one set.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rationals import exact

import boundjax as bj
from boundjax.sets import rounding, upward
from boundjax.sets.rounding import Arithmetic

F32 = np.float32
TINY, LEAST = F32(2.0**-126), F32(2.0**-149)
SIZE, CASES = 4, 150


def root_above(square):
    """A fraction slightly above the root of a fraction."""
    n, d = square.numerator, square.denominator
    return Fraction(math.isqrt((n * d) << 160) + 1, d << 80)


def centers(random, size):
    kinds = [
        lambda: F32(0),
        lambda: LEAST * F32(random.integers(1, 2**23)),  # subnormal
        lambda: TINY * F32(random.uniform(1, 4)),
        lambda: F32(1),
        lambda: np.nextafter(F32(1), F32(random.choice([0, 2]))),
        lambda: F32(random.normal()),
        lambda: F32(random.integers(0, 256)),
        lambda: F32(2.0 ** random.integers(-60, 60)),
        lambda: F32(random.uniform(0.1, 1)) * F32(3e38),
    ]
    # Extremes beside one another hide each other: most sets have one kind.
    chosen = random.integers(0, len(kinds), size)
    if random.random() < 0.7:
        chosen[:] = chosen[0]
    signs = random.choice(F32([-1, 1]), size)
    return F32([kinds[k]() for k in chosen]) * signs


def radii(random, center):
    spacing = np.spacing(np.maximum(np.abs(center), TINY))
    kinds = [
        lambda s: F32(0),
        lambda s: LEAST * F32(random.integers(1, 2**23)),
        lambda s: TINY * F32(random.uniform(1, 4)),
        lambda s: F32(s * random.choice([0.25, 0.5, 0.5 + 2.0**-20, 0.75, 1.0, 1.5])),
        lambda s: F32(s * 2.0 ** random.uniform(0, 24)),
        lambda s: F32(random.uniform()),
        lambda s: F32(0.5 * random.uniform()) * F32(3e38),
    ]
    chosen = random.integers(0, len(kinds), center.size)
    if random.random() < 0.7:
        chosen[:] = chosen[0]
    values = F32([kinds[k](s) for k, s in zip(chosen, spacing, strict=True)])
    return values if random.random() < 0.5 else np.full_like(values, values[0])


def functions(random, size):
    kinds = [
        lambda: F32(0),
        lambda: LEAST * F32(random.integers(1, 2**23)),
        lambda: TINY * F32(random.uniform(1, 4)),
        lambda: F32(random.normal()),
        lambda: F32(2.0 ** random.integers(-100, 100)),
    ]
    chosen = random.integers(0, len(kinds), size)
    if random.random() < 0.5:
        chosen[:] = chosen[0]
    return F32([kinds[k]() for k in chosen]) * random.choice(F32([-1, 1]), size)


def ranges(random, center, eps):
    """Ends of a box around, on one side of, or away from a center."""
    with np.errstate(over="ignore"):
        below, above = (
            eps * F32(random.choice([0, 0.3, 0.9, 1, 2], center.size)) for _ in range(2)
        )
        shift = F32(random.choice([0, 0, 0.4, -0.4], center.size)) * eps
        limit = np.finfo(F32).max
        low, high = (
            np.clip(end + shift, -limit, limit) for end in (center - below, center + above)
        )
    return np.minimum(low, high), np.maximum(low, high)


def best(c, x, radius, p, low, high):
    """Points that a linear function likes, as fractions: `radius` per feature, ends may be None."""

    def cut(point):
        return point if low is None else np.minimum(np.maximum(point, low), high)

    sign = np.array([-1 if a < 0 else 1 for a in c], object)
    yield cut(x)
    if p == np.inf:
        yield cut(x + sign * radius)
        return
    if p == 1:
        for k in range(len(x)):
            point = x.copy()
            point[k] += sign[k] * radius[k]
            yield cut(point)
        return
    # The largest multiple of the slope, cut to the range, that stays in the ball.
    slope = np.array([a * r * r for a, r in zip(c, radius, strict=True)], object)

    def point(length):
        return cut(x + slope * length)

    total = sum((a * r) ** 2 for a, r in zip(c, radius, strict=True))
    if not total:
        return
    inside = 1 / root_above(total)
    yield point(inside)
    outside = inside
    for _ in range(300):
        if not member(point(outside), x, radius, p, low, high):
            break
        inside, outside = outside, 2 * outside
    else:
        yield point(outside)
        return
    for _ in range(40):
        between = (inside + outside) / 2
        if member(point(between), x, radius, p, low, high):
            inside = between
        else:
            outside = between
    yield point(inside)


def member(point, x, radius, p, low, high):
    """Whether a point lies in the set, exactly."""
    if low is not None and not ((low <= point).all() and (point <= high).all()):
        return False
    offset = abs(point - x)
    if ((offset > 0) & (radius == 0)).any():
        return False
    shares = [o / r for o, r in zip(offset, radius, strict=True) if r]
    if p == np.inf:
        return max(shares, default=0) <= 1
    return sum(share**p for share in shares) <= 1


def check(answers, points, c):
    """Compares a set's answers with exact members; the number of finite ones."""
    (lower, upper), middle, half, spread, support, center, distance = answers
    values = [np.asarray(a, np.float64) for a in (lower, upper, middle, half)]
    spread, support, distance = (float(a) for a in (spread, support, distance))
    assert spread != -np.inf
    assert support != -np.inf
    # Nothing else is infinite by itself: that would exclude points, or say nothing about others.
    bounded = np.isfinite(values).all(axis=0)
    assert not (np.isinf(values[2]) & np.isfinite(values[3])).any()
    assert np.isfinite(center).all() or not math.isfinite(distance)
    finite = math.isfinite(spread) + math.isfinite(support) + math.isfinite(distance)
    for point in points:
        for k in np.flatnonzero(bounded):
            low, high, m, h = (Fraction(float(array[k])) for array in values)
            assert low <= point[k] <= high
            assert abs(point[k] - m) <= h
        if math.isfinite(spread) and bounded.all():
            assert sum(c * (point - exact(middle))) <= Fraction(spread)
        if math.isfinite(support):
            assert sum(c * point) <= Fraction(support)
        if math.isfinite(distance):
            assert sum((point - exact(center)) ** 2) <= Fraction(distance) ** 2
    return finite + int(bounded.sum())


def answers_of(make):
    @jax.jit
    def answers(arguments, coefficients):
        chosen = make(*arguments).outwards()
        interval = chosen.interval()
        spread, support = chosen.spread(coefficients), chosen.support(coefficients)
        return interval, interval.middle, interval.radius, spread, support, *chosen.ball()

    return answers


def compare_balls(p, clipped):
    """Raises where a ball's answer excludes one of its points; counts points and finite answers."""
    random = np.random.default_rng(0)
    answers = answers_of(lambda x, eps, clip: bj.LpBall(x, eps, p=p, clip=clip))
    compared = finite = 0
    for _ in range(CASES):
        center = centers(random, SIZE)
        eps, c = radii(random, center), functions(random, SIZE)
        clip = ranges(random, center, eps) if clipped else None
        exactly = exact(c), exact(center), exact(eps)
        ends = (None, None) if clip is None else tuple(map(exact, clip))
        points = best(*exactly, p, *ends)
        points = [point for point in points if member(point, *exactly[1:], p, *ends)]
        compared += len(points)
        finite += check(answers((center, eps, clip), c), points, exactly[0])
    return compared, finite


def compare_boxes():
    random = np.random.default_rng(0)
    answers, compared, finite = answers_of(bj.Box), 0, 0
    for _ in range(CASES):
        center = centers(random, SIZE)
        low, high = ranges(random, center, radii(random, center))
        c = functions(random, SIZE)
        a, *ends = exact(c), exact(low), exact(high)
        corner = np.where(a > 0, ends[1], ends[0])
        points = [corner, ends[0] + ends[1] - corner]
        compared += len(points)
        finite += check(answers((low, high), c), points, a)
    return compared, finite


def compare_balls_in_boxes():
    random = np.random.default_rng(0)
    answers = answers_of(bj.BallBox)
    compared = finite = 0
    for _ in range(CASES):
        center = centers(random, SIZE)
        radius = radii(random, center).max()
        eps = np.full(SIZE, radius)
        low, high = ranges(random, center, eps)
        c = functions(random, SIZE)
        exactly = exact(c), exact(center), exact(eps)
        ends = exact(low), exact(high)
        points = best(*exactly, 2, *ends)
        points = [point for point in points if member(point, *exactly[1:], 2, *ends)]
        compared += len(points)
        finite += check(answers((center, radius, low, high), c), points, exactly[0])
    return compared, finite


COMPARISONS = {
    **{
        f"l{p} ball{', clipped' * clipped}": functools.partial(compare_balls, p, clipped)
        for p in (1, 2, np.inf)
        for clipped in (False, True)
    },
    "box": compare_boxes,
    "ball in a box": compare_balls_in_boxes,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.sampled(4)
def test_no_point_of_a_set_is_excluded(name):
    compared, finite = COMPARISONS[name]()
    assert compared > CASES
    assert finite > 0.5 * CASES * (SIZE + 3)


def test_a_middle_that_overflows_says_nothing():
    x = jnp.float32([3e38, 1.0])
    for of_x in (bj.Box(x, x), bj.LpBall(x, 0.0)):
        interval = of_x.outwards().interval()
        np.testing.assert_array_equal(interval.lower, [-np.inf, 1.0])
        np.testing.assert_array_equal(interval.upper, [np.inf, 1.0])
        assert not np.isfinite(interval.middle[0])
        assert interval.radius[0] == np.inf
    assert not np.isfinite(bj.Box(x, x).outwards().ball()[1])


# --- every slack is needed ----------------------------------------------------------------------


def unchanged(x, *_):
    return x


SLACKS = {
    "numbers that are not subnormal": (upward, "raised", unchanged, "l2 ball"),
    "ends that are not subnormal": (rounding, "raised", unchanged, "linf ball"),
    "the next number": (rounding, "_next", unchanged, "linf ball"),
    "errors of sums": (rounding, "_two_sum", lambda x, y: (x + y, 0 * x), "linf ball"),
    "ends": (rounding, "sum_above", jnp.add, "linf ball"),
    "sums": (upward, "sum_above", jnp.add, "l2 ball"),
    "slopes left to the box": (rounding, "sum_above", jnp.add, "ball in a box"),
    "middle and half-width": (rounding, "with_exact_middle", lambda *ends: ends, "box"),
    "the way to the middle": (upward, "spread_around", unchanged, "l1 ball, clipped"),
    "radii that are not subnormal": (
        rounding, "float_above", lambda x, dtype: jnp.asarray(x).astype(dtype), "l2 ball",
    ),
    "products": (upward, "PRODUCT_ERROR", 0.0, "l1 ball"),
    "products in a box": (upward, "product_above", jnp.multiply, "box"),
    "squares": (upward, "square_above", lambda x, price: x * x / (2 * price), "l2 ball"),
    "underflows of a sum": (upward, "UNDERFLOWS", 0.0, "ball in a box"),
    "subnormal factors": (
        upward, "is_subnormal", lambda x: jnp.zeros(x.shape, bool), "linf ball, clipped",
    ),
}  # fmt: skip


@pytest.mark.parametrize("slack", SLACKS)
@pytest.mark.sampled(4)
def test_without_a_slack_points_are_excluded(slack, monkeypatch):
    module, name, replacement, comparison = SLACKS[slack]
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(AssertionError):
        COMPARISONS[comparison]()


def above_of(bound, *arguments):
    return Fraction(float(bound(*(jnp.asarray(F32(a)) for a in arguments))))


def in_order(terms):
    return jax.lax.scan(lambda total, x: (total + x, None), jnp.float32(0), terms)[0]


COUNT = 4096
LOST = np.concatenate([[1.0], np.full(COUNT - 1, 2.0**-25)])  # each is lost where it is added to 1
SMALL = np.array([2.0**-125, *(2.0**-126 + 2.0**-149,) * 9])
EVALUATIONS = {
    # bound, arguments, exact value, what is taken away
    "additions": (upward.total_above, (LOST,), lambda t: sum(t), "gamma"),
    "additions of small numbers": (upward.total_above, (SMALL,), lambda t: sum(t), "underflow"),
    "combination": (
        upward.combination_above, (LOST, np.ones(COUNT), np.ones(COUNT)),
        lambda c, low, high: sum(c), "gamma",
    ),
    "small product": (
        upward.product_above, (1.5e-20, 1e-19), lambda x, y: x * y, "underflow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_slack_of_evaluations_in_the_worst_order(name, monkeypatch):
    bound, arguments, value, taken = EVALUATIONS[name]
    exactly = value(*(exact(F32(a)) for a in arguments))
    monkeypatch.setattr(upward, "_total", in_order)
    assert exactly <= above_of(bound, *arguments)
    if taken == "gamma":
        monkeypatch.setattr(Arithmetic, "gamma", lambda self, terms: 0.0)
    else:
        nothing = dataclasses.replace(Arithmetic.of(np.float32), underflow=0.0)
        monkeypatch.setattr(Arithmetic, "of", lambda dtype: nothing)
    assert above_of(bound, *arguments) < exactly


def test_the_error_of_powers_is_needed(monkeypatch):
    """With powers as wrong as they may be; q of p = 3 is 1.5."""
    values = np.full(1024, 1.0, np.float32)
    values[1:] = 2.0**-2
    cube = sum(float(v) ** 1.5 for v in values)  # exact in float64: powers of 2^-3
    power, off = jnp.power, 1.0 - 2.0 * upward.POWER_ERROR * 2.0**-24
    monkeypatch.setattr(upward, "_total", in_order)
    monkeypatch.setattr(upward.jnp, "power", lambda x, y: power(x, y) * F32(off))

    def excluded():
        above = Fraction(float(upward.norm_above(jnp.asarray(values), Fraction(3, 2))))
        return above**3 < Fraction(cube) ** 2

    assert not excluded()
    monkeypatch.setattr(upward, "POWER_ERROR", 0.0)
    monkeypatch.setattr(Arithmetic, "gamma", lambda self, terms: 0.0)
    assert excluded()


def test_sums_that_overflow_on_one_side_are_no_bound_on_the_other():
    large = F32(3e38)
    assert rounding.sum_above(-large, -large) == -np.finfo(np.float32).max
    terms = jnp.float32([-3e38, -3e38, 3e38, 3e38, 3e38])
    assert upward.combination_above(jnp.ones(5, jnp.float32), terms, terms) >= large


def test_numbers_are_rounded_to_the_dtype_of_the_center():
    center = jnp.zeros(1, jnp.float32)
    for number in (0.01, np.float64(0.1), [0.3], 1e-60):
        ball = bj.LpBall(center, number).outwards()
        assert Fraction(float(ball.interval().upper[0])) >= Fraction(np.ravel(number)[0])
    box = bj.Box(np.array([0.1]), np.array([0.1 + 1e-12])).outwards().interval()
    assert Fraction(float(box.lower[0])) <= Fraction(0.1)
    assert Fraction(float(box.upper[0])) >= Fraction(0.1 + 1e-12)
    with jax.enable_x64(True):
        ball = bj.LpBall(center, jnp.asarray(0.01, jnp.float64)).outwards()
        assert float(ball.interval().upper[0]) > 0.01


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32])
def test_integers_that_are_no_float32_are_rounded_outwards(dtype):
    odd = jnp.full(1, 2**24 + 1, dtype)  # nearest to 2^24
    interval = bj.LpBall(jnp.zeros(1, jnp.float32), odd).outwards().interval()
    assert float(interval.upper[0]) >= 2**24 + 1
    odd = jnp.full(1, 2**25 + 3, dtype)  # nearest to 2^25 + 4
    assert float(bj.Box(odd, odd).outwards().interval().lower[0]) <= 2**25 + 3
    small = jnp.full(1, 2**24 - 1, dtype)
    assert bj.Box(small, small).outwards().interval() == (2**24 - 1, 2**24 - 1)

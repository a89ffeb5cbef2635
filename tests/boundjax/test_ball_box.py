"""Balls cut by boxes: the maximum of a linear function against sorting, bisection and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import boundjax as bj
from boundjax.sets import BallBox, ball_box

pytestmark = pytest.mark.quick

SEEDS = st.integers(0, 2**32 - 1)
BATCH, SIZE = 64, 9


def problems(rng, count=BATCH, size=SIZE):
    """Coefficients `[count, size]`, radii `[count]`, room below and above (also 0 or inf)."""
    # Slopes of several magnitudes, so that the caps bind one after the other.
    c = rng.normal(size=(count, size)) * 10 ** rng.uniform(-2, 1, size=(count, size))
    c[rng.uniform(size=c.shape) < 0.1] = 0.0
    radius = 10 ** rng.uniform(-1.5, 1, size=count)
    below, above = rng.uniform(size=(2, count, size)) * 10 ** rng.uniform(-1.5, 0.5, (2, count, 1))
    for room in (below, above):
        room[rng.uniform(size=room.shape) < 0.1] = 0.0
        room[rng.uniform(size=room.shape) < 0.1] = np.inf
    return c, radius, below, above


def caps(c, radius, below, above):
    """How far each feature may move in the direction that increases the sum, `[n]`."""
    cap = np.minimum(np.maximum(np.where(c > 0, above, below), 0.0), radius)
    return np.where(c == 0, 0.0, cap)


def by_sorting(c, radius, below, above):
    """The maximum from the breakpoints of `||min(alpha |c|, cap)|| = radius`, sorted."""
    c, radius, below, above = (np.asarray(x, np.float64) for x in (c, radius, below, above))
    slope, cap = np.abs(c), caps(c, radius, below, above)
    slope, cap = slope[c != 0], cap[c != 0]
    if np.linalg.norm(cap) <= radius:
        return slope @ cap
    order = np.argsort(cap / slope)
    slope, cap = slope[order], cap[order]
    clipped = np.concatenate([[0.0], np.cumsum(cap**2)[:-1]])
    free = np.cumsum(slope[::-1] ** 2)[::-1]
    first = np.argmax(clipped + (cap / slope) ** 2 * free >= radius**2)
    alpha = np.sqrt((radius**2 - clipped[first]) / free[first])
    return slope @ np.minimum(alpha * slope, cap)


def by_bisection(c, radius, below, above):
    """The same maximum with `alpha` from bisection, which needs no breakpoints."""
    slope, cap = np.abs(c), caps(c, radius, below, above)
    if np.linalg.norm(cap) <= radius:
        return slope @ cap
    low, high = 0.0, 1e9
    for _ in range(200):
        alpha = 0.5 * (low + high)
        inside = np.linalg.norm(np.minimum(alpha * slope, cap)) <= radius
        low, high = (alpha, high) if inside else (low, alpha)
    return slope @ np.minimum(low * slope, cap)


def authors_iterates(c, radius, below, above, rounds=30):
    """Values of the published iteration: leave the box, stop at its border, stretch the rest."""
    cap = np.where(c > 0, above, below)
    slope = np.abs(c)
    clipped = np.zeros(c.shape, bool)
    delta = radius * slope / np.linalg.norm(slope)
    values = [slope @ delta]
    for _ in range(rounds):
        clipped |= delta > cap
        delta = np.where(clipped, cap, delta)
        left = radius**2 - np.sum(delta[clipped] ** 2)
        rest = np.linalg.norm(delta[~clipped])
        if left <= 0 or rest == 0:
            break
        delta = np.where(clipped, delta, delta * np.sqrt(left) / rest)
        values.append(slope @ delta)
    return np.array(values)


@functools.cache
def compiled(transformed):
    return jax.jit(jax.vmap(transformed))


GRADIENT = jax.jit(jax.vmap(jax.grad(ball_box.spread, argnums=(0, 1, 2, 3))))


def spread(*arguments, dtype=jnp.float64):
    with jax.enable_x64(dtype == jnp.float64):
        result = compiled(ball_box.spread)(*(jnp.asarray(x, dtype) for x in arguments))
        return np.asarray(result, np.float64)


def gradients(*arguments, dtype=jnp.float64):
    with jax.enable_x64(dtype == jnp.float64):
        result = GRADIENT(*(jnp.asarray(x, dtype) for x in arguments))
        return [np.asarray(x, np.float64) for x in result]


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-9), (jnp.float32, 1e-5)])
@given(seed=SEEDS)
def test_spread_is_the_maximum(dtype, rtol, seed):
    arguments = problems(np.random.default_rng(seed))
    arguments = [np.asarray(x, dtype) for x in arguments]
    result = spread(*arguments, dtype=dtype)
    expected = [by_sorting(*problem) for problem in zip(*arguments, strict=True)]
    np.testing.assert_allclose(result, expected, rtol=rtol)


@given(seed=SEEDS)
def test_spread_matches_bisection_and_lies_below_every_iterate_of_the_authors(seed):
    arguments = problems(np.random.default_rng(seed))
    result = spread(*arguments)
    longest = 0
    for value, *problem in zip(result, *arguments, strict=True):
        np.testing.assert_allclose(value, by_bisection(*problem), rtol=1e-9)
        iterates = authors_iterates(*problem)
        longest = max(longest, len(iterates))
        assert (iterates >= value * (1 - 1e-12)).all()
        assert (np.diff(iterates) <= 1e-12 * iterates[0]).all()
    assert longest > 3


@given(seed=SEEDS)
def test_spread_contains_samples_and_is_no_looser_than_ball_and_box(seed):
    rng = np.random.default_rng(seed)
    c, radius, below, above = problems(rng, size=3)
    result = spread(c, radius, below, above)
    rays = rng.normal(size=(4000, *c.shape))
    rays *= radius[:, None] / np.linalg.norm(rays, axis=-1, keepdims=True)
    # Clipping to a box around 0 keeps a point of the ball in the ball.
    points = np.clip(rays, -below, above)
    reached = np.max(np.sum(c * points, -1), 0)
    assert (reached <= result + 1e-12).all()
    assert np.mean(reached >= 0.9 * result) > 0.5
    ball = np.linalg.norm(c, axis=-1) * radius
    cap = [caps(*problem) for problem in zip(c, radius, below, above, strict=True)]
    box = np.sum(np.abs(c) * cap, -1)
    assert (result <= np.minimum(ball, box) * (1 + 1e-12)).all()


@compiled
def spread_of_wrong_price(factor, *arguments):
    right = ball_box._jitted_price
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ball_box, "_jitted_price", lambda *x: factor * right(*x))
        return ball_box.spread(*arguments)


@given(seed=SEEDS)
def test_any_multiplier_is_sound(seed):
    rng = np.random.default_rng(seed)
    arguments = problems(rng)
    exact = spread(*arguments)
    factors = 10 ** rng.uniform(-1, 1, size=BATCH)
    with jax.enable_x64(True):
        result = np.asarray(spread_of_wrong_price(*map(jnp.asarray, (factors, *arguments))))
    assert (result >= exact * (1 - 1e-12)).all()
    assert (result > exact * (1 + 1e-3)).any()


@given(seed=SEEDS)
def test_gradients_match_finite_differences(seed):
    arguments = problems(np.random.default_rng(seed))
    # Avoid the kinks, where a slope or the room is 0.
    c, radius, *rooms = arguments
    c = np.where(np.abs(c) < 1e-3, 0.3, c)
    arguments = (c, radius, *(np.where(room < 1e-3, 0.3, room) for room in rooms))
    step, size = 1e-7, 1 + np.abs(c).max(axis=1)
    for position, gradient in enumerate(gradients(*arguments)):
        for feature in range(SIZE) if gradient.ndim == 2 else [...]:
            at = (slice(None), feature) if gradient.ndim == 2 else ...
            up, down = list(arguments), list(arguments)
            up[position], down[position] = (arguments[position].copy() for _ in range(2))
            up[position][at] += step
            down[position][at] -= step
            difference = (spread(*up) - spread(*down)) / (2 * step)
            assert (np.abs(gradient[at] - difference) <= 1e-6 * size).all()


def test_forward_mode_agrees_with_reverse_mode():
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(x, jnp.float32) for x in problems(rng)]
    tangents = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in arguments]

    @jax.jit
    def both(arguments, tangents):
        forward = jax.jvp(jax.vmap(ball_box.spread), arguments, tangents)[1]
        slopes = jax.vmap(jax.grad(ball_box.spread, (0, 1, 2, 3)))(*arguments)
        products = [s * t for s, t in zip(slopes, tangents, strict=True)]
        return forward, sum(jnp.sum(p.reshape(BATCH, -1), 1) for p in products)

    forward, reverse = both(tuple(arguments), tuple(tangents))
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-4)


INF = np.inf
# c, radius, below, above, the maximum and its derivatives (None where there is a kink).
CORNERS = {
    "no slope": ([0, 0], 1, [1, 1], [1, 1], 0, ([0, 0], 0, [0, 0], [0, 0])),
    "no slope, no room": ([0, 0], 1, [0, 0], [0, 0], 0, ([0, 0], 0, [0, 0], [0, 0])),
    "one slope": ([3, 0], 1, [9, 9], [9, 9], 3, ([1, 0], 3, [0, 0], [0, 0])),
    "one slope, cap binds": ([3, 0], 1, [9, 9], [0.5, 9], 1.5, ([0.5, 0], 0, [0, 0], [3, 0])),
    "no radius": ([3, -4], 0, [1, 1], [1, 1], 0, ([0, 0], 5, [0, 0], [0, 0])),
    "no radius, one side": ([3, -4], 0, [0, 0], [1, 1], 0, ([0, 0], 3, [0, 0], None)),
    "no room": ([3, -4], 1, [0, 0], [0, 0], 0, ([0, 0], 0, None, None)),
    "no room above": ([3, -4], 1, [2, 2], [0, 0], 4, ([0, -1], 4, [0, 0], None)),
    "no room, negative": ([3, -4], 1, [2, 2], [-1, -1], 4, ([0, -1], 4, [0, 0], [0, 0])),
    "ball in box": ([3, -4], 1, [2, 2], [2, 2], 5, ([0.6, -0.8], 5, [0, 0], [0, 0])),
    "box in ball": ([3, -4], 9, [1, 2], [3, 4], 17, ([3, -2], 0, [0, 4], [3, 0])),
    "infinite room": ([3, -4], 1, [INF, INF], [INF, INF], 5, ([0.6, -0.8], 5, [0, 0], [0, 0])),
    "infinite radius": ([3, -4], INF, [1, 2], [3, 4], 17, ([3, -2], 0, [0, 4], [3, 0])),
    "infinite, no slope": ([0, -4], INF, [1, 2], [INF, INF], 8, ([0, -2], 0, [0, 4], [0, 0])),
    "all infinite, no slope": ([0, 0], INF, [INF, INF], [INF, INF], 0, None),
    "unbounded": ([3, -4], INF, [INF, INF], [INF, INF], INF, None),
    "unbounded on one side": ([3, -4], INF, [1, 1], [INF, 1], INF, None),
    "one cap binds": ([3, 4], 1, [9, 9], [9, 0.6], 4.8, ([0.8, 0.6], 3.75, [0, 0], [0, 1.75])),
}


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_corner_cases_have_values_and_gradients(dtype):
    *arguments, expected, slopes = zip(*CORNERS.values(), strict=True)
    result = spread(*map(np.array, arguments), dtype=dtype)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    derivatives = gradients(*map(np.array, arguments), dtype=dtype)
    assert all(np.isfinite(d).all() for d in derivatives)
    for k, (name, known) in enumerate(zip(CORNERS, slopes, strict=True)):
        for derivative, value in zip(derivatives, known or [], strict=False):
            if value is not None:
                np.testing.assert_allclose(derivative[k], value, 1e-6, 1e-9, err_msg=name)


def test_what_is_nan_or_negative_never_certifies():
    good = (np.array([3.0, -4.0, 0.0]), np.array(1.0), np.ones(3), np.ones(3))
    bad = []
    for position, argument in enumerate(good):
        for index in np.ndindex(argument.shape):
            case = [x.copy() for x in good]
            case[position][index] = np.nan
            bad.append(case)
    bad.append([good[0], np.array(-1.0), *good[2:]])
    result = spread(*(np.stack(x) for x in zip(*bad, strict=True)))
    assert np.isnan(result).all()


# Combinations whose maximum no float32 can hold are left out.
SCALES = [(1e-30, 1.0), (1e-30, 1e25), (1.0, 1e-25), (1.0, 1e25), (1e30, 1.0), (1e30, 1e-25)]


@pytest.mark.parametrize(("slope", "length"), SCALES)
def test_float32_neither_underflows_nor_overflows(slope, length):
    c, radius, below, above = problems(np.random.default_rng(3))
    c, lengths = slope * c, [length * x for x in (radius, below, above)]
    arguments = [np.asarray(x, np.float32) for x in (c, *lengths)]
    expected = [by_sorting(*problem) for problem in zip(*arguments, strict=True)]
    np.testing.assert_allclose(spread(*arguments, dtype=jnp.float32), expected, rtol=1e-5)
    result = gradients(*arguments, dtype=jnp.float32)
    exact = gradients(*arguments)
    for gradient, wanted, scale in zip(result, exact, [length, *3 * [slope]], strict=True):
        np.testing.assert_allclose(gradient / scale, wanted / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1e-20, 1e-10, 1e10])
def test_slopes_and_caps_of_very_different_size(shift):
    # The steep features have hardly any room, so the shallow ones decide.
    c, cap = np.array([[1.0, shift, 2 * shift]]), np.array([[1e-6 * min(shift, 1.0), 1.0, 1.0]])
    arguments = [np.asarray(x, np.float32) for x in (c, [0.5], cap, cap)]
    expected = by_sorting(*(x[0] for x in arguments))
    np.testing.assert_allclose(spread(*arguments, dtype=jnp.float32), expected, rtol=1e-5)


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="arrays of one shape"):
        ball_box.spread(jnp.ones(3), 1.0, jnp.ones(3), jnp.ones(2))
    with pytest.raises(ValueError, match="a scalar radius"):
        ball_box.spread(jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.ones(3))


def test_nothing_has_no_spread():
    assert ball_box.spread(*(jnp.zeros(0), 1.0, jnp.zeros(0), jnp.zeros(0))) == 0


def ball_boxes(rng, count=BATCH, size=3):
    center = rng.normal(size=(count, size))
    lower = center - rng.uniform(0, 1, size=center.shape)
    upper = center + rng.uniform(0, 1, size=center.shape)
    return center, rng.uniform(0.1, 1.5, size=count), lower, upper


@compiled
def bounds_of(center, radius, lower, upper, c):
    ball = BallBox(center, radius, lower, upper)
    return ball.support(c), ball.spread(c), *ball.interval()


@given(seed=SEEDS)
def test_ball_box_support_and_interval_are_those_of_the_set(seed):
    rng = np.random.default_rng(seed)
    center, radius, lower, upper = ball_boxes(rng)
    c = rng.normal(size=center.shape)
    with jax.enable_x64(True):
        bounds = bounds_of(*map(jnp.asarray, (center, radius, lower, upper, c)))
    support, spread_, low, high = map(np.asarray, bounds)
    exact = map(by_sorting, c, radius, center - lower, upper - center)
    np.testing.assert_allclose(support, list(exact) + np.sum(c * center, 1), 1e-9, 1e-12)
    np.testing.assert_allclose(spread_, support - np.sum(c * (low + high) / 2, 1), 1e-9, 1e-12)
    np.testing.assert_allclose(low, np.maximum(lower, center - radius[:, None]))
    np.testing.assert_allclose(high, np.minimum(upper, center + radius[:, None]))
    assert (spread_ <= np.sum(np.abs(c) * (high - low) / 2, 1) + 1e-12).all()


@given(seed=SEEDS)
def test_ball_box_whose_center_lies_outside_is_sound(seed):
    rng = np.random.default_rng(seed)
    center, radius, lower, upper = ball_boxes(rng)
    center += rng.uniform(-1, 1, size=center.shape)
    c = rng.normal(size=center.shape)
    with jax.enable_x64(True):
        bounds = bounds_of(*map(jnp.asarray, (center, radius, lower, upper, c)))
    support, _, low, high = map(np.asarray, bounds)
    points = rng.uniform(lower, upper, size=(2000, *lower.shape))
    inside = np.linalg.norm(points - center, axis=-1) <= radius
    reached = np.max(np.where(inside, np.sum(c * points, -1), -np.inf), 0)
    # The support is NaN where ball and box do not meet in some feature.
    assert (~(reached > support + 1e-12)).all()
    box = np.sum(c * (low + high) / 2, 1) + np.sum(np.abs(c) * (high - low) / 2, 1)
    assert (~(support > box + 1e-12)).all()
    assert np.isfinite(reached).any()
    assert (np.isnan(support) <= ~np.isfinite(reached)).all()


def test_ball_box_is_ball_or_box_where_the_other_is_infinite():
    c, center = jnp.array([3.0, -4.0]), jnp.array([1.0, 2.0])
    everything = jnp.full(2, jnp.inf)
    ball = BallBox(center, 2.0, -everything, everything)
    np.testing.assert_allclose(ball.support(c), bj.LpBall(center, 2.0, p=2).support(c), rtol=1e-6)
    box = BallBox(center, jnp.inf, center - 1.0, center + 3.0)
    np.testing.assert_allclose(
        box.support(c), bj.Box(center - 1.0, center + 3.0).support(c), rtol=1e-6
    )
    assert isinstance(ball, bj.InputSet)
    assert not ball.is_box


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_ball_box_has_the_derivatives_of_its_ball_where_no_cap_binds(radius):
    c, ones = jnp.array([3.0, -4.0]), jnp.ones(2)
    slopes = jax.jit(jax.grad(BallBox.support))(BallBox(ones, radius, 0.0 * ones, 2.0 * ones), c)
    np.testing.assert_allclose(slopes.center, c, rtol=1e-6)
    np.testing.assert_allclose(slopes.radius, 5.0, rtol=1e-6)
    np.testing.assert_allclose([slopes.lower, slopes.upper], np.zeros((2, 2)))


def test_ball_box_is_an_input_set_of_the_transforms():
    weights = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    ball = BallBox(jnp.ones(2), 1.0, jnp.array([0.5, -9.0]), jnp.array([1.1, 9.0]))
    bounds = jax.jit(bj.linear(lambda x: weights @ x))(ball)
    for row, lower, upper in zip(weights, *bounds, strict=True):
        np.testing.assert_allclose(upper, ball.support(row), rtol=1e-6)
        np.testing.assert_allclose(lower, -ball.support(-row), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), 1.0, np.zeros(3), np.ones(2)), r"arrays of one shape, got center \(2,\)"),
        ((np.zeros(2), -1.0, np.zeros(2), np.ones(2)), r"radius must be >= 0, got -1\.0"),
        ((np.zeros(2), np.nan, np.zeros(2), np.ones(2)), r"radius must be >= 0, got nan"),
        (
            (np.zeros(2), 1.0, np.ones(2), np.zeros(2)),
            r"lower <= upper, got 1\.0 > 0\.0 at index 0",
        ),
        ((np.array([0, np.inf]), 1.0, np.zeros(2), np.ones(2)), "center must be finite, got inf"),
    ],
)
def test_bad_ball_boxes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BallBox(*arguments)


def test_bad_ball_boxes_under_jit_are_nan():
    arrays = (jnp.zeros(2), jnp.float32(1.0), -jnp.ones(2), jnp.ones(2))
    bad = [
        (arrays[0].at[0].set(jnp.nan), *arrays[1:]),
        (arrays[0], jnp.float32(jnp.nan), *arrays[2:]),
        (arrays[0], jnp.float32(-1.0), *arrays[2:]),
        (*arrays[:2], jnp.array([2.0, -1.0]), arrays[3]),
        (arrays[0] + 5.0, *arrays[1:]),
    ]
    support, spread_, lower, upper = bounds_of(
        *map(jnp.stack, zip(*bad, strict=True)), jnp.ones((5, 2))
    )
    assert jnp.isnan(support).all()
    assert jnp.isnan(spread_).all()
    assert (jnp.isnan(lower) & jnp.isnan(upper)).any(axis=1).all()


def test_a_batch_of_ball_boxes_is_one_under_vmap():
    center, radius, lower, upper = map(
        jnp.asarray, map(np.float32, ball_boxes(np.random.default_rng(1), 5))
    )
    balls = jax.vmap(BallBox)(center, radius, lower, upper)
    c = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4, 3)), jnp.float32)
    result = jax.jit(jax.vmap(lambda ball, rows: jax.vmap(ball.spread)(rows)))(balls, c)
    repeated = [jnp.repeat(x, 4, axis=0) for x in (center, radius, lower, upper)]
    single = bounds_of(*repeated, c.reshape(20, 3))[1]
    np.testing.assert_allclose(result.ravel(), single, rtol=1e-6)
    with pytest.raises(ValueError, match=r"radius must be a scalar, got shape \(5,\)"):
        balls.spread(c[:, 0])


@compiled
def clipped_support(center, eps, c):
    ball = bj.LpBall(center, eps, p=2, clip=(0.0, 1.0))
    return ball.support(c), *ball.interval()


@given(seed=SEEDS, per_feature=st.booleans())
def test_clipped_l2_ball_is_exact(seed, per_feature):
    rng = np.random.default_rng(seed)
    center, c = rng.uniform(size=(BATCH, 3)), rng.normal(size=(BATCH, 3))
    center[rng.uniform(size=center.shape) < 0.2] = 1.0
    eps = rng.uniform(0, 1, size=(BATCH, 3)) * (rng.uniform(size=(BATCH, 3)) < 0.8)
    if not per_feature:
        eps[:] = rng.uniform(0, 1, size=(BATCH, 1))
    with jax.enable_x64(True):
        result, *ends = map(np.asarray, clipped_support(*map(jnp.asarray, (center, eps, c))))
    unit = np.where(eps > 0, eps, 1.0)
    rooms = (center / unit, (1 - center) / unit)
    exact = [
        by_bisection(*problem) for problem in zip(eps * c, np.ones(BATCH), *rooms, strict=True)
    ]
    np.testing.assert_allclose(result, exact + np.sum(c * center, 1), rtol=1e-9, atol=1e-12)
    # Brute force: rays to the sphere, cut by the box.
    rays = rng.normal(size=(4000, BATCH, 3))
    points = np.clip(rays / np.linalg.norm(rays, axis=-1, keepdims=True), -rooms[0], rooms[1])
    reached = np.max(np.sum(c * (center + eps * points), -1), 0)
    assert (reached <= result + 1e-12).all()
    # The bound without the closed form: the smaller of the supports of ball and box.
    ball = np.sum(c * center, 1) + np.linalg.norm(eps * c, axis=1)
    box = np.sum(np.where(c > 0, c * ends[1], c * ends[0]), 1)
    assert (result <= np.minimum(ball, box) + 1e-12).all()
    assert (result < np.minimum(ball, box) - 1e-3).any()


@given(seed=SEEDS)
def test_clipped_l2_ball_with_a_center_outside_is_sound_and_no_looser(seed):
    rng = np.random.default_rng(seed)
    center, c = rng.uniform(-0.4, 1.4, size=(BATCH, 3)), rng.normal(size=(BATCH, 3))
    eps = rng.uniform(0.5, 1, size=(BATCH, 1)) * np.ones(3)
    with jax.enable_x64(True):
        result, *ends = map(np.asarray, clipped_support(*map(jnp.asarray, (center, eps, c))))
    points = rng.uniform(size=(4000, BATCH, 3))
    inside = np.linalg.norm((points - center) / eps, axis=-1) <= 1
    reached = np.max(np.where(inside, np.sum(c * points, -1), -np.inf), 0)
    assert (reached <= result + 1e-12).all()
    ball = np.sum(c * center, 1) + np.linalg.norm(eps * c, axis=1)
    box = np.sum(np.where(c > 0, c * ends[1], c * ends[0]), 1)
    assert (result <= np.minimum(ball, box) + 1e-12).all()


def test_clipped_l2_ball_has_gradients_on_the_border_and_at_radius_zero():
    @jax.jit
    @jax.vmap
    def slopes(center, eps, c):
        def support(center, eps, c):
            return bj.LpBall(center, eps, p=2, clip=(0.0, 1.0)).support(c)

        return jax.grad(support, argnums=(0, 1, 2))(center, eps, c)

    center = jnp.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [0.2, 0.0, 0.0]])
    eps = jnp.array([[0.0, 0.0, 0.0], [0.3, 0.0, 9.0], [0.1, 0.1, 0.1]])
    c = jnp.array([[1.0, 1.0, -2.0], [1.0, 1.0, -2.0], [0.0, 0.0, 0.0]])
    for gradient in slopes(center, eps, c):
        assert jnp.isfinite(gradient).all()

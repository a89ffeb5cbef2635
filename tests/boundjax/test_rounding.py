"""Outward rounding of certificates' input sets, against exact fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.sets import rounding

FLOATS = {"float32": np.float32, "float64": np.float64}


def exactly(values):
    return [Fraction(float(v)) for v in np.ravel(values)]


def centers_and_radii(dtype, count=4000):
    """Centers of all magnitudes, with radii from far below to far above their spacing."""
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.integers(-40, 40, count)
    center = (rng.choice([-1, 1], count) * rng.uniform(1, 2, count) * size).astype(dtype)
    # At a power of two the spacings below and above differ.
    center[::5] = np.sign(center[::5]) * size[::5].astype(dtype)
    spacing = np.spacing(np.abs(center)).astype(np.float64)
    radius = (spacing * 2.0 ** rng.uniform(-30, 30, count)).astype(dtype)
    radius[1::7] = (0.5 * spacing[1::7] * rng.integers(0, 8, len(spacing[1::7]))).astype(dtype)
    return center, radius


@pytest.mark.parametrize("dtype", FLOATS)
def test_outward_ends_hold_the_exact_ones_and_are_next_to_them(dtype):
    with jax.enable_x64(dtype == "float64"):
        center, radius = centers_and_radii(FLOATS[dtype])
        ends = jax.jit(rounding.outward_ends)(jnp.asarray(center), jnp.asarray(radius))
        lower, upper = map(np.asarray, ends)
    nearest = center - radius, center + radius
    rows = zip(*map(exactly, (center, radius, lower, upper, *nearest)), strict=True)
    collapsed = 0
    for x, r, low, high, near_low, near_high in rows:
        assert low <= x - r
        assert x + r <= high
        # Ends that are exact stay as they are.
        assert low == near_low or near_low != x - r
        assert high == near_high or near_high != x + r
        collapsed += near_low == near_high and r > 0
    assert collapsed > 100  # the samples include radii that rounding to nearest loses
    one_further = np.nextafter(nearest[0], -np.inf), np.nextafter(nearest[1], np.inf)
    assert (lower >= one_further[0]).all()
    assert (upper <= one_further[1]).all()


def test_ends_that_underflow_are_outward_too():
    tiny = np.float32(np.finfo(np.float32).tiny)
    center = np.float32([tiny, 1.5 * tiny, -tiny, 1.0, 1e-30, 0.0, tiny])
    radius = np.float32([1.25 * tiny, tiny, 1.5 * tiny, tiny, tiny, tiny, tiny])
    lower, upper = map(np.asarray, jax.jit(rounding.outward_ends)(center, radius))
    for x, r, low, high in zip(*map(exactly, (center, radius, lower, upper)), strict=True):
        assert low <= x - r
        assert x + r <= high
    assert lower[-1] == 0.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_middle_and_half_width_describe_the_ends_exactly(dtype):
    with jax.enable_x64(dtype == "float64"):
        center, radius = centers_and_radii(FLOATS[dtype])
        lower, upper = center - radius, center + radius
        upper[::3] = np.nextafter(lower[::3], np.inf)  # one spacing; its half is not representable
        lower[1::11] = -0.3 * upper[1::11]
        lower, upper = np.minimum(lower, upper), np.maximum(lower, upper)
        moved = jax.jit(rounding.with_exact_middle)(jnp.asarray(lower), jnp.asarray(upper))
        interval = bj.Box(*moved).interval()
        middle, half = map(np.asarray, (interval.middle, interval.radius))
    rows = zip(*map(exactly, (lower, upper, *moved, middle, half)), strict=True)
    for low, high, new_low, new_high, m, h in rows:
        assert new_low <= low
        assert high <= new_high
        assert m - h == new_low
        assert m + h == new_high
        # At most two spacings of the larger end.
        room = 2 * Fraction(float(np.spacing(FLOATS[dtype](max(abs(new_low), abs(new_high))))))
        assert low - new_low <= room
        assert new_high - high <= room


@pytest.mark.parametrize("p", [1, 2, 3, jnp.inf])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.sampled(4)
def test_an_outward_ball_holds_the_ball(p, clip):
    rng = np.random.default_rng(0)
    center = rng.uniform(size=(200, 5)).astype(np.float32)
    center[:, 0], center[::2, 1] = 0.0, 1.0
    eps = (np.spacing(np.float32(1)) * 2.0 ** rng.uniform(-4, 20, 200)).astype(np.float32)
    ball = lambda x, e: bj.LpBall(x, e, p, clip, outward=True)  # noqa: E731
    lower, upper = jax.vmap(lambda x, e: tuple(ball(x, e).interval()))(center, eps)
    coefficients = rng.normal(size=center.shape).astype(np.float32)
    support = jax.vmap(lambda x, e, c: ball(x, e).support(c))(center, eps, coefficients)
    offset = np.float64(eps)[:, None] * np.sign(coefficients)
    if p != jnp.inf:
        offset = offset * np.eye(5)[np.abs(coefficients).argmax(1)]
    point = np.float64(center) + offset
    if clip is not None:
        point = point.clip(*clip)
    assert (np.float64(lower) <= point).all()
    assert (point <= np.float64(upper)).all()
    assert (np.sum(point * coefficients, 1) <= np.float64(support) + 1e-6).all()


def test_a_radius_of_0_is_the_point_and_training_keeps_the_nearest_ends():
    x = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
    for outward in (False, True):
        lower, upper = bj.LpBall(x, 0.0, outward=outward).interval()
        np.testing.assert_array_equal(lower, x)
        np.testing.assert_array_equal(upper, x)
    lower, upper = bj.LpBall(x, 0.1).interval()
    np.testing.assert_array_equal(lower, x - jnp.float32(0.1))
    np.testing.assert_array_equal(upper, x + jnp.float32(0.1))


def test_the_ends_keep_their_derivatives():
    x = jnp.asarray([0.3, 0.95, 0.0], jnp.float32)

    def width(eps, outward):
        return bj.LpBall(x, eps, clip=(0.0, 1.0), outward=outward).interval().width.sum()

    assert jax.grad(width)(0.1, True) == jax.grad(width)(0.1, False) == 4.0


def test_numbers_are_rounded_up_to_float32_and_never_to_subnormal_ones():
    values = [0.01, 0.1, 1.0, 8 / 255, 1e-44, -1e-44, 0.0, -0.3]
    rounded = rounding.up(values, np.dtype(np.float32))
    assert rounded.dtype == np.float32
    for value, up in zip(values, rounded, strict=True):
        assert Fraction(value) <= Fraction(float(up))
        below = Fraction(float(np.nextafter(up, np.float32(-np.inf))))
        assert below < Fraction(value) or abs(value) < 1e-38
    assert rounded[4] == np.finfo(np.float32).tiny
    assert rounded[2] == 1.0
    float32s = np.float32([0.01, 0.1])
    np.testing.assert_array_equal(rounding.up(float32s, np.dtype(np.float32)), float32s)


# --- certificates ---------------------------------------------------------------------------------

METHODS = (
    *("interval", "crown-ibp", "one-step", "crown", "fast-lin", "alpha-crown", "best"),
    "complete",
)


def steep(x):
    """The margin of class 0 is `5 - 1e6 (x - 1000)`: positive up to a radius of 5e-6."""
    return jnp.concatenate([5.0 - 1e6 * (x - 1000.0), 0.0 * x], axis=1)


@pytest.mark.parametrize(
    "method",
    [m if m in METHODS[:2] else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
@pytest.mark.parametrize("clip", [None, (1000.0, 2000.0), (0.0, 1000.0)])
@pytest.mark.sampled(7)
def test_a_radius_below_the_spacing_of_the_input_is_not_lost(method, clip):
    x, labels = np.float32([[1000.0]]), np.array([0])
    options = {"labels": labels, "method": method, "clip": clip}
    # Otherwise the proof charges the rounding of x - 1000, although that is exact.
    nearest = {**options, "rounding": "nearest"}
    if clip == (0.0, 1000.0):  # the worst point is 1000 itself, which is robust
        assert bj.certify(steep, x, 2e-5, **nearest).verified.all()
        return
    assert bj.certify(steep, x, 0.0, **nearest).verified.all()
    for eps in (6e-6, 2e-5, 4.5e-5, 7e-5):
        for arguments in (options, nearest) if eps == 6e-6 else (nearest,):
            certificate = bj.certify(steep, x, eps, **arguments)
            assert certificate.margins[0, 1] <= 5 - 1e6 * eps + 1e-3
            assert not certificate.verified.any()
    if method == "complete":  # it has no radii
        return
    radius = bj.certified_radius(steep, x, eps_max=1e-4, steps=20, **nearest)
    assert radius[0] <= 5.000001e-6


@pytest.mark.slow
@pytest.mark.parametrize("norm", [1, 2, jnp.inf])
@pytest.mark.parametrize("method", ["interval", "crown-ibp", "bcp", "lmt"])
def test_pixels_up_to_255_have_small_radii_too(norm, method):
    rng = np.random.default_rng(0)
    x = rng.integers(128, 256, size=(16, 6)).astype(np.float32)
    kernel = np.float32(2.0) ** rng.integers(10, 20, size=6) * rng.choice([-1, 1], size=6)
    kernel = kernel.astype(np.float32)

    def apply(x, center):
        margin = (x - center) @ jnp.asarray(kernel)[:, None]
        return jnp.concatenate([jnp.zeros_like(margin), margin], axis=1)

    eps = 4e-6  # below half a spacing of 255, which is 7.6e-6
    size = {1: np.abs(kernel).max(), 2: np.linalg.norm(kernel), jnp.inf: np.abs(kernel).sum()}
    for row in x[:4]:
        certificate = bj.certify(
            lambda z, row=row: apply(z, row[None]),
            row[None],
            eps,
            labels=np.array([0]),
            norm=norm,
            method=method,
        )
        assert certificate.margins[0, 1] <= -eps * size[norm] * (1 - 1e-5)


def test_a_radius_that_is_no_float32_is_rounded_up():
    # 0.01 lies above the nearest float32; a margin that is 0 at exactly 0.01 must not be positive.
    assert float(np.float32(0.01)) < 0.01
    threshold = np.nextafter(np.float32(0.01), np.float32(1))

    def apply(x):
        return jnp.concatenate([jnp.full_like(x, threshold), x], axis=1)

    for mode, slack in (("nearest", 0.0), ("real", 1e-7)):
        certificate = bj.certify(
            apply, np.float32([[0.0]]), 0.01, labels=np.array([0]), rounding=mode
        )
        assert -slack <= certificate.margins[0, 1] <= 0.0
        assert not certificate.verified.any()

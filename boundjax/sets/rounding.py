"""Floating-point arithmetic: how much it may round, and ends that are rounded outwards.

The ends of a set must enclose every point that was asked for. Rounded to nearest, `center - eps`
and `center + eps` may both equal `center` (where `eps` is below half a spacing of `center`), and
bounds on that set would say nothing about the requested radius.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from boundjax.numerics import float_info, with_derivative_of
from boundjax.sets.interval import Interval

# What bounds hold for: `"nearest"`, the network in real arithmetic up to the rounding of the bounds
# themselves; `"real"`, the network in real arithmetic; `"float32"`, also every execution of it in
# the floating-point arithmetic of its inputs.
Rounding: TypeAlias = Literal["nearest", "real", "float32"]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The facts of a floating-point format on which error bounds rest.

    Attributes:
      unit: half the spacing of the numbers from 1 to 2, the relative error of one operation.
      underflow: the smallest normal number, which an operation that underflows may lose, since XLA
        treats subnormal numbers as 0.
    """

    unit: float
    underflow: float

    @classmethod
    def of(cls, dtype: Any) -> Arithmetic:
        """That of a floating-point dtype."""
        info = float_info(np.dtype(dtype))
        return cls(float(info.eps) / 2, float(info.tiny))

    def gamma(self, terms: float) -> float:
        """The relative error of a sum of this many products, `[0, inf]`.

        It is relative to the sum of the absolute values and holds for any order of summation, with
        or without fused multiply-add. Four more terms pay for what XLA rewrites, such as `a / c` to
        `a * (1 / c)`. Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", 3.1.
        """
        share = (terms + 4) * self.unit
        return share / (1.0 - share) if share < 0.25 else math.inf


def outward_ends(center: Array, radius: Array) -> tuple[Array, Array]:
    """`center - radius` and `center + radius`, rounded outwards where they are inexact.

    Args:
      center: any shape.
      radius: of the same shape, `>= 0`; NaN gives NaN.

    Returns:
      The lower and the upper end. Exact sums are left alone, so a radius of 0 gives the point,
      unless that is a subnormal number.
    """
    return -sum_above(-center, radius), sum_above(center, radius)


def is_subnormal(x: Array) -> Array:
    """Where numbers are subnormal, elementwise, decided by their bits.

    A comparison cannot tell: XLA reads subnormal operands as 0.
    """
    info = float_info(x.dtype)
    unsigned = np.dtype(f"uint{info.bits}")
    magnitude = jax.lax.bitcast_convert_type(x, unsigned) & unsigned.type((1 << info.bits - 1) - 1)
    return (magnitude > 0) & (magnitude < unsigned.type(1 << info.nmant))


def with_flushed(lower: Array, upper: Array) -> tuple[Array, Array]:
    """Ends between which a number also lies if it is subnormal and read as 0.

    Ends that are subnormal themselves move to the smallest normal numbers around 0.
    """
    tiny = float(float_info(lower.dtype).tiny)
    return (
        jnp.where(is_subnormal(lower), -tiny, lower),
        jnp.where(is_subnormal(upper), tiny, upper),
    )


def raised(x: Array) -> Array:
    """The smallest number `>= x` that is not subnormal, elementwise; its derivative is 1."""
    info = float_info(x.dtype)
    fixed = jax.lax.stop_gradient(x)
    above = jnp.where(jnp.signbit(fixed), 0.0, float(info.tiny)).astype(x.dtype)
    return with_derivative_of(jnp.where(is_subnormal(fixed), above, fixed), x)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """The rounded sum and its error: `x + y` is exactly their sum, unless the error underflows."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def flushed(x: Array) -> Array:
    """`x` with 0 for subnormal numbers, as XLA reads them; its derivative is 1."""
    fixed = jax.lax.stop_gradient(x)
    return with_derivative_of(jnp.where(is_subnormal(fixed), 0.0, fixed), x)


def sum_above(x: Array, y: Array) -> Array:
    """An upper bound on `x + y`, elementwise: equal to it where the sum is exact, else the next."""
    x, y = raised(x), raised(y)
    total, error = _two_sum(x, y)
    info = float_info(x.dtype)
    # A sum of finite numbers may overflow to -inf, which is below it.
    total = jnp.where((total == -jnp.inf) & (x > -jnp.inf) & (y > -jnp.inf), info.min, total)
    # XLA flushes errors and sums that underflow to 0.
    small = jnp.minimum(jnp.abs(x), jnp.abs(y)) < info.tiny / info.eps**2
    underflows = small & (x != 0) & (y != 0) & (x != -y)
    return jnp.where(((error > 0) | underflows) & jnp.isfinite(total), _next(total), total)


def with_exact_middle(lower: Array, upper: Array) -> tuple[Array, Array]:
    """Moves ends outwards, by two spacings at most, until middle and half-width are exact.

    Transforms compute with `(lower + upper) / 2` and `(upper - lower) / 2`. Once rounded, these may
    describe a smaller interval than the ends do, such as half of `[x, x + one spacing]`. Afterwards
    ends, middle and half-width are no subnormal numbers. The spacing of the smallest normal number
    counts as twice that number, because anything finer has subnormal half-widths. Ends whose sum
    overflows become infinite.
    """
    lower, upper = -raised(-lower), raised(upper)
    info = float_info(lower.dtype)
    largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    inexact = (_two_sum(lower, upper)[1] != 0) | (_two_sum(upper, -lower)[1] != 0)
    # The errors of small sums may underflow and look like 0. Only these sums are certainly exact:
    # those that are 0, twice an end, or an end itself.
    simple = (jnp.abs(lower) == jnp.abs(upper)) | (lower == 0) | (upper == 0)
    inexact = jnp.where(largest < 4.0 * info.tiny / info.eps**2, ~simple, inexact)
    # Halves of the smallest normal numbers are subnormal.
    for end in (lower, upper):
        inexact = inexact | ((end != 0) & (jnp.abs(end) < 2.0 * info.tiny))
    # On multiples of `grid` the ends, their sum and their difference are exact.
    _, exponent = jnp.frexp(largest)
    exponent = jnp.maximum(exponent - info.nmant, info.minexp + 1)
    grid = jnp.ldexp(jnp.ones_like(lower), exponent)
    moves = inexact & jnp.isfinite(largest)
    grid = jnp.where(moves, grid, 1.0)
    lower = jnp.where(moves, -_ceiling(-lower, grid), lower)
    upper = jnp.where(moves, _ceiling(upper, grid), upper)
    # An infinite middle with a finite half-width would exclude the interval.
    overflows = jnp.isfinite(lower) & jnp.isfinite(upper) & jnp.isinf(lower + upper)
    return jnp.where(overflows, -jnp.inf, lower), jnp.where(overflows, jnp.inf, upper)


def _ceiling(x: Array, grid: Array) -> Array:
    """The smallest multiple of a power of two that is `>= x`; `x / grid` may underflow."""
    multiple = jnp.ceil(x / grid)
    return grid * jnp.where(x > 0, jnp.maximum(multiple, 1.0), multiple)


def up(value: ArrayLike, dtype: np.dtype[Any]) -> np.ndarray:
    """The smallest normal numbers of a floating dtype that are `>= value`, elementwise.

    Subnormal numbers are skipped because XLA treats them as 0.
    """
    exact = np.asarray(value)
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype)
    rounded = np.where(rounded < exact, np.nextafter(rounded, dtype.type(np.inf)), rounded)
    tiny = float_info(dtype).tiny
    rounded = np.where((rounded > 0) & (rounded < tiny), tiny, rounded)
    return np.where((rounded < 0) & (rounded > -tiny), 0.0, rounded).astype(dtype)


def inward_ends(
    center: np.ndarray, radius: ArrayLike, clip: tuple[ArrayLike, ArrayLike] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ends, in the dtype of `center`, of a box inside of the exact ball of the norm inf.

    Args:
      center: any shape, float32 or float64.
      radius: broadcasts to it; numbers count as they are, before they are rounded to the dtype.
      clip: a range to cut the ball to, or None.

    Returns:
      The lower and the upper end. Where no number of the dtype lies in the set, both are the one
      nearest to its middle.
    """
    dtype = center.dtype

    def lower_end(center: np.ndarray, radius: np.ndarray, low: Any, high: Any) -> np.ndarray:
        total = center - radius
        part = total - center
        error = (center - (total - part)) + (-radius - part)  # `total + error` is exact
        total = np.where(error > 0, np.nextafter(total, np.inf), total)
        return np.clip(np.minimum(total, center), low, high)

    double, size = center.astype(np.float64), np.asarray(radius).astype(np.float64)
    low, high = (-np.inf, np.inf) if clip is None else (np.asarray(c, np.float64) for c in clip)
    below = lower_end(double, size, low, high)
    above = -lower_end(-double, size, -high, -low)
    lower, upper = up(below, dtype), -up(-above, dtype)
    middle = (0.5 * below + 0.5 * above).astype(dtype)
    return np.where(lower > upper, middle, lower), np.where(lower > upper, middle, upper)


def number_above(value: Any, like: Any) -> Any:
    """A number or a numpy array, rounded up to the dtype of `like` where it is inexact.

    Everything else, JAX's arrays among them, is returned as it is. So is what the dtype can
    represent: pytrees of axes, for instance, hold Python's integers.

    Args:
      value: a field of a set.
      like: the field that determines the dtype, an array or what becomes one.
    """
    exact = _numbers(value)
    if exact is None:
        return value
    above = up(exact, _float_dtype(like))
    return value if np.array_equal(above, exact, equal_nan=True) else above


def number_below(value: Any, like: Any) -> Any:
    """`number_above`, rounded down."""
    exact = _numbers(value)
    if exact is None:
        return value
    below = -up(-exact.astype(np.float64), _float_dtype(like))
    return value if np.array_equal(below, exact, equal_nan=True) else below


def outward_numbers(low: Any, high: Any, like: Any) -> tuple[Any, Any]:
    """`number_below` of the leaves of a pytree and `number_above` of those of another.

    Args:
      low, high: numbers, arrays or pytrees of them, or None.
      like: the pytree that determines the dtype, which its leaves share.
    """
    leaves = jax.tree.leaves(like)
    if not leaves:  # a placeholder
        return low, high
    like = leaves[0]
    below = jax.tree.map(functools.partial(number_below, like=like), low)
    return below, jax.tree.map(functools.partial(number_above, like=like), high)


def _float_dtype(like: Any) -> np.dtype[Any]:
    dtype = jnp.asarray(like).dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) else np.dtype(np.float32)


def _numbers(value: Any) -> np.ndarray | None:
    """Python's numbers, lists of them, or numpy's arrays as a numpy array; None for the rest."""
    for leaf in jax.tree.leaves(value):
        if not isinstance(leaf, (int, float, np.ndarray, np.generic)):
            return None
    array: np.ndarray[Any, np.dtype[Any]] = np.asarray(value)
    return array if array.dtype.kind in "iuf" else None


def float_above(value: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """An array in a floating dtype, rounded up and never subnormal; its derivative is 1."""
    array = jnp.asarray(value)
    nearest = array.astype(dtype)
    fixed = jax.lax.stop_gradient(nearest)
    if _widens(array.dtype, dtype):
        above = fixed
    elif jnp.issubdtype(array.dtype, jnp.floating):
        exact = fixed.astype(array.dtype) >= jax.lax.stop_gradient(array)
        above = jnp.where(exact, fixed, _next(fixed))
    else:
        above = jnp.where(_is_integer(fixed), fixed, _next(fixed))
    return with_derivative_of(raised(above), nearest)


def float_below(value: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """`float_above`, rounded down."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return -float_above(-array, dtype)
    nearest = array.astype(dtype)  # before the sign changes: integers may be unsigned
    fixed = -jax.lax.stop_gradient(nearest)
    below = jnp.where(_is_integer(fixed), fixed, _next(fixed))
    return with_derivative_of(-below, nearest)


def _widens(dtype: np.dtype[Any], to: np.dtype[Any]) -> bool:
    """Whether a floating dtype is no wider than another one."""
    return jnp.issubdtype(dtype, jnp.floating) and float_info(dtype).nmant <= float_info(to).nmant


def _is_integer(x: Array) -> Array:
    """Where `x` is small enough to be exactly the integer from which it was converted.

    In float32 2^24 is too large: 2^24 + 1 is also converted to it.
    """
    return jnp.abs(x) < 2.0 ** (float_info(x.dtype).nmant + 1)


def _next(x: Array) -> Array:
    """A number above `x`, the next one unless `x` is 0 or at a power of two."""
    info = float_info(x.dtype)
    # Adding slightly more than half a spacing rounds to the next number.
    step = (0.5 * info.eps) * (1.0 + 2.0 * info.eps) * jnp.abs(x)
    return x + jnp.maximum(step, info.tiny)


def enclosure(ends: Interval, nearest: Interval) -> Interval:
    """Ends whose middle and half-width are exact, with the derivative of the nearest ends.

    Rounding has no derivative, so the derivative is that of the rounded sums.
    """
    exact = with_exact_middle(*jax.lax.stop_gradient(ends))
    return Interval(*map(with_derivative_of, exact, nearest))

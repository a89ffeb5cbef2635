"""Perturbed integers while tracing: carried as floating-point numbers that are whole.

A graph has no perturbed integers. Where a function makes one (a cast, a count, an index), tracing
carries it in the dtype of the input, and every walk treats it like any other number. Two facts
remain of its type: it is whole, so the ends of its interval are rounded to integers; and outside of
a range the integer wraps around or float arithmetic rounds, so that it has no bounds there.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.composite import composite
from boundjax.ir.families import Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.ops import piecewise


def ends(lower: Array, upper: Array) -> tuple[Array, Array]:
    """The least and the largest integer of an interval whose ends may be off by some roundings."""

    def slack(end: Array) -> Array:
        share = 16.0 * float(jnp.finfo(end.dtype).eps)
        return 0.25 + share * jnp.where(jnp.isfinite(end), jnp.abs(end), 0.0)

    return jnp.ceil(lower - slack(lower)), jnp.floor(upper + slack(upper))


def largest_exact(dtype: np.dtype) -> int:
    """Up to this magnitude sums, differences and products of integers are exact in a dtype."""
    return 2 ** (int(jnp.finfo(dtype).nmant) + 1)


def within(x: Array, dtype: np.dtype, terms: int = 1) -> Array:
    """Marks `x` as an integer of this type, exact in floating point. Only for traced graphs.

    Bounds are NaN where the interval leaves the type's range, or the range in which the arithmetic
    of floating-point numbers is that of integers.

    Args:
      x: floating-point, whole.
      dtype: an integer type.
      terms: how many elements of `x` are summed next; partial sums must be exact, too.
    """
    info, most = np.iinfo(dtype), largest_exact(x.dtype) // max(1, terms)
    low, high = max(int(info.min), -most), min(int(info.max), most)
    return composite("whole", _same, x, low=float(low), high=float(high))


def truncated(x: Array, dtype: np.dtype) -> Array:
    """`x.astype(dtype)` for an integer type, carried in `x`'s dtype. Only for traced graphs.

    What lies outside the type's range has no defined cast, and no bounds.
    """
    return held(composite("trunc", trunc, x), dtype)


def held(x: Array, dtype: np.dtype) -> Array:
    """Marks `x`, floating-point and whole, as an integer of this type. Only for traced graphs.

    Bounds are NaN where the interval leaves the type's range.
    """
    info = np.iinfo(dtype)
    # `x.dtype` may not hold the largest integer: float32 holds 2147483520, but not 2147483647.
    most = np.nextafter(np.asarray(float(info.max) + 1.0, x.dtype), np.asarray(0, x.dtype))
    high = float(min(float(info.max), float(most)))
    return composite("whole", _same, x, low=float(info.min), high=high)


def _same(x: Array, *, low: float, high: float) -> Array:
    del low, high
    return x


def trunc(x: Array) -> Array:
    """Rounds towards 0, without the predicate of `jnp.trunc`."""
    return jnp.where(x < 0, jnp.ceil(x), jnp.floor(x))


def _inside(node: Node, lower: Array, upper: Array) -> Array:
    low, high = node.params["low"], node.params["high"]
    return (lower >= low) & (upper <= high) & (lower <= upper)


def _image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    lower, upper = ends(lower, upper)
    inside = _inside(node, lower, upper)
    return jnp.where(inside, lower, jnp.nan), jnp.where(inside, upper, jnp.nan)


def _lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    one = jnp.ones_like(lower)
    zero = jnp.where(_inside(node, *ends(lower, upper)), jnp.zeros_like(lower), jnp.nan)
    return Lines(one, zero, one, zero)


def _trunc_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """`x + below <= trunc(x) <= x + above`, or the ends, whichever is tighter at the middle."""
    below = jnp.where(upper <= 0, 0.0, -1.0).astype(lower.dtype)
    above = jnp.where(lower >= 0, 0.0, 1.0).astype(lower.dtype)
    return piecewise.step_lines(node, lower, upper, below, above)


register(
    Scalar(
        name="whole",
        note="a perturbed integer, carried as a float; NaN outside its range",
        image=_image,
        lines=_lines,
        lipschitz=piecewise.constant_slope(1.0),
    )
)
register(
    Scalar(
        name="trunc",
        note="casts to integers",
        image=piecewise.monotone_image,
        lines=_trunc_lines,
        lipschitz=piecewise.step_lipschitz,
        pieces=True,
        jumps=True,
    )
)

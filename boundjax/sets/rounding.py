"""Floating-point arithmetic: how much it may round, and ends that are rounded outwards.

The ends of a set must enclose every point that was asked for. Rounded to nearest, `center - eps`
and `center + eps` may both equal `center` (where `eps` is below half a spacing of `center`), and
bounds on that set would say nothing about the requested radius.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from boundjax.numerics import float_info

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
      The lower and the upper end. Exact sums are left alone, so a radius of 0 gives the point.
    """
    return -_rounded_up(-center, radius), _rounded_up(center, radius)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """The rounded sum and its error: `x + y` is exactly their sum, unless the error underflows."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _rounded_up(x: Array, radius: Array) -> Array:
    """An upper bound on `x + radius`, equal to it where the sum is exact."""
    total, error = _two_sum(x, radius)
    info = float_info(x.dtype)
    # XLA flushes errors and sums that underflow to 0.
    small = jnp.minimum(jnp.abs(x), radius) < info.tiny / info.eps**2
    underflows = small & (x != 0) & (radius != 0) & (x != -radius)
    # Adding slightly more than half a spacing rounds to the next number.
    step = (0.5 * info.eps) * (1.0 + 2.0 * info.eps) * jnp.abs(total)
    above = total + jnp.maximum(step, info.tiny)
    return jnp.where((error > 0) | underflows, above, total)


def with_exact_middle(lower: Array, upper: Array) -> tuple[Array, Array]:
    """Moves ends outwards, by two spacings at most, until middle and half-width are exact.

    Transforms compute with `(lower + upper) / 2` and `(upper - lower) / 2`. Once rounded, these may
    describe a smaller interval than the ends do, such as half of `[x, x + one spacing]`.
    """
    inexact = (_two_sum(lower, upper)[1] != 0) | (_two_sum(upper, -lower)[1] != 0)
    # On multiples of `grid` the ends, their sum and their difference are exact.
    info = float_info(lower.dtype)
    largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    _, exponent = jnp.frexp(largest)
    grid = jnp.ldexp(jnp.ones_like(lower), exponent - info.nmant)
    moves = inexact & jnp.isfinite(largest) & (largest > info.tiny / info.eps**2)
    grid = jnp.where(moves, grid, 1.0)
    return (
        jnp.where(moves, jnp.floor(lower / grid) * grid, lower),
        jnp.where(moves, jnp.ceil(upper / grid) * grid, upper),
    )


def up(value: ArrayLike, dtype: np.dtype[Any]) -> np.ndarray:
    """The smallest normal numbers of a floating dtype that are `>= value`, elementwise.

    Subnormal numbers are skipped because XLA treats them as 0.
    """
    exact = np.asarray(value)
    rounded = exact.astype(dtype)
    rounded = np.where(rounded < exact, np.nextafter(rounded, dtype.type(np.inf)), rounded)
    tiny = np.finfo(dtype).tiny
    rounded = np.where((rounded > 0) & (rounded < tiny), tiny, rounded)
    return np.where((rounded < 0) & (rounded > -tiny), 0.0, rounded).astype(dtype)

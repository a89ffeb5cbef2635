"""Intervals: elementwise lower and upper ends, and what is done to them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Num, Shaped

from boundjax.numerics import larger, smaller


class Interval(NamedTuple):
    """Elementwise bounds: `lower <= value <= upper`, two arrays of one shape."""

    lower: Shaped[Array, "*shape"]
    upper: Shaped[Array, "*shape"]

    @property
    def width(self) -> Num[Array, "*shape"]:
        """`upper - lower`."""
        return self.upper - self.lower

    @property
    def middle(self) -> Float[Array, "*shape"]:
        """`(lower + upper) / 2`."""
        return 0.5 * (self.lower + self.upper)

    @property
    def radius(self) -> Float[Array, "*shape"]:
        """`(upper - lower) / 2`."""
        return 0.5 * (self.upper - self.lower)

    @property
    def finite_middle(self) -> Float[Array, "*shape"]:
        """The middle for ends whose sum would overflow; it rounds differently from `middle`.

        A softmax's masked entries are the least finite numbers. `lower / 2 + upper / 2` would not
        help, since XLA turns it into half of the sum.
        """
        return self.lower + self.finite_radius

    @property
    def finite_radius(self) -> Float[Array, "*shape"]:
        """`upper / 2 - lower / 2`, half the width for ends whose difference would overflow."""
        return 0.5 * self.upper - 0.5 * self.lower

    @property
    def largest(self) -> Float[Array, "*shape"]:
        """The largest magnitude in the interval."""
        return larger(jnp.abs(self.lower), jnp.abs(self.upper))

    @property
    def unbounded(self) -> Bool[Array, "*shape"]:
        """Where an end is infinite and none is NaN."""
        infinite = jnp.isinf(self.lower) | jnp.isinf(self.upper)
        return infinite & ~jnp.isnan(self.lower) & ~jnp.isnan(self.upper)

    def poisoned(self) -> Interval:
        """Sets both ends to NaN if one is: an unknown end passes for neither bound nor sign."""
        if not jnp.issubdtype(self.lower.dtype, jnp.floating):
            return self
        unknown = jnp.isnan(self.lower) | jnp.isnan(self.upper)
        return Interval(*(jnp.where(unknown, jnp.nan, end) for end in self))

    def unless_empty(self) -> Interval:
        """Sets both ends to NaN where the interval is empty or an end is NaN."""
        empty = ~(self.lower <= self.upper)
        return Interval(*(jnp.where(empty, jnp.nan, end) for end in self))

    def cut(self, other: Interval) -> Interval:
        """The larger of the lower and the smaller of the upper ends, which may cross."""
        return Interval(jnp.maximum(self.lower, other.lower), jnp.minimum(self.upper, other.upper))

    def intersect(self, other: Interval, *, crossing: bool = True) -> Interval:
        """The tighter of two valid bounds at each end.

        Two intervals that contradict each other show that a bound is wrong or that the set is
        empty; both ends are then NaN, which never certifies.

        Args:
          other: bounds on the same value.
          crossing: whether ends may cross by rounding; they are then exchanged.
        """
        lower, upper = larger(self.lower, other.lower), smaller(self.upper, other.upper)
        if not crossing:
            return Interval(lower, upper).unless_empty()
        size = functools.reduce(jnp.maximum, [jnp.abs(end) for end in (*self, *other)])
        contradiction = lower - upper > 1e-3 * (1.0 + size)
        lower, upper = smaller(lower, upper), larger(lower, upper)
        return Interval(jnp.where(contradiction, jnp.nan, lower), upper).poisoned()

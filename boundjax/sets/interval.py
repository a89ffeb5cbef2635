"""Intervals: elementwise lower and upper ends."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Interval(NamedTuple):
    """Elementwise bounds: `lower <= value <= upper`, two arrays of one shape."""

    lower: Array
    upper: Array

    @property
    def width(self) -> Array:
        """`upper - lower`."""
        return self.upper - self.lower

    @property
    def middle(self) -> Array:
        """`(lower + upper) / 2`."""
        return 0.5 * (self.lower + self.upper)

    @property
    def radius(self) -> Array:
        """`(upper - lower) / 2`."""
        return 0.5 * (self.upper - self.lower)


def unless_empty(lower: Array, upper: Array) -> Interval:
    """`[lower, upper]`; NaN where that is empty or an end is NaN."""
    empty = ~(lower <= upper)
    return Interval(jnp.where(empty, jnp.nan, lower), jnp.where(empty, jnp.nan, upper))

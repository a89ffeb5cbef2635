"""Boxes: every feature between two ends."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.numerics import length
from boundjax.sets import rounding
from boundjax.sets.checks import as_float, concrete, first_index, require_array, require_finite
from boundjax.sets.interval import Interval


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lower", "upper"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Box:
    """All `x` with `lower <= x <= upper`, elementwise; both of the input's shape.

    Raises:
      ValueError: for different shapes, values that are not finite, or `lower > upper`.
    """

    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        require_array("Box.lower", self.lower)
        require_array("Box.upper", self.upper)
        lower, upper = concrete(self.lower), concrete(self.upper)
        if lower is None or upper is None:
            return
        if lower.shape != upper.shape:
            raise ValueError(
                f"Box needs bounds of one shape, got lower {lower.shape} and upper {upper.shape}"
            )
        require_finite("Box.lower", lower)
        require_finite("Box.upper", upper)
        if (lower > upper).any():
            bad = lower > upper
            raise ValueError(
                f"Box needs lower <= upper, got {lower[bad].flat[0]} > {upper[bad].flat[0]}"
                f"{first_index(bad)}"
            )

    @property
    def is_box(self) -> bool:
        """True: a box equals its interval."""
        return True

    def outwards(self) -> Box:
        """A box that contains this one, and whose middle and half-width are exact."""
        lower = as_float(self.lower)
        return Box(*rounding.with_exact_middle(lower, as_float(self.upper, lower)))

    def interval(self) -> Interval:
        """The box itself; NaN where an end is NaN or, under `jit`, `lower > upper`."""
        lower = as_float(self.lower)
        upper = as_float(self.upper, lower)
        empty = ~(lower <= upper)
        return Interval(jnp.where(empty, jnp.nan, lower), jnp.where(empty, jnp.nan, upper))

    def ball(self) -> tuple[Array, Array]:
        """The center and the radius of the smallest l2 ball that contains the set."""
        interval = self.interval()
        return interval.middle, length(interval.radius)

    def support(self, coefficients: Array) -> Array:
        """`max <c, x> = <c, middle> + <|c|, radius>`; `c` has the input's shape."""
        return jnp.sum(coefficients * self.interval().middle) + self.spread(coefficients)

    def spread(self, coefficients: Array) -> Array:
        """`max <c, x - middle> = <|c|, radius>`."""
        return jnp.sum(jnp.abs(coefficients) * self.interval().radius)

"""Values within an l2 ball and a box."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from boundjax.numerics import length, quick_larger, quick_smaller
from boundjax.sets import ball_box
from boundjax.sets import rounding as rounding_of_sets
from boundjax.sets.ball_box import BallBox
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic


class BallBoxBounds(NamedTuple):
    """Bounds on a value: within `radius` of the center in l2, and in the box unless it is None.

    Unlike a `BallBox` it is not checked and may bound predicates.
    """

    center: Array
    radius: Array
    box: Interval | None

    def interval(self) -> Interval:
        """The box, which lies in the box around the ball; without one, the box around the ball."""
        if self.box is None:
            return Interval(self.center - self.radius, self.center + self.radius)
        return self.box

    def as_set(self) -> BallBox:
        """The same bounds as a set.

        Raises:
          ValueError: for a predicate.
        """
        if not jnp.issubdtype(self.center.dtype, jnp.floating):
            raise ValueError(f"l2 bounds are of floating-point values, got {self.center.dtype}")
        ends = jnp.full(self.center.shape, jnp.inf, self.center.dtype)
        lower, upper = (-ends, ends) if self.box is None else self.box
        # Extend the box to the center, which rounding may have moved out of it: ball and box could
        # be disjoint otherwise.
        return BallBox(
            self.center,
            self.radius,
            quick_smaller(lower, self.center),
            quick_larger(upper, self.center),
        )

    def around(self, arithmetic: Arithmetic) -> Interval:
        """`interval`, rounded outwards."""
        if self.box is not None:
            return self.box
        by = 4.0 * arithmetic.unit * jnp.abs(self.center) + arithmetic.underflow
        return Interval(self.center - self.radius - by, self.center + self.radius + by)

    def spread(self, coefficients: Array, arithmetic: Arithmetic | None = None) -> Array:
        """`max <c, x - center>`, a scalar; with an arithmetic it is rounded up."""
        if self.box is None:
            if arithmetic is None:
                return self.radius * length(coefficients)
            size = length_above(coefficients, arithmetic)
            return self.radius * size * (1.0 + 4.0 * arithmetic.unit) + arithmetic.underflow
        below, above = self.center - self.box.lower, self.box.upper - self.center
        if arithmetic is None:
            return ball_box.spread(coefficients, self.radius, below, above)
        below = jnp.maximum(rounding_of_sets.sum_above(self.center, -self.box.lower), 0.0)
        above = jnp.maximum(rounding_of_sets.sum_above(self.box.upper, -self.center), 0.0)
        radius = jnp.broadcast_to(self.radius, self.center.shape)
        return ball_box.spread_above(coefficients, radius, below, above)


def length_above(value: Array, arithmetic: Arithmetic) -> Array:
    """An upper bound on `||value||_2`."""
    # Squares of elements far below the largest one underflow.
    size = length(value) * (1.0 + 2.0 * arithmetic.gamma(value.size + 16))
    largest = jnp.max(jnp.abs(value), initial=0.0)
    lost = math.sqrt(2.0 * value.size * arithmetic.underflow)
    return size + largest * lost + 2.0 * math.sqrt(value.size) * arithmetic.underflow

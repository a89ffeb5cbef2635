"""Boxes: every feature between two ends."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from boundjax.numerics import length
from boundjax.sets import rounding, upward
from boundjax.sets.checks import as_float, concrete, first_index, require_array, require_finite
from boundjax.sets.interval import Interval


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lower", "upper"], meta_fields=["outward"]
)
@dataclasses.dataclass(frozen=True)
class Box:
    """All `x` with `lower <= x <= upper`, elementwise; both of the input's shape.

    Attributes:
      lower: any shape.
      upper: of the same shape.
      outward: whether every answer holds for the exact box, as certificates need, instead of up to
        rounding. Ends that are numbers or numpy arrays are then rounded outwards to the dtype.

    Raises:
      ValueError: for different shapes, values that are not finite, or `lower > upper`.
    """

    lower: Num[Array, "*shape"]
    upper: Num[Array, "*shape"]
    outward: bool = False

    def __post_init__(self) -> None:
        require_array("Box.lower", self.lower)
        require_array("Box.upper", self.upper)
        if self.outward:
            object.__setattr__(self, "upper", rounding.number_above(self.upper, self.lower))
            object.__setattr__(self, "lower", rounding.number_below(self.lower, self.lower))
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
        """The same box with answers that hold for it exactly."""
        return self if self.outward else dataclasses.replace(self, outward=True)

    def interval(self) -> Interval:
        """The box itself; NaN where an end is NaN or, under `jit`, `lower > upper`.

        With `outward` middle and half-width, as computed, describe an interval that encloses it.
        """
        lower = as_float(self.lower)
        upper = as_float(self.upper, lower)
        nearest = Interval(lower, upper).unless_empty()
        if not self.outward:
            return nearest
        ends = Interval(
            rounding.float_below(self.lower, lower.dtype),
            rounding.float_above(self.upper, lower.dtype),
        )
        return rounding.enclosure(ends.unless_empty(), nearest)

    def ball(self) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
        """The center and the radius of the smallest l2 ball that contains the set."""
        middle, radius = self.interval().middle, self.interval().radius
        nearest = length(radius)
        if not self.outward:
            return middle, nearest
        return middle, upward.with_slack(upward.length_above, nearest, radius)

    def support(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x> = <c, middle> + <|c|, radius>`; `c` has the input's shape."""
        middle, spread = self.interval().middle, self.spread(coefficients)
        nearest = jnp.sum(coefficients * middle) + spread
        if not self.outward:
            return nearest
        return upward.with_slack(upward.support_above, nearest, coefficients, middle, spread)

    def spread(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x - middle> = <|c|, radius>`."""
        radius = self.interval().radius
        nearest = jnp.sum(jnp.abs(coefficients) * radius)
        if not self.outward:
            return nearest
        return upward.with_slack(upward.box_above, nearest, coefficients, radius)

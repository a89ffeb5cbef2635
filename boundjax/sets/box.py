"""Boxes: every feature between two ends."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from boundjax.numerics import length
from boundjax.sets import rounding, trees, upward
from boundjax.sets.checks import as_float, concrete, first_index, require_finite
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.sets.product import product_of
from boundjax.typing import PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lower", "upper"], meta_fields=["outward"]
)
@dataclasses.dataclass(frozen=True)
class Box:
    """All `x` with `lower <= x <= upper`, elementwise; both of the input's shape.

    The input may be a pytree of arrays of one floating dtype. Ends are then pytrees, and so is what
    the methods take and return.

    Attributes:
      lower: any shape, or a pytree of arrays.
      upper: of the same shape; a pytree has the structure of `lower`.
      outward: whether every answer holds for the exact box, as certificates need, instead of up to
        rounding. Ends that are numbers or numpy arrays are then rounded outwards to the dtype.

    Raises:
      ValueError: for different shapes or structures, values that are not finite, or
        `lower > upper`.
    """

    lower: Num[Array, "*shape"] | PyTree
    upper: Num[Array, "*shape"] | PyTree
    outward: bool = False

    def __post_init__(self) -> None:
        for field in ("lower", "upper"):
            object.__setattr__(self, field, trees.numbers_as_array(getattr(self, field)))
        trees.require_one_structure("Box", lower=self.lower, upper=self.upper)
        if self.outward:
            lower, upper = rounding.outward_numbers(self.lower, self.upper, self.lower)
            object.__setattr__(self, "lower", lower)
            object.__setattr__(self, "upper", upper)
        lowers, uppers = (
            trees.named_leaves(f"Box.{field}", getattr(self, field)) for field in ("lower", "upper")
        )
        for lower, upper in zip(lowers, uppers, strict=False):
            _require_ends(*lower, *upper)

    @property
    def is_box(self) -> bool:
        """True: a box equals its interval."""
        return True

    def flattened(self) -> tuple[InputSet, trees.Layout | None]:
        """The boxes of a pytree's leaves in one flat array; itself for a box of one array."""
        if not trees.is_tree(self.lower):
            return self, None
        ends = zip(jax.tree.leaves(self.lower), jax.tree.leaves(self.upper), strict=True)
        parts = [Box(lower, upper, self.outward) for lower, upper in ends]
        return product_of(parts, self.lower), trees.Layout.of(self.lower)

    def outwards(self) -> Box:
        """The same box with answers that hold for it exactly."""
        return self if self.outward else dataclasses.replace(self, outward=True)

    @trees.for_trees
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

    @trees.for_trees
    def ball(self) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
        """The center and the radius of the smallest l2 ball that contains the set."""
        middle, radius = self.interval().middle, self.interval().radius
        nearest = length(radius)
        if not self.outward:
            return middle, nearest
        return middle, upward.with_slack(upward.length_above, nearest, radius)

    @trees.for_trees
    def support(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x> = <c, middle> + <|c|, radius>`; `c` has the input's shape."""
        middle, spread = self.interval().middle, self.spread(coefficients)
        nearest = jnp.sum(coefficients * middle) + spread
        if not self.outward:
            return nearest
        return upward.with_slack(upward.support_above, nearest, coefficients, middle, spread)

    @trees.for_trees
    def spread(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x - middle> = <|c|, radius>`."""
        radius = self.interval().radius
        nearest = jnp.sum(jnp.abs(coefficients) * radius)
        if not self.outward:
            return nearest
        return upward.with_slack(upward.box_above, nearest, coefficients, radius)


def _require_ends(lower_name: str, lower_end: Any, upper_name: str, upper_end: Any) -> None:
    """Checks the ends of one array, unless their numbers are not known yet."""
    lower, upper = concrete(lower_end), concrete(upper_end)
    if lower is None or upper is None:
        return
    where = lower_name.removeprefix("Box.lower")
    if lower.shape != upper.shape:
        raise ValueError(
            f"Box needs bounds of one shape, got lower{where} {lower.shape} and upper{where} "
            f"{upper.shape}"
        )
    require_finite(lower_name, lower)
    require_finite(upper_name, upper)
    if (lower > upper).any():
        bad = lower > upper
        raise ValueError(
            f"Box needs lower{where} <= upper{where}, got {lower[bad].flat[0]} > "
            f"{upper[bad].flat[0]}{first_index(bad)}"
        )

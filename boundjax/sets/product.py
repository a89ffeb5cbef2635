"""Several input sets side by side, in one flat array."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax.numerics import length
from boundjax.sets import rounding, trees, upward
from boundjax.sets.input_set import InputSet, enclosing_ball, outwards
from boundjax.sets.interval import Interval
from boundjax.typing import PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["shapes", "outward"]
)
@dataclasses.dataclass(frozen=True)
class Product:
    """All arrays `[n]` whose parts lie in their sets, independently of one another.

    Attributes:
      parts: two or more sets of one array each, of any shape; in `[n]` they follow each other in C
        order.
      shapes: those of the arrays.
      outward: whether every answer holds for the exact set; the parts' answers must.
    """

    parts: tuple[InputSet, ...]
    shapes: tuple[tuple[int, ...], ...]
    outward: bool = False

    @property
    def is_box(self) -> bool:
        """Whether all parts are boxes."""
        return all(part.is_box for part in self.parts)

    def outwards(self) -> Product:
        """The same set with answers that hold for it exactly."""
        if self.outward:
            return self
        return Product(tuple(map(outwards, self.parts)), self.shapes, outward=True)

    def interval(self) -> Interval:
        """The intervals of the parts, `[n]`."""
        lowers, uppers = zip(*(part.interval() for part in self.parts), strict=True)
        return Interval(trees.concatenated(lowers), trees.concatenated(uppers))

    def ball(self) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        """The centers of the parts, and the length of the vector of their radii."""
        centers, radii = zip(*map(enclosing_ball, self.parts), strict=True)
        return trees.concatenated(centers), self.radius_of(radii)

    def radius_of(self, radii: Sequence[Array]) -> Float[Array, ""]:
        """The radius of the l2 ball around the center, for one radius for each part."""
        stacked = jnp.stack(radii)
        nearest = length(stacked)
        return upward.with_slack(upward.length_above, nearest, stacked) if self.outward else nearest

    def support(self, coefficients: Float[Array, " n"]) -> Float[Array, ""]:
        """`max <c, x>`, the sum over the parts."""
        pairs = zip(self.parts, trees.separated(coefficients, self.shapes), strict=True)
        return self._sum([part.support(c) for part, c in pairs])

    def spread(self, coefficients: Float[Array, " n"]) -> Float[Array, ""]:
        """`max <c, x - middle>`, the sum over the parts."""
        pairs = zip(self.parts, trees.separated(coefficients, self.shapes), strict=True)
        return self._sum([part.spread(c) for part, c in pairs])

    def _sum(self, terms: Sequence[Array]) -> Array:
        nearest = sum(terms[1:], terms[0])
        return upward.with_slack(_sum_above, nearest, *terms) if self.outward else nearest


def product_of(parts: Sequence[InputSet], value: PyTree) -> InputSet:
    """The product of sets of one array each; one alone stays what it is.

    Args:
      parts: one or more.
      value: the input that they are made of, for messages.

    Raises:
      TypeError: for sets of different floating dtypes.
    """
    if len(parts) == 1:
        return parts[0]
    examples = [part.interval().lower for part in parts]
    trees.require_one_dtype([example.dtype for example in examples], value)
    return Product(tuple(parts), tuple(example.shape for example in examples))


def _sum_above(*terms: Array) -> Array:
    """An upper bound on the sum of scalars of any sign."""
    return functools.reduce(rounding.sum_above, terms)

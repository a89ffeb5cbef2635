"""l2 balls beside the boxes of an interval walk."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Weighted
from boundjax.ir.node import Node
from boundjax.numerics import larger, length, quick_larger, quick_smaller, smaller
from boundjax.ops import matmul, norms
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval


def enclosing_ball(input_set: InputSet) -> tuple[Array, Array]:
    """The centre and the radius of an l2 ball that holds an input set.

    A set of the user's may have a method `ball() -> (center, radius)`; otherwise it is the ball
    around the middle of its interval.
    """
    if hasattr(input_set, "ball"):
        return input_set.ball()
    interval = input_set.interval()
    return interval.middle, length(interval.radius)


def cut(node: Node, box: Interval, center: Array, radii: Sequence[Array]) -> Interval:
    """The box of a linear op, cut with the box around the image of the balls (BCP, eq. 5).

    An op that does not mix elements has no smaller box.
    """
    if not norms.mixes(node):
        return box
    reach = jnp.zeros_like(center)
    for radius, rows in zip(radii, norms.row_norms(node), strict=True):
        # As a matrix product, whose gradient sums over a batch are matrix products too.
        product = matmul.rows_matmul(radius.reshape(1, 1), rows.reshape(1, -1))
        reach = reach + product.reshape(node.shape)
    # Of concatenations and the like box and ball are equal but for rounding, see `larger`.
    ties = not isinstance(node.op, Weighted)
    most, least = (larger, smaller) if ties else (quick_larger, quick_smaller)
    lower, upper = most(box.lower, center - reach), least(box.upper, center + reach)
    # Both hold the centre, but for rounding; ends that crossed would be no interval.
    return Interval(quick_smaller(lower, center), quick_larger(upper, center))


class FirstLayers:
    """The l2 ball around an input set, up to the layers that see it first.

    There half-widths are the radius times the l2 norms of a layer's rows, which for a ball of p = 2
    is exact, where a box around the ball would give l1 norms.
    """

    def __init__(self, input_set: InputSet) -> None:
        # Of a box the box is all there is to know.
        self._balls = {} if input_set.is_box else {0: enclosing_ball(input_set)}

    def cut(self, node: Node, box: Interval) -> Interval:
        """The box of a node's value, cut where the node is one of the first; asked in order."""
        if not node.is_linear or any(i not in self._balls for i in node.inputs):
            return box
        centers, radii = zip(*(self._balls[i] for i in node.inputs), strict=True)
        center = node.apply(*centers)
        if not norms.has_spectrum(node.op):
            self._balls[node.index] = center, norms.radius(node, radii, None)
        return cut(node, box, center, radii)

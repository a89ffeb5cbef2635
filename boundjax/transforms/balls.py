"""l2 balls beside the boxes of an interval walk."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Structural, Weighted, linear_op
from boundjax.ir.node import Node
from boundjax.numerics import larger, length, quick_larger, quick_smaller, smaller
from boundjax.ops import affine, matmul
from boundjax.ops import norms as norms_of
from boundjax.sets import upward
from boundjax.sets.input_set import InputSet, enclosing_ball
from boundjax.sets.interval import Interval
from boundjax.sets.product import Product
from boundjax.sets.rounding import Arithmetic
from boundjax.sets.trees import separated
from boundjax.windows import dense


def cut(
    node: Node,
    box: Interval,
    center: Array,
    radii: Sequence[Array],
    arithmetic: Arithmetic | None = None,
) -> Interval:
    """The box of a linear op, cut with the box around the image of the balls (BCP, eq. 5).

    For an op that does not mix elements the cut would change nothing.

    Args:
      node: the linear op.
      box: its box.
      center: the image of the balls' centers.
      radii: of the balls, scalars, one per perturbed operand.
      arithmetic: charges the rounding of the rows' norms, but not that of `center`; None charges
        nothing.
    """
    if not norms_of.mixes(node):
        return box
    reach = jnp.zeros_like(center)
    for radius, rows in zip(radii, norms_of.row_norms(node), strict=True):
        # A matrix product, so that sums of its gradients over a batch are matrix products, too.
        product = matmul.rows_matmul(radius.reshape(1, 1), rows.reshape(1, -1))
        reach = reach + product.reshape(node.shape)
    if arithmetic is not None:
        terms = linear_op(node).terms(node)
        # Squares of tiny weights underflow.
        underflow = math.sqrt(2.0 * arithmetic.underflow * terms) * sum(radii[1:], radii[0])
        reach = (reach + underflow) * (1.0 + 2.0 * arithmetic.gamma(terms + 16))
    # After a concatenation or its like, box and ball are equal up to rounding, see `larger`.
    ties = not isinstance(node.op, Weighted)
    most, least = (larger, smaller) if ties else (quick_larger, quick_smaller)
    lower, upper = most(box.lower, center - reach), least(box.upper, center + reach)
    # Both contain the center up to rounding; keep the ends from crossing.
    return Interval(quick_smaller(lower, center), quick_larger(upper, center))


class CutBalls:
    """The l2 balls of what ops cut out of the input.

    An op that reads a part of the input reads a smaller ball: that of one of several inputs that
    lie in one array, for instance.
    """

    def __init__(self, input_set: InputSet, rounded: bool) -> None:
        """The balls in an input set; `rounded` if radii are to be rounded up."""
        self._input_set, self._rounded = input_set, rounded
        # Rounding the ends of a set takes long formulas, which are traced once.
        self._parts: dict[int, tuple[Array, Array, Interval]] = {}

    def radius_at(self, node: Node, radius: Array) -> Array:
        """The radius of what a node reads of the input, whose own radius is given."""
        cuts = isinstance(node.op, Structural) and node.size < math.prod(node.input_shapes[0].shape)
        if not cuts or any(node.inputs):
            return radius
        ones = jnp.ones((1, *node.shape), node.dtype)
        # The operands of a structural op enter it with one sign each: nothing cancels.
        reads = [dense(rows)[0] != 0 for rows in affine.pull_back(node, ones)]
        return self._radius_of(self._input_set, functools.reduce(jnp.logical_or, reads))

    def _radius_of(self, input_set: InputSet, reads: Array) -> Array:
        """The radius around the center of the elements that are read."""
        if isinstance(input_set, Product):
            parts = zip(input_set.parts, separated(reads, input_set.shapes), strict=True)
            return input_set.radius_of([self._radius_of(part, read) for part, read in parts])
        if id(input_set) not in self._parts:
            self._parts[id(input_set)] = *enclosing_ball(input_set), input_set.interval()
        center, radius, (lower, upper) = self._parts[id(input_set)]
        corner = jnp.maximum(jnp.abs(upper - center), jnp.abs(center - lower))
        nearest = jnp.minimum(radius, length(jnp.where(reads, corner, 0.0)))
        nearest = jnp.where(jnp.any(reads), nearest, 0.0)
        if not self._rounded:
            return nearest
        return upward.with_slack(_radius_above, nearest, radius, center, lower, upper, reads)


def _radius_above(radius: Array, center: Array, lower: Array, upper: Array, reads: Array) -> Array:
    """The same radius, rounded up."""
    ends = (jnp.where(reads, end, center) for end in (lower, upper))
    return jnp.where(jnp.any(reads), upward.enclosing_radius(radius, center, *ends), 0.0)


class FirstLayers:
    """The l2 ball around an input set, up to the first layers.

    The half-widths of their boxes are the radius times the l2 norms of a layer's rows, which is
    exact for a ball of p = 2. A box around the ball would give l1 norms.
    """

    def __init__(self, input_set: InputSet, arithmetic: Arithmetic | None = None) -> None:
        """Begins at the input; `arithmetic` as of `cut`."""
        self._arithmetic = arithmetic
        self._cuts = CutBalls(input_set, arithmetic is not None)
        # For a box the intervals say everything.
        self._balls = {} if input_set.is_box else {0: enclosing_ball(input_set)}
        self._inside = jnp.asarray(True)
        if self._balls and arithmetic is not None:
            # The walk charges rounding by the size of values, which need not cover this center.
            center, interval = self._balls[0][0], input_set.interval()
            self._inside = jnp.all((interval.lower <= center) & (center <= interval.upper))

    def cut(self, node: Node, box: Interval) -> Interval:
        """Cuts the box of a node's value if the node is a first layer; call it in graph order."""
        if not node.is_linear or any(i not in self._balls for i in node.inputs):
            return box
        centers, radii = zip(*(self._balls[i] for i in node.inputs), strict=True)
        if 0 in node.inputs:
            whole = self._cuts.radius_at(node, radii[node.inputs.index(0)])
            radii = [whole if i == 0 else r for i, r in zip(node.inputs, radii, strict=True)]
        center = node.apply(*centers)
        if not norms_of.has_spectrum(node.op):
            radius = norms_of.radius(node, radii, None)
            if self._arithmetic is not None:
                terms = max(linear_op(node).terms(node), linear_op(node).reach(node))
                radius = radius * (1.0 + 2.0 * self._arithmetic.gamma(terms + 16))
            self._balls[node.index] = center, radius
        around = cut(node, box, center, radii, self._arithmetic)
        if self._arithmetic is None:
            return around
        return Interval(*(jnp.where(self._inside, *ends) for ends in zip(around, box, strict=True)))

"""l2 balls beside the boxes of an interval walk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.families import Structural, Weighted, linear_op
from boundjax.ir.node import Node
from boundjax.numerics import larger, quick_larger, quick_smaller, smaller
from boundjax.ops import matmul
from boundjax.ops import norms as norms_of
from boundjax.sets.checks import concrete
from boundjax.sets.input_set import InputSet, enclosing_ball
from boundjax.sets.interval import Interval
from boundjax.sets.product import Product
from boundjax.sets.rounding import Arithmetic


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


def radius_at(node: Node, input_set: InputSet, radius: Array) -> Array:
    """The radius of an l2 ball of what a node reads of the input itself.

    A node that cuts one part out of a product reads the ball of that part.

    Args:
      node: one of whose operands is the input.
      input_set: of the input.
      radius: that of the whole input.
    """
    if not isinstance(input_set, Product) or not isinstance(node.op, Structural):
        return radius
    if any(node.inputs):  # other operands have shapes of their own
        return radius
    read = _parts_read(node, input_set)
    return radius if read is None else input_set.radius_of(read)


def _parts_read(node: Node, product: Product) -> list[int] | None:
    """The parts of the input on which an op with a 0/1 matrix depends; None if that is unknown."""
    read = []
    for k in range(len(product.parts)):
        # A NaN passes from every element that is read, and a 0 at most adds to what reads it.
        marks = [
            np.full(math.prod(shape), np.nan if i == k else 0.0, node.input_shapes[0].dtype)
            for i, shape in enumerate(product.shapes)
        ]
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):
            value = node.apply(*[jnp.asarray(np.concatenate(marks))] * len(node.inputs))
            marked = concrete(jnp.any(jnp.isnan(value)))
        if marked is None:  # which elements are read depends on a traced index
            return None
        if marked:
            read.append(k)
    return read or None


class FirstLayers:
    """The l2 ball around an input set, up to the first layers.

    The half-widths of their boxes are the radius times the l2 norms of a layer's rows, which is
    exact for a ball of p = 2. A box around the ball would give l1 norms.
    """

    def __init__(self, input_set: InputSet, arithmetic: Arithmetic | None = None) -> None:
        """Begins at the input; `arithmetic` as of `cut`."""
        self._arithmetic, self._input_set = arithmetic, input_set
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
            whole = radius_at(node, self._input_set, radii[node.inputs.index(0)])
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

"""Rows of coefficients on a value that lies in an l2 ball around 0.

Bounds on single elements cannot say that `|y|_2 <= 1`. Combined by a row `w` they give `|w|_1`, but
the ball gives `|w|_2` (Cauchy-Schwarz). A row for which the ball is better ends at the op, by
planes of its own: with the constants `v = -w / |w|_2` for both planes, `<w, v> = -|w|_2`. Any
choice is sound; a row takes the ball if the planes are worse on the box of the operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Joint, Lines, Planes
from boundjax.ir.node import Node
from boundjax.numerics import root
from boundjax.sets.interval import Interval
from boundjax.transforms import backward


def has_ball(node: Node) -> bool:
    """Whether the node's value is known to lie in a ball."""
    return isinstance(node.op, Joint) and node.op.ball is not None


def _least(node: Node, rows: Array) -> tuple[Array, Array]:
    """The points `v` of the shape of rows `[m, *shape]`, and where their groups end: `<w, v>`."""
    assert isinstance(node.op, Joint)
    assert node.op.ball is not None
    axes, radius = node.op.ball(node)
    axes = tuple(axis + 1 for axis in axes)
    # Scaled by the largest, so that no square under- or overflows.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axes, keepdims=True))
    usable = (scale > 0) & jnp.isfinite(scale)
    scaled = rows / jnp.where(usable, scale, 1.0)
    size = root(jnp.sum(jnp.square(scaled), axes, keepdims=True))
    # The sum of n squares, its root and the quotient round.
    count = math.prod(rows.shape[axis] for axis in axes)
    more = 1.0 + (count + 16) * float(jnp.finfo(rows.dtype).eps)
    points = jnp.where(usable, -radius * more * scaled / jnp.where(usable, size, 1.0), 0.0)
    return points, jnp.sum(rows * points, axes, keepdims=True)


def planes(
    node: Node,
    rows: Array,
    shared: Planes,
    references: Sequence[Array],
    operands: Sequence[Interval],
    image: Interval,
) -> Planes:
    """Planes for each row: the shared ones, or constants of a point of the ball.

    Args:
      node: whose op states a ball.
      rows: lower-bounding coefficients on its value, `[m, *shape]`.
      shared: its planes, with a leading axis.
      references: one value per node.
      operands: the intervals of its operands.
      image: the interval of its value. A row with an element that is not finite takes no ball,
        which says nothing of values that are no numbers.
    """
    points, _ = _least(node, rows)
    coefficients, constant = backward.relax_planes(node, rows, shared, references)
    for coefficient, interval, index in zip(coefficients, operands, node.inputs, strict=True):
        if coefficient is None:
            continue
        reference = references[index]
        spread = jnp.maximum(interval.upper - reference, reference - interval.lower)
        axes = tuple(range(1, coefficient.ndim))
        terms = jnp.where(coefficient == 0, 0.0, jnp.abs(coefficient) * spread[None])
        constant = constant - jnp.sum(terms, axes)
    axes = tuple(range(1, rows.ndim))
    by_ball = jnp.sum(rows * (points - references[node.index][None]), axes)
    finite = jnp.all(jnp.isfinite(image.lower) & jnp.isfinite(image.upper))
    # A gradient would pass through both bounds; the choice itself has none.
    better = finite & jnp.isfinite(by_ball) & ~(by_ball <= constant) & ~jnp.isnan(constant)
    better = jax.lax.stop_gradient(better)

    def of_rows(value: Array) -> Array:
        return jnp.broadcast_to(value, (len(rows), *value.shape[1:]))

    def weights(value: Array) -> Array:
        is_better = better.reshape(-1, *[1] * (value.ndim - 1))
        return jnp.where(is_better, 0.0, of_rows(value))

    is_better = better.reshape(-1, *[1] * (rows.ndim - 1))
    lower_weights = jax.tree.map(weights, shared.lower_weights)
    parallel = shared.upper_weights is shared.lower_weights
    upper_weights = lower_weights if parallel else jax.tree.map(weights, shared.upper_weights)
    return Planes(
        shared.product,
        lower_weights,
        jnp.where(is_better, points, of_rows(shared.lower_offset)),
        upper_weights,
        jnp.where(is_better, points, of_rows(shared.upper_offset)),
    )


def lines(node: Node, rows: Array, constant: Lines) -> Lines:
    """Constant lines for each row, with a point of the ball in groups where it is better."""
    lower, upper = constant.lower_intercept, constant.upper_intercept
    assert lower is not None
    assert upper is not None
    assert isinstance(node.op, Joint)
    assert node.op.ball is not None
    points, least = _least(node, rows)
    axes = tuple(axis + 1 for axis in node.op.ball(node).axes)
    terms = jnp.where(rows == 0, 0.0, rows * jnp.where(rows > 0, lower, upper))
    by_box = jnp.sum(terms, axes, keepdims=True)
    finite = jnp.all(jnp.isfinite(lower) & jnp.isfinite(upper), axes, keepdims=True)
    better = jax.lax.stop_gradient(finite & (least > by_box))
    return Lines(None, jnp.where(better, points, lower), None, jnp.where(better, points, upper))

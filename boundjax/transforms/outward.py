"""Relaxations moved outward by everything that rounding may change there, see `errors`.

Rows stay as they are: the lines of a nonlinear op pay for its own rounding, for that of the linear
ops between it and the nonlinear ops before, and for that of the sums of intercepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Extremum, Joint, Lines, Planes
from boundjax.ir.node import Node
from boundjax.numerics import materialized
from boundjax.transforms.errors import ErrorAnalysis
from boundjax.typing import PyTree


def _as_shared(array: Array) -> Array:
    return array[None]


def lines(
    errors: ErrorAnalysis,
    node: Node,
    lines: Lines,
    layout: Callable[[Array], Array] = _as_shared,
) -> Lines:
    """Moves lines around references outward by all that is charged at a nonlinear node.

    Args:
      errors: the analysis, which has recorded the node.
      node: the node.
      lines: arrays with a leading axis.
      layout: gives an array of the node's or an operand's shape the layout of the lines.
    """
    of_value, of_sum = layout(errors.of_value(node)), errors.of_sum(node)
    # Only scalar functions and extrema have slopes, both of numbers and not of predicates.
    of_slopes = [array for array in errors.of_slopes(node) if array is not None]
    if isinstance(node.op, Extremum):
        of_slopes = [node.op.windows(node, *of_slopes)]
    of_slopes = [layout(array) for array in of_slopes]

    def loss(slope: Array | None, intercept: Array) -> Array:
        total = of_value + of_sum * _finite_size(intercept)
        if slope is not None:
            terms = _weighed(slope, of_slopes[0])
            total = total + (terms.sum(-1) if isinstance(node.op, Extremum) else terms)
        return total * errors.more + errors.arithmetic.underflow

    below, above = lines.lower_intercept, lines.upper_intercept
    assert below is not None, "`backward.around` makes every intercept an array"
    assert above is not None, "`backward.around` makes every intercept an array"
    return lines._replace(
        lower_intercept=below - loss(lines.lower_slope, below),
        upper_intercept=above + loss(lines.upper_slope, above),
    )


def planes(
    errors: ErrorAnalysis,
    node: Node,
    planes: Planes,
    references: Sequence[Array],
    target: Array,
) -> Planes:
    """Moves planes outward by all that is charged at a joint node.

    Args:
      errors: the analysis, which has recorded the node.
      node: the node.
      planes: arrays with a leading axis, 1 or one entry per row.
      references: of the node's operands.
      target: the reference of the node.
    """
    assert isinstance(node.op, Joint), "only joint ops have planes"
    floating = [k for k, i in enumerate(node.inputs) if i in errors.errors]
    sizes = [errors.errors[node.inputs[k]].size for k in floating]
    of_slopes = [loss for loss in errors.of_slopes(node) if loss is not None]
    values = [jnp.where(jnp.isinf(references[k]), 0.0, references[k]) for k in floating]
    of_value, of_sum = errors.of_value(node), errors.of_sum(node)
    relative = errors.arithmetic.gamma(node.op.terms(node))

    def loss(weights: PyTree, offset: Array) -> Array:
        absolute = jax.tree.map(jnp.abs, weights)
        terms = planes.product(absolute, *sizes) + _finite_size(offset)
        constants = planes.product(weights, *values) - target
        constants = jnp.abs(constants) + _finite_size(offset)
        total = planes.product(absolute, *of_slopes) + relative * terms
        total = total + of_value + of_sum * constants
        return total * errors.more + errors.arithmetic.underflow

    below = _per_row(loss, planes.lower_weights, planes.lower_offset)
    above = _per_row(loss, planes.upper_weights, planes.upper_offset)
    parallel = planes.upper_weights is planes.lower_weights
    lower_weights, lower_offset, upper_weights, upper_offset = materialized(
        (
            planes.lower_weights,
            planes.lower_offset - below,
            None if parallel else planes.upper_weights,
            planes.upper_offset + above,
        )
    )
    upper_weights = lower_weights if parallel else upper_weights
    return Planes(planes.product, lower_weights, lower_offset, upper_weights, upper_offset)


def _finite_size(intercept: Array) -> Array:
    """The magnitude of an intercept; 0 if it is infinite, since moving it changes nothing."""
    return jnp.where(jnp.isinf(intercept), 0.0, jnp.abs(intercept))


def _weighed(slope: Array, loss: Array) -> Array:
    """`|slope| loss`; a slope of 0 gives 0 even if the loss is infinite."""
    return jnp.where(slope == 0, 0.0, jnp.abs(slope) * loss)


def _per_row(function: Callable[..., Array], *arguments: PyTree) -> Array:
    """Maps a function over the leading axes of arrays, whose length is 1 or the number of rows."""
    leaves, tree = jax.tree.flatten(arguments)
    axes = [0 if len(leaf) > 1 else None for leaf in leaves]
    leaves = [leaf if len(leaf) > 1 else leaf[0] for leaf in leaves]
    if all(axis is None for axis in axes):
        return function(*jax.tree.unflatten(tree, leaves))[None]
    in_axes = tuple(jax.tree.unflatten(tree, axes))
    return jax.vmap(function, in_axes=in_axes)(*jax.tree.unflatten(tree, leaves))

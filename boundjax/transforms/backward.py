"""The backward walk: coefficients on a node's value become linear bounds in the input.

Rows of coefficients ``[m, *shape]`` start at a node and are pulled back through one equation after
the other (METHODS 2.3). All rows bound from *below*: at a nonlinear op a positive coefficient takes
the lower line, a negative one the upper line. An upper bound on ``g`` is minus a lower bound on
``-g``; so when both sides are wanted, the rows are doubled to ``[g; -g]`` at the first relaxation,
and everything up to there is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from chex import Array

from boundjax.graph import Graph, Node
from boundjax.ops import affine
from boundjax.ops.registry import Extremum, Lines, Scalar, Structural, Weighted
from boundjax.sets import InputSet, Interval

Sides = Literal["lower", "upper", "both"]


class LinearBounds(NamedTuple):
    """``lower_coefficients x + lower_bias <= rows . value <= upper_coefficients x + upper_bias``.

    Coefficients ``[m, *input]``, biases ``[m]``; a side that was not asked for is None.
    """

    lower_coefficients: Array | None
    lower_bias: Array | None
    upper_coefficients: Array | None
    upper_bias: Array | None

    def concretize(self, input_set: InputSet) -> tuple[Array | None, Array | None]:
        """The least lower and the largest upper value ``[m]`` over the input set."""
        support = jax.vmap(input_set.support)
        lower = upper = None
        if self.lower_bias is not None:
            lower = self.lower_bias - support(-self.lower_coefficients)
        if self.upper_bias is not None:
            upper = self.upper_bias + support(self.upper_coefficients)
        return lower, upper


def linear_bounds(
    graph: Graph,
    starts: dict[int, Array],
    lines_of: Callable[[Node], Lines],
    sides: Sides,
) -> LinearBounds:
    """Linear bounds in the input of ``sum_i <starts[i]_k, value of node i>``.

    Args:
      graph: the traced function.
      starts: node index -> coefficients ``[m, *shape]``; the specification.
      lines_of: the lines of a nonlinear node; called once for every such node on the way.
      sides: which bounds are wanted.
    """
    sign = -1.0 if sides == "upper" else 1.0
    pending = {index: sign * rows for index, rows in starts.items()}
    any_rows = next(iter(pending.values()))
    count = any_rows.shape[0]
    bias = jnp.zeros((count,), any_rows.dtype)
    doubled = False
    for node in reversed(graph.nodes[1:]):
        rows = pending.pop(node.index, None)
        if rows is None:
            continue
        if isinstance(node.op, (Structural, Weighted)):
            offset = affine.offset(node)
            if offset is not None:
                bias = bias + _contract(rows, offset)
            operands = affine.pull_back(node, rows)
        else:
            if sides == "both" and not doubled:
                rows, bias = _double(rows), _double(bias)
                pending = {index: _double(value) for index, value in pending.items()}
                doubled = True
            operands, constant = _relax(node, rows, lines_of(node))
            bias = bias + constant
        for index, operand in zip(node.inputs, operands, strict=True):
            if operand is not None:
                pending[index] = pending[index] + operand if index in pending else operand
    source = graph.nodes[0]
    coefficients = pending.get(0)
    if coefficients is None:
        coefficients = jnp.zeros((bias.shape[0], *source.shape), bias.dtype)
    if sides == "lower":
        return LinearBounds(coefficients, bias, None, None)
    if sides == "upper":
        return LinearBounds(None, None, -coefficients, -bias)
    if not doubled:
        return LinearBounds(coefficients, bias, coefficients, bias)
    return LinearBounds(
        coefficients[:count], bias[:count], -coefficients[count:], -bias[count:]
    )


def _double(rows: Array) -> Array:
    return jnp.concatenate([rows, -rows])


def _contract(rows: Array, value: Array) -> Array:
    """``<rows_k, value>`` for every row, ``[m]``."""
    flat = rows.reshape(rows.shape[0], -1)
    return jnp.dot(flat, value.reshape(-1), precision=jax.lax.Precision.HIGHEST)


def _relax(
    node: Node, rows: Array, lines: Lines
) -> tuple[tuple[Array | None, ...], Array]:
    """Pulls lower-bounding rows back through a nonlinear op: new coefficients, and the constants."""
    positive = rows > 0
    axes = tuple(range(1, rows.ndim))
    lower, upper = lines.lower_intercept, lines.upper_intercept
    constant = jnp.zeros((rows.shape[0],), rows.dtype)
    if lower is not None or upper is not None:
        constant = jnp.sum(rows * _select(positive, lower, upper), axis=axes)
    lower, upper = lines.lower_slope, lines.upper_slope
    if lower is None and upper is None:
        return (None,) * len(node.inputs), constant
    if isinstance(node.op, Scalar):
        return (rows * _select(positive, lower, upper),), constant
    assert isinstance(node.op, Extremum)
    window_rows = rows[..., None] * _select(positive[..., None], lower, upper)
    windows = jax.linear_transpose(
        lambda *values: node.op.windows(node, *values), *node.input_shapes
    )
    return tuple(jax.vmap(windows)(window_rows)), constant


def _select(positive: Array, lower: Array | None, upper: Array | None) -> Array:
    """The lower line's value at positive coefficients, the upper line's at the others, per row."""

    def value(array: Array | None) -> Array | float:
        return 0.0 if array is None else array[None]

    return jnp.where(positive, value(lower), value(upper))


def intersect(first: Interval, second: Interval) -> Interval:
    """The tighter end of two valid intervals each; ends that cross by rounding are exchanged."""
    lower = jnp.maximum(first.lower, second.lower)
    upper = jnp.minimum(first.upper, second.upper)
    return Interval(jnp.minimum(lower, upper), jnp.maximum(lower, upper))

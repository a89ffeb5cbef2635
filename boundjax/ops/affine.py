"""Linear ops: the whitelist, and the pull-back of coefficients through them.

Only this list decides which ops are linear. `jax.linear_transpose` silently accepts casts to
integers and affine maps, so it is applied only to equations whose op is on the list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Structural, Weighted, copies, linear_op, one
from boundjax.ir.node import Node, Op
from boundjax.ir.table import register
from boundjax.ops import convolution, local, matmul
from boundjax.windows import Rows, Windowed, dense, values_of


@overload
def pull_back(node: Node, rows: Array) -> tuple[Array, ...]: ...
@overload
def pull_back(node: Node, rows: Rows) -> tuple[Rows, ...]: ...
def pull_back(node: Node, rows: Rows) -> tuple[Rows, ...]:
    """Pulls coefficients on a linear op's output back to its perturbed operands.

    Args:
      node: an equation of a `Structural` or `Weighted` op.
      rows: coefficients `[m, *node.shape]`, complete or windowed.

    Returns:
      One array `[m, *input.shape]` per perturbed operand; windowed if the rows are and the op
      allows it.
    """
    if not node.size or not any(math.prod(shape.shape) for shape in node.input_shapes):
        # No element depends on another, and windows and matrix products must not be empty.
        count = len(values_of(rows))
        return tuple(jnp.zeros((count, *s.shape), rows.dtype) for s in node.input_shapes)
    if isinstance(rows, Windowed):
        operands = local.pull_back(node, rows)
        if operands is not None:
            return operands
        rows = dense(rows)
    transpose = linear_op(node).transpose
    if transpose is not None:
        return transpose(node, rows)
    return tuple(jax.vmap(jax.linear_transpose(node.apply, *node.input_shapes))(rows))


def rises(node: Node) -> Array:
    """Where a diagonal op's factor is not negative, boolean `[*shape]`."""
    (operand,) = node.input_shapes
    # XLA may flush a tiny factor to zero, which keeps the sign.
    return ~jnp.signbit(node.apply(jnp.ones(operand.shape, operand.dtype)))


def _only_first(node: Node) -> bool:
    first, *rest = node.perturbed
    return first and not any(rest)


def _exactly_one(node: Node) -> bool:
    return sum(node.perturbed) == 1


def _is_number(node: Node) -> bool:
    """Whether the value is floating-point; JAX also multiplies boolean matrices."""
    return jnp.issubdtype(node.dtype, jnp.floating)


def _same_dtype(node: Node) -> bool:
    """Whether a cast changes only the weak type; other casts would change the precision."""
    return node.input_shapes[0].dtype == node.dtype


def _identity(node: Node, rows: Array) -> tuple[Array, ...]:
    return (rows,)


def _reshape(node: Node, rows: Array) -> tuple[Array, ...]:
    return (rows.reshape(rows.shape[0], *node.input_shapes[0].shape),)


def _is_dense(node: Node) -> bool:
    """Whether the product is `x @ W`: x's last axis with the first axis of a weight matrix."""
    (example,) = node.input_shapes
    contract, batch = node.params["dimension_numbers"]
    standard = contract == ((len(example.shape) - 1,), (0,)) and not any(batch)
    return node.perturbed[0] and standard and node.constants[0].ndim == 2


def _dense_magnitude(node: Node, radius: Array) -> Array:
    if not _is_dense(node):
        return node.apply(radius, constants=jnp.abs)
    weights = node.constants[0].astype(radius.dtype)
    *lead, size = radius.shape
    product = matmul.absolute_product(radius.reshape(math.prod(lead), size), weights)
    return product.reshape(node.shape)


def _dense(node: Node, rows: Array) -> tuple[Array, ...]:
    (example,) = node.input_shapes
    if not _is_dense(node):
        return tuple(jax.vmap(jax.linear_transpose(node.apply, example))(rows))
    weights = node.constants[0].astype(rows.dtype)
    product = matmul.rows_matmul(rows.reshape(-1, rows.shape[-1]), weights.T)
    return (product.reshape(rows.shape[0], *example.shape),)


def _difference_signs(node: Node) -> tuple[int, ...]:
    signs = zip((1, -1), node.perturbed, strict=True)
    return tuple(sign for sign, perturbed in signs if perturbed)


def _quotient_change(node: Node, size: Array, errors: Mapping[int, Array]) -> Array:
    """`|x / c' - x / c| <= |x| e / (|c| (|c| - e))` for `|c' - c| <= e`, infinite if `e >= |c|`."""
    ((position, error),) = errors.items()
    divisor = jnp.abs(node.constant(position))
    least = divisor - error
    share = jnp.where(least > 0, error / jnp.where(least > 0, least, 1.0), jnp.inf)
    return jnp.where(error == 0, 0.0, size / divisor * share)


def _two(node: Node) -> int:
    return 2


def _reduced(node: Node) -> int:
    return math.prod(node.input_shapes[0].shape) // max(1, node.size)


def _along_axis(node: Node) -> int:
    return node.shape[node.params["axis"]]


def _table() -> tuple[Op, ...]:
    any_constant = "any operands may be constant"
    one_to_one: dict[str, Any] = {"terms": one, "reach": one}
    same: dict[str, Any] = {"moves": True, "local": local.ELEMENTWISE, "reach": one}
    units: dict[str, Any] = {"moves": True, "local": local.UNIT_AXES, "terms": one}
    return (
        Structural(name="stack", note=any_constant, **one_to_one),
        Structural(name="tile", terms=one, reach=copies),
        Structural(name="reduce_sum", note="also mean, with a division", terms=_reduced, reach=one),
        Structural(name="cumsum", terms=_along_axis, reach=_along_axis),
        *(
            Structural(name=name, moves=True, **one_to_one)
            for name in ("slice", "rev", "split", "unstack")
        ),
        Structural(name="concatenate", note=any_constant, local=local.CONCATENATED, **one_to_one),
        Structural(
            name="pad", note="interior and negative padding too", local=local.PADDED, **one_to_one
        ),
        Structural(
            name="reduce_window_sum",
            note="average pooling, with a division",
            local=local.POOLED,
            terms=local.window_size,
            reach=local.window_size,
        ),
        Structural(
            name="transpose", moves=True, moves_only=True, local=local.PERMUTED, **one_to_one
        ),
        Structural(name="broadcast_in_dim", moves_only=True, reach=copies, **units),
        *(
            Structural(name=n, transpose=_reshape, moves_only=True, reach=one, **units)
            for n in ("reshape", "squeeze")
        ),
        *(
            Structural(name=n, transpose=_identity, moves_only=True, terms=one, **same)
            for n in ("copy", "stop_gradient")
        ),
        Structural(name="add_any", local=local.ELEMENTWISE, terms=_two, reach=one),
        Structural(name="add", elementwise=True, commutative=True, terms=_two, **same),
        Structural(name="sub", elementwise=True, sign=_difference_signs, terms=_two, **same),
        Structural(name="neg", elementwise=True, sign=lambda node: (-1,), terms=one, **same),
        Structural(
            name="convert_element_type",
            note="to the same dtype",
            accepts=_same_dtype,
            transpose=_identity,
            terms=one,
            **same,
        ),
        Structural(
            name="select_n",
            note="with a constant predicate",
            elementwise=True,
            accepts=lambda node: not node.perturbed[0],
            **one_to_one,
        ),
        Structural(name="gather", note="with constant indices", accepts=_only_first, terms=one),
        Structural(
            name="dynamic_slice", note="with constant indices", accepts=_only_first, **one_to_one
        ),
        Structural(
            name="dynamic_update_slice",
            note="with constant indices",
            accepts=lambda node: not any(node.perturbed[2:]),
            **one_to_one,
        ),
        Weighted(
            name="mul",
            note="by a constant; BatchNorm",
            accepts=_exactly_one,
            elementwise=True,
            commutative=True,
            diagonal=True,
            local=local.SCALED,
            terms=one,
            reach=copies,
        ),
        Weighted(
            name="div",
            note="by a constant",
            elementwise=True,
            accepts=_only_first,
            diagonal=True,
            change=_quotient_change,
            local=local.SCALED,
            terms=one,
            reach=copies,
        ),
        Weighted(
            name="dot_general",
            note="one constant factor; dense",
            accepts=lambda node: _exactly_one(node) and _is_number(node),
            transpose=_dense,
            magnitude=_dense_magnitude,
            terms=matmul.contracted,
            reach=matmul.reach_of_weights,
        ),
        Weighted(
            name="conv_general_dilated",
            note="constant kernel; stride, padding, groups, dilation",
            accepts=lambda node: _only_first(node) and _is_number(node),
            transpose=convolution.pull_back,
            local=convolution.LOCAL,
            terms=convolution.terms,
            reach=convolution.reach,
        ),
    )


for _op in _table():
    register(_op)

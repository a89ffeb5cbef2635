"""`rows @ weights` as one primitive whose `vmap` folds the batch into the rows.

`jax.vmap` of a plain product keeps the mapped axis separate, `[B, m, K] @ [K, N]`. The gradient
with respect to the weights then sums over two axes, for which XLA's CPU backend first writes a
transposed copy of the largest array of a CROWN-IBP step. Folding `B` and `m` into one axis, as
JAX itself does for convolutions, makes the product and its gradients plain matrix products.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from boundjax import precision
from boundjax.ir.node import Node

_primitive = Primitive("boundjax_rows_matmul")

# Large weights are made absolute part by part: the approximate size of a part, and the least number
# of parts for which this pays.
_CACHED_BYTES = 2**21
_WORTHWHILE_PARTS = 16


def contracted(node: Node) -> int:
    """The number of products that each element of a `dot_general` sums."""
    contract, _ = node.params["dimension_numbers"]
    first_perturbed = node.perturbed.index(True)
    shape = node.input_shapes[0].shape
    return math.prod(shape[axis] for axis in contract[first_perturbed])


def reach_of_weights(node: Node) -> int:
    """The number of products with constant weights in which an element of the operand occurs."""
    return node.constants[0].size // max(1, contracted(node))


def rows_matmul(rows: Float[Array, "m K"], weights: Float[Array, "K N"]) -> Float[Array, "m N"]:
    """The product of two matrices, linear in each and differentiable."""
    return _primitive.bind(rows, weights, precision=precision.of_products())


@jax.custom_jvp
def absolute_product(
    values: Float[Array, "m K"], weights: Float[Array, "K N"]
) -> Float[Array, "m N"]:
    """Computes `values @ |weights|` without writing the absolute values of large weights to memory.

    On CPU, reading and writing them dominates the cost of interval bounds of a large dense layer;
    a part of them stays in the caches.
    """
    count, size = weights.shape
    parts = size * count * weights.dtype.itemsize // _CACHED_BYTES
    if jax.default_backend() != "cpu" or parts < _WORTHWHILE_PARTS or count % parts:
        return rows_matmul(values, jnp.abs(weights))

    def part(total: Array, operands: tuple[Array, Array]) -> tuple[Array, None]:
        values, weights = operands
        return total + rows_matmul(values, jnp.abs(weights)), None

    value_parts = values.reshape(len(values), parts, -1).swapaxes(0, 1)
    zero = jnp.zeros((len(values), size), values.dtype)
    return lax.scan(part, zero, (value_parts, weights.reshape(parts, -1, size)))[0]


@absolute_product.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    values, weights = primals
    values_tangent, weights_tangent = tangents
    from_weights = rows_matmul(values, jnp.sign(weights) * weights_tangent)
    product = absolute_product(values, weights)
    return product, rows_matmul(values_tangent, jnp.abs(weights)) + from_weights


def _product(rows: Array, weights: Array, *, precision: Any) -> Array:
    return lax.dot_general(rows, weights, (((1,), (0,)), ((), ())), precision=precision)


def _batched(
    operands: tuple[Array, Array], axes: tuple[int | None, int | None], *, precision: Any
) -> Any:
    rows, weights = operands
    rows_axis, weights_axis = axes
    if weights_axis is None:
        assert rows_axis is not None  # `vmap` maps at least one operand
        rows = jnp.moveaxis(rows, rows_axis, 0)
        batch, count, size = rows.shape
        product = _primitive.bind(rows.reshape(batch * count, size), weights, precision=precision)
        return product.reshape(batch, count, product.shape[-1]), 0
    weights = jnp.moveaxis(weights, weights_axis, 0)
    if rows_axis is None:
        rows = jnp.broadcast_to(rows[None], (weights.shape[0], *rows.shape))
    else:
        rows = jnp.moveaxis(rows, rows_axis, 0)
    return jnp.matmul(rows, weights, precision=precision), 0


def _transpose_rows(cotangent: Array, rows: Any, weights: Array, *, precision: Any) -> Array:
    del rows
    return _primitive.bind(cotangent, weights.T, precision=precision)


def _transpose_weights(cotangent: Array, rows: Array, weights: Any, *, precision: Any) -> Array:
    del weights
    return lax.dot_general(rows, cotangent, (((0,), (0,)), ((), ())), precision=precision)


_primitive.def_impl(jax.jit(_product, static_argnames="precision"))
_primitive.def_abstract_eval(
    lambda rows, weights, *, precision: ShapedArray((rows.shape[0], weights.shape[1]), rows.dtype)
)
mlir.register_lowering(_primitive, mlir.lower_fun(_product, multiple_results=False))
batching.primitive_batchers[_primitive] = _batched
ad.defbilinear(_primitive, _transpose_rows, _transpose_weights)

"""Products over an axis, and the cumulative product, maximum, minimum and log-sum-exp."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from boundjax.ir.composite import composite
from boundjax.ir.families import Error, Expansion, Extremum, Joint, Planes, Position, copies
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.ops import exponentials
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic

# --- products -------------------------------------------------------------------------------------


def _first(result: Array, operands: Array, *, axes: tuple[int, ...], logarithms: bool) -> Array:
    del operands, axes, logarithms
    return result


def _in_any_order(
    result: Array, operands: Array, axes: tuple[int, ...], logarithms: bool = False
) -> Array:
    """Marks a product over axes (a log-sum-exp for logarithms), in whatever order it is computed.

    Cumulative results share operands, but a program need not share what it rounds.
    """
    return composite("in_any_order", _first, result, operands, axes=axes, logarithms=logarithms)


def _order_error(node: Node, sizes: Sequence[Array], arithmetic: Arithmetic) -> Error:
    """Each of n factors rounds once, and a partial product may underflow before it is enlarged.

    Partial products are at most the product of `max(1, size)`. If that overflows, a partial product
    may, too, and nothing is stated. A sum of two logarithms, `max + log1p(exp(-difference))`, is
    off by the stated errors of both functions and by three roundings of the largest value.
    """
    axes, sizes = node.params["axes"], lax.stop_gradient(list(sizes))
    count = math.prod(sizes[1].shape[axis] for axis in axes)
    if node.params["logarithms"]:
        largest = jnp.max(sizes[1], axis=axes, keepdims=True) + 1.0 + math.log(count)
        lost = 32.0 * count * arithmetic.unit * largest
        return Error(jnp.broadcast_to(lost, node.shape), 0.0)
    largest = jnp.prod(jnp.maximum(sizes[1], 1.0), axis=axes, keepdims=True)
    largest = jnp.where(largest < 0.25 / arithmetic.underflow, largest, jnp.inf)
    lost = 4.0 * count * arithmetic.underflow * largest
    return Error(jnp.broadcast_to(lost, node.shape), 2.0 * arithmetic.gamma(count))


def _order_planes(
    node: Node, product: Interval, factors: Interval, *, position: Position
) -> Planes:
    def of_product(weights: tuple[Array, ...], product: Array, factors: Array) -> Array:
        del factors
        return weights[0] * product

    one, zero = (jnp.ones(node.shape, node.dtype),), jnp.zeros(node.shape, node.dtype)
    return Planes(of_product, one, zero, one, zero)


register(
    Joint(
        name="in_any_order",
        note="a product over an axis, however it is multiplied",
        image=lambda node, product, factors: product,
        planes=_order_planes,
        error=_order_error,
        terms=lambda node: 2,
        reach=copies,
    )
)


def _product(x: Array, axis: int) -> Array:
    """The product along an axis, which it keeps, as a tree of products of halves."""
    while x.shape[axis] > 1:
        half = x.shape[axis] // 2
        parts = [lax.slice_in_dim(x, k * half, (k + 1) * half, axis=axis) for k in (0, 1)]
        paired = parts[0] * parts[1]
        rest = lax.slice_in_dim(x, 2 * half, x.shape[axis], axis=axis)
        x = paired if not rest.shape[axis] else jnp.concatenate([paired, rest], axis)
    return x


def _reduce_prod(node: Node) -> Callable[[Array], Array]:
    axes = tuple(node.params["axes"])

    def function(x: Array) -> Array:
        if not math.prod(x.shape[axis] for axis in axes):
            return jnp.ones(node.shape, node.dtype)
        product = functools.reduce(_product, axes, x)
        if any(x.shape[axis] > 1 for axis in axes):
            product = _in_any_order(product, x, axes)
        return product.reshape(node.shape)

    return function


def _cumprod(node: Node) -> Callable[[Array], Array]:
    axis, reverse = node.params["axis"], node.params["reverse"]

    def function(x: Array) -> Array:
        x = jnp.flip(x, axis) if reverse else x
        product, distance = x, 1
        while distance < x.shape[axis]:
            # Hillis and Steele 1986: spans of `distance` factors become spans of twice as many.
            kept = lax.slice_in_dim(product, 0, distance, axis=axis)
            late = lax.slice_in_dim(product, distance, x.shape[axis], axis=axis)
            early = lax.slice_in_dim(product, 0, x.shape[axis] - distance, axis=axis)
            product, distance = jnp.concatenate([kept, early * late], axis), 2 * distance
        if x.shape[axis] > 1:
            product = _in_any_order(product, x, (axis,))
        return jnp.flip(product, axis) if reverse else product

    return function


register(Expansion(name="reduce_prod", note="products over axes", expand=_reduce_prod))
register(Expansion(name="cumprod", note="products", expand=_cumprod))


# --- maxima, minima, log-sum-exp ------------------------------------------------------------------


def _earlier(node: Node) -> Array:
    """`[..., n, n]`: whether element k of the axis belongs to the span that ends at j."""
    size = node.shape[node.params["axis"]]
    ones = jnp.ones((size, size), bool)
    spans = jnp.triu(ones) if node.params["reverse"] else jnp.tril(ones)
    return jnp.broadcast_to(spans, _moved(node))


def _spans(node: Node, value: Array) -> Array:
    """The elements of every span, `[*shape, n]`, zero outside."""
    axis = node.params["axis"]
    entries = jnp.broadcast_to(jnp.moveaxis(value, axis, -1)[..., None, :], _moved(node))
    entries = jnp.where(_earlier(node), entries, jnp.zeros_like(entries))
    return jnp.moveaxis(entries, -2, axis)


def _moved(node: Node) -> tuple[int, ...]:
    axis = node.params["axis"]
    size = node.shape[axis]
    return (*node.shape[:axis], *node.shape[axis + 1 :], size, size)


def _span_valid(node: Node) -> Array:
    return jnp.moveaxis(_earlier(node), -2, node.params["axis"])


def _length(node: Node) -> int:
    return node.shape[node.params["axis"]]


def _cumlogsumexp(node: Node) -> Callable[[Array], Array]:
    def function(x: Array) -> Array:
        axis = node.params["axis"]
        entries = jnp.broadcast_to(jnp.moveaxis(x, axis, -1)[..., None, :], _moved(node))
        least = jnp.full_like(entries, -jnp.inf)
        masked = jnp.where(_earlier(node), entries, least)
        sums = composite("logsumexp", exponentials.logsumexp, masked, axes=(-1,))
        return _in_any_order(jnp.moveaxis(sums, -1, axis), x, (axis,), logarithms=True)

    return function


for _name, _sign in (("cummax", 1), ("cummin", -1)):
    register(Extremum(name=_name, sign=_sign, windows=_spans, valid=_span_valid, reach=_length))
register(Expansion(name="cumlogsumexp", note="log-sum-exp", expand=_cumlogsumexp))

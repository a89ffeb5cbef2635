"""Operators that reduce axes: sums, means, norms, extrema, the index of an extremum, cumsum, TopK.

What rounds is written with `jax.numpy`, also for constants, see `boundjax.onnx.elementwise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.onnx.node import Node, Value
from boundjax.ops import integers

# ArgMax unrolls one comparison per class.
_MAX_CLASSES = 1000


def _reduced(node: Node, x: Value, axes: np.ndarray | None) -> tuple[int, ...] | None:
    """The axes to reduce, all of them if none is listed, or None if the node is the identity."""
    empty_is_identity = node.flag("noop_with_empty_axes", False)
    listed = node.attribute_or_operand("axes", axes)
    if not listed and empty_is_identity:
        return None
    return node.axes(listed or range(x.ndim), x.ndim)


def reduction(name: str) -> Callable[..., Value]:
    """The reduction that numpy and JAX both call `name`, over the listed axes or over all."""

    def apply(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
        keepdims = node.flag("keepdims", True)
        reduced = _reduced(node, x, axes)
        if reduced is None:
            return x
        if name == "sum" and node.computes_integers:
            x = integers.exact(x, terms=math.prod(x.shape[axis] for axis in reduced))
        result = getattr(node.xp, name)(x, axis=reduced, keepdims=keepdims)
        # numpy accumulates int32 in int64.
        return np.asarray(result, x.dtype) if node.xp is np else result

    return apply


def composed(function: Callable[[Value, tuple[int, ...], bool], Array]) -> Callable[..., Value]:
    """A reduction that computes more than sums, of floating-point numbers.

    Args:
      function: its value, of the operand, the axes and whether these stay with length 1.
    """

    def apply(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
        keepdims = node.flag("keepdims", True)
        reduced = _reduced(node, x, axes)
        # Without axes to reduce, every element is a sum of its own.
        return function(x, () if reduced is None else reduced, keepdims)

    return apply


def l1(x: Value, axes: tuple[int, ...], keepdims: bool) -> Array:
    """ReduceL1: the sum of absolute values."""
    return jnp.sum(jnp.abs(x), axis=axes, keepdims=keepdims)


def l2(x: Value, axes: tuple[int, ...], keepdims: bool) -> Array:
    """ReduceL2: the Euclidean length."""
    # The length of one number needs no root, whose slope at 0 is infinite.
    if math.prod(x.shape[axis] for axis in axes) == 1:
        return l1(x, axes, keepdims)
    return jnp.sqrt(sum_of_squares(x, axes, keepdims))


def sum_of_squares(x: Value, axes: tuple[int, ...], keepdims: bool) -> Array:
    """ReduceSumSquare."""
    return jnp.sum(jnp.square(x), axis=axes, keepdims=keepdims)


def log_of_sum(x: Value, axes: tuple[int, ...], keepdims: bool) -> Array:
    """ReduceLogSum."""
    return jnp.log(jnp.sum(x, axis=axes, keepdims=keepdims))


def logsumexp(x: Value, axes: tuple[int, ...], keepdims: bool) -> Array:
    """ReduceLogSumExp."""
    if not axes:
        return jnp.asarray(x)
    return jax.nn.logsumexp(x, axis=axes, keepdims=keepdims)


def argument(sign: int) -> Callable[[Node, Value], Value]:
    """ArgMax (`sign` 1) or ArgMin (-1), with comparisons because they have bounds."""

    def apply(node: Node, x: Value) -> Value:
        axis = node.axis(node.integer("axis", 0), x.ndim)
        keepdims = node.flag("keepdims", True)
        last = node.flag("select_last_index", False)
        if not 1 <= x.shape[axis] <= _MAX_CLASSES:
            raise node.error(f"expected 1 to {_MAX_CLASSES} classes, got {x.shape[axis]}")
        if node.xp is np:
            return _known_argument(x, sign, axis, keepdims, last)
        values = [jax.lax.index_in_dim(x, k, axis, keepdims=keepdims) for k in range(x.shape[axis])]
        return _argument(values, sign, last)

    return apply


def _known_argument(x: np.ndarray, sign: int, axis: int, keepdims: bool, last: bool) -> np.ndarray:
    find = np.argmax if sign > 0 else np.argmin
    if not last:
        return find(x, axis=axis, keepdims=keepdims)
    return x.shape[axis] - 1 - find(np.flip(x, axis), axis=axis, keepdims=keepdims)


def _argument(values: list[Array], sign: int, last: bool) -> Array:
    best, *rest = values
    index = None
    for k, value in enumerate(rest, 1):
        # Compare the difference with 0: its bounds are tighter than two separate intervals.
        ahead = value - best if sign > 0 else best - value
        above = ahead >= 0 if last else ahead > 0
        if index is None:
            index = above.astype(jnp.float32)
        else:
            index = jnp.where(above, jnp.full(index.shape, k, jnp.float32), index)
        if k < len(rest):
            best = jnp.maximum(best, value) if sign > 0 else jnp.minimum(best, value)
    return jnp.zeros(best.shape, jnp.float32) if index is None else index


def cumulative_sum(node: Node, x: Value, axis: np.ndarray) -> Value:
    """CumSum, from either end, with or without the element itself."""
    along = node.axis(int(node.to_number(axis)), x.ndim)
    exclusive, reverse = node.flag("exclusive", False), node.flag("reverse", False)
    length = x.shape[along]
    if node.computes_integers:
        x = integers.exact(x, terms=length)
    if exclusive and length:
        # A sum less its last term would round once more.
        kept, shift = slice(0, length - 1), (1, 0)
        if reverse:
            kept, shift = slice(1, length), (0, 1)
        x = x[(slice(None),) * along + (kept,)]
        x = node.xp.pad(x, [shift if k == along else (0, 0) for k in range(x.ndim)])
    if node.xp is np:
        x = np.flip(x, along) if reverse else x
        total = np.cumsum(x, axis=along, dtype=x.dtype)
        return np.flip(total, along) if reverse else total
    return jax.lax.cumsum(jnp.asarray(x), along, reverse=reverse)


def top_k(node: Node, x: Value, count: np.ndarray | None = None) -> Value:
    """TopK without its second output, the indices."""
    axis = node.axis(node.integer("axis", -1), x.ndim)
    largest = node.flag("largest", True)
    node.flag("sorted", True)  # any order is allowed if it is 0
    k = node.integer("k") if count is None else int(node.to_number(count))
    if not 0 <= k <= x.shape[axis]:
        raise node.error(f"expected at most {x.shape[axis]} elements, got k = {k}")
    if k == 1:
        return (node.xp.max if largest else node.xp.min)(x, axis=axis, keepdims=True)
    ordered = node.xp.sort(x, axis=axis)
    ordered = node.xp.flip(ordered, axis) if largest else ordered
    return ordered[(slice(None),) * axis + (slice(0, k),)]

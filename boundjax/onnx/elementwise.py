"""Operators of arithmetic, comparisons, reductions and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.onnx.node import Node
from boundjax.ops import integers

Value = Any  # np.ndarray while constants are folded, else a JAX array
# Unrolled by ArgMax.
_MOST_CLASSES = 1000


def _same_rank(node: Node, *values: Value) -> tuple[Value, ...]:
    """Values with leading axes of length 1, so that broadcasting them changes no rank."""
    rank = max(v.ndim for v in values)
    node.check_size(np.broadcast_shapes(*(v.shape for v in values)))
    if node.xp is np and len({v.dtype for v in values if v.dtype != np.bool_}) > 1:
        raise node.error(f"expected operands of one type, got {[str(v.dtype) for v in values]}")
    return tuple(
        v if v.ndim == rank else node.xp.reshape(v, (1,) * (rank - v.ndim) + v.shape)
        for v in values
    )


def unary(name: str) -> Callable[[Node, Value], Value]:
    """A function that numpy and JAX both call ``name``."""
    return lambda node, x: getattr(node.xp, name)(x)


def binary(name: str) -> Callable[[Node, Value, Value], Value]:
    """A function of two broadcast operands, by its name in numpy."""
    return lambda node, x, y: getattr(node.xp, name)(*_same_rank(node, x, y))


def variadic(function: Callable[[Node, Value, Value], Value]) -> Callable[..., Value]:
    """A function of two operands, applied to any number of them from the left."""
    return lambda node, *values: reduce(lambda x, y: function(node, x, y), values)


def arithmetic(function: Callable[..., Value]) -> Callable[..., Value]:
    """A function whose value may be too large an integer, see `boundjax.ops.integers.exact`."""

    def apply(node: Node, *values: Value) -> Value:
        result = function(node, *values)
        return integers.exact(result) if node.computes_integers else result

    return apply


def divide(node: Node, x: Value, y: Value) -> Value:
    """Div: of integers towards 0."""
    x, y = _same_rank(node, x, y)
    if x.dtype.kind != "i":
        return node.xp.divide(x, y)
    if not y.all():
        raise node.error("divides integers by 0")
    quotient = np.abs(x) // np.abs(y)
    return (np.sign(x) * np.sign(y) * quotient).astype(x.dtype)


def power(node: Node, x: Value, y: Value) -> Value:
    """Pow: of a perturbed value mostly by a known integer."""
    if isinstance(y, np.ndarray) and y.size == 1 and y.ndim <= x.ndim:
        exponent = float(y.reshape(()))
        if exponent.is_integer() and abs(exponent) < 128:
            return jax.lax.integer_pow(jnp.asarray(x), int(exponent))
    return jnp.power(*_same_rank(node, x, y))


def where(node: Node, condition: Value, x: Value, y: Value) -> Value:
    """Where."""
    condition, x, y = _same_rank(node, condition, x, y)
    return node.xp.where(condition, x, y)


def reduction(name: str) -> Callable[..., Value]:
    """Sum, mean, max, ... over axes; over all of them where none are named."""

    def apply(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
        keepdims = node.flag("keepdims", True)
        empty_is_identity = node.flag("noop_with_empty_axes", False)
        chosen = node.integers_of("axes", axes)
        if not chosen and empty_is_identity:
            return x
        chosen = node.axes(chosen or range(x.ndim), x.ndim)
        if name == "sum" and node.computes_integers:
            x = integers.exact(x, terms=math.prod(x.shape[axis] for axis in chosen))
        result = getattr(node.xp, name)(x, axis=chosen, keepdims=keepdims)
        # numpy counts in its widest integer.
        return np.asarray(result, x.dtype) if node.xp is np else result

    return apply


def argmax(node: Node, x: Value) -> Value:
    """ArgMax, of the first maximum, from comparisons: for them there are bounds."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    keepdims = node.flag("keepdims", True)
    node.only("select_last_index", 0)
    if node.xp is np:
        return np.argmax(x, axis=axis, keepdims=keepdims)
    if not 1 <= x.shape[axis] <= _MOST_CLASSES:
        raise node.error(f"expected 1 to {_MOST_CLASSES} classes, got {x.shape[axis]}")
    best, *others = (
        jax.lax.index_in_dim(x, k, axis, keepdims=keepdims) for k in range(x.shape[axis])
    )
    index = None
    for k, value in enumerate(others, 1):
        # The difference has bounds of its own, tighter than what two intervals say about it.
        above = value - best > 0
        if index is None:
            index = above.astype(jnp.float32)
        else:
            index = jnp.where(above, jnp.full(index.shape, k, jnp.float32), index)
        if k < len(others):
            best = jnp.maximum(best, value)
    return jnp.zeros(best.shape, jnp.float32) if index is None else index


def clip(
    node: Node, x: Value, least: np.ndarray | None = None, most: np.ndarray | None = None
) -> Value:
    """Clip: ends as attributes before opset 11, then as operands; either may be absent."""
    ends = []
    for name, operand in (("min", least), ("max", most)):
        attribute = node.number(name, None)
        if attribute is not None and operand is not None:
            raise node.error(f"{name} is given twice, as an attribute and as an operand")
        end = attribute if operand is None else node.known_number(operand)
        ends.append(None if end is None else np.float32(end))
    low, high = ends
    if low is not None and high is not None:
        return jnp.clip(x, low, high)
    if low is not None:
        return jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


def elu(node: Node, x: Value) -> Value:
    """Elu."""
    return jax.nn.elu(x, node.number("alpha", 1.0))


def gelu(node: Node, x: Value) -> Value:
    """Gelu: exact, or by tanh."""
    approximate = node.text("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise node.error(f"attribute approximate: expected 'none' or 'tanh', got {approximate!r}")
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def hard_sigmoid(node: Node, x: Value) -> Value:
    """HardSigmoid: ``clip(alpha x + beta, 0, 1)``."""
    line = node.number("alpha", 0.2) * x + node.number("beta", 0.5)
    return jnp.clip(line, np.float32(0), np.float32(1))


def leaky_relu(node: Node, x: Value) -> Value:
    """LeakyRelu."""
    return jax.nn.leaky_relu(x, node.number("alpha", 0.01))


def prelu(node: Node, x: Value, slope: np.ndarray) -> Value:
    """PRelu: a slope below 0 that broadcasts to the operand."""
    if np.broadcast_shapes(slope.shape, x.shape) != x.shape:
        raise node.error(f"expected a slope that broadcasts to {x.shape}, got {slope.shape}")
    x, slope = _same_rank(node, x, slope)
    return jnp.where(x > 0, x, slope * x)


def selu(node: Node, x: Value) -> Value:
    """Selu: scale (exp - 1) with two constants, by default those of the paper."""
    alpha = node.number("alpha", 1.6732632423543772)
    gamma = node.number("gamma", 1.0507009873554805)
    return gamma * jax.nn.elu(x, alpha)

"""Operators of arithmetic, comparisons, reductions and activations.

A step may act on a constant that is a numpy array. What rounds is then written with `jax.numpy`, so
that it is traced and bounds account for it; numpy would compute it unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.onnx.node import Node, Value
from boundjax.ops import integers

# ArgMax unrolls one comparison per class.
_MAX_CLASSES = 1000


def _same_rank(node: Node, *values: Value) -> tuple[Value, ...]:
    """Adds leading axes of length 1, so that broadcasting promotes no rank."""
    rank = max(v.ndim for v in values)
    node.check_size(np.broadcast_shapes(*(v.shape for v in values)))
    if node.xp is np and len({v.dtype for v in values if v.dtype != np.bool_}) > 1:
        raise node.error(f"expected operands of one type, got {[str(v.dtype) for v in values]}")
    return tuple(
        v if v.ndim == rank else node.xp.reshape(v, (1,) * (rank - v.ndim) + v.shape)
        for v in values
    )


def unary(name: str) -> Callable[[Node, Value], Value]:
    """The function of one operand that numpy and JAX both call `name`."""
    return lambda node, x: getattr(node.xp, name)(x)


def binary(name: str) -> Callable[[Node, Value, Value], Value]:
    """The function of two broadcast operands that numpy and JAX both call `name`."""
    return lambda node, x, y: getattr(node.xp, name)(*_same_rank(node, x, y))


def variadic(function: Callable[[Node, Value, Value], Value]) -> Callable[..., Value]:
    """Folds a function of two operands over any number of them, from the left."""
    return lambda node, *values: reduce(lambda x, y: function(node, x, y), values)


def arithmetic(function: Callable[..., Value]) -> Callable[..., Value]:
    """Makes bounds NaN where integers exceed 2^24, see `boundjax.ops.integers.exact`."""

    def apply(node: Node, *values: Value) -> Value:
        result = function(node, *values)
        return integers.exact(result) if node.computes_integers else result

    return apply


def divide(node: Node, x: Value, y: Value) -> Value:
    """Div; integer quotients are rounded towards 0."""
    x, y = _same_rank(node, x, y)
    if x.dtype.kind != "i":
        return node.xp.divide(x, y)
    if not y.all():
        raise node.error("expected integer divisors other than 0, got 0")
    quotient = np.abs(x) // np.abs(y)
    return (np.sign(x) * np.sign(y) * quotient).astype(x.dtype)


def reciprocal(x: Value) -> Value:
    """Reciprocal."""
    return jnp.divide(np.float32(1.0), x)


def power(node: Node, x: Value, y: Value) -> Value:
    """Pow; a small constant integer exponent becomes `integer_pow`."""
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
    """The reduction that numpy and JAX both call `name`, over the listed axes or over all."""

    def apply(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
        keepdims = node.flag("keepdims", True)
        empty_is_identity = node.flag("noop_with_empty_axes", False)
        listed = node.attribute_or_operand("axes", axes)
        if not listed and empty_is_identity:
            return x
        reduced = node.axes(listed or range(x.ndim), x.ndim)
        if name == "sum" and node.computes_integers:
            x = integers.exact(x, terms=math.prod(x.shape[axis] for axis in reduced))
        result = getattr(node.xp, name)(x, axis=reduced, keepdims=keepdims)
        # numpy accumulates int32 in int64.
        return np.asarray(result, x.dtype) if node.xp is np else result

    return apply


def argmax(node: Node, x: Value) -> Value:
    """ArgMax (the first maximum), written with comparisons because they have bounds."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    keepdims = node.flag("keepdims", True)
    node.only("select_last_index", 0)
    if node.xp is np:
        return np.argmax(x, axis=axis, keepdims=keepdims)
    if not 1 <= x.shape[axis] <= _MAX_CLASSES:
        raise node.error(f"expected 1 to {_MAX_CLASSES} classes, got {x.shape[axis]}")
    best, *rest = (
        jax.lax.index_in_dim(x, k, axis, keepdims=keepdims) for k in range(x.shape[axis])
    )
    index = None
    for k, value in enumerate(rest, 1):
        # Compare the difference with 0: its bounds are tighter than two separate intervals.
        above = value - best > 0
        if index is None:
            index = above.astype(jnp.float32)
        else:
            index = jnp.where(above, jnp.full(index.shape, k, jnp.float32), index)
        if k < len(rest):
            best = jnp.maximum(best, value)
    return jnp.zeros(best.shape, jnp.float32) if index is None else index


def clip(node: Node, x: Value, minimum: Value | None = None, maximum: Value | None = None) -> Value:
    """Clip; both limits are optional, attributes before opset 11 and operands since."""
    limits = []
    for name, operand in (("min", minimum), ("max", maximum)):
        attribute = node.number(name, None)
        if attribute is not None and operand is not None:
            raise node.error(f"{name} is given twice, as an attribute and as an operand")
        limit = attribute if operand is None else node.to_number(operand)
        limits.append(limit if limit is None or isinstance(limit, Array) else np.float32(limit))
    low, high = limits
    if low is not None and high is not None:
        return jnp.clip(x, low, high)
    if low is not None:
        return jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


def elu(node: Node, x: Value) -> Value:
    """Elu."""
    return jax.nn.elu(x, node.number("alpha", 1.0))


def gelu(node: Node, x: Value) -> Value:
    """Gelu, exact or with the tanh approximation."""
    approximate = node.text("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise node.error(f"attribute approximate: expected 'none' or 'tanh', got {approximate!r}")
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def hard_sigmoid(node: Node, x: Value) -> Value:
    """HardSigmoid: `clip(alpha x + beta, 0, 1)`."""
    line = jnp.add(jnp.multiply(node.number("alpha", 0.2), x), node.number("beta", 0.5))
    return jnp.clip(line, np.float32(0), np.float32(1))


def leaky_relu(node: Node, x: Value) -> Value:
    """LeakyRelu."""
    return jax.nn.leaky_relu(x, node.number("alpha", 0.01))


def prelu(node: Node, x: Value, slope: Value) -> Value:
    """PRelu; the slope of negative values must broadcast to the operand."""
    if np.broadcast_shapes(slope.shape, x.shape) != x.shape:
        raise node.error(f"expected a slope that broadcasts to {x.shape}, got {slope.shape}")
    x, slope = _same_rank(node, x, slope)
    return jnp.where(x > 0, x, jnp.multiply(slope, x))


def selu(node: Node, x: Value) -> Value:
    """Selu: `gamma elu(x, alpha)`; the defaults are the paper's constants."""
    alpha = node.number("alpha", 1.6732632423543772)
    gamma = node.number("gamma", 1.0507009873554805)
    return gamma * jax.nn.elu(x, alpha)

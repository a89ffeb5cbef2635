"""Activation functions. What rounds is traced, also for constants, see `elementwise`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.onnx.elementwise import same_rank
from boundjax.onnx.node import Node, Value


def celu(node: Node, x: Value) -> Value:
    """Celu: `max(x, 0) + min(alpha (exp(x / alpha) - 1), 0)`."""
    alpha = node.number("alpha", 1.0)
    if alpha == 0.0:
        raise node.error("attribute alpha: expected a number other than 0, got 0.0")
    return jax.nn.celu(x, alpha)


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
    x, slope = same_rank(node, x, slope)
    return jnp.where(x > 0, x, jnp.multiply(slope, x))


def selu(node: Node, x: Value) -> Value:
    """Selu: `gamma elu(x, alpha)`; the defaults are the paper's constants."""
    alpha = node.number("alpha", 1.6732632423543772)
    gamma = node.number("gamma", 1.0507009873554805)
    return gamma * jax.nn.elu(x, alpha)


def shrink(node: Node, x: Value) -> Value:
    """Shrink: `x + bias` below `-lambd`, `x - bias` above `lambd`, 0 between."""
    limit, bias = np.float32(node.number("lambd", 0.5)), np.float32(node.number("bias", 0.0))
    x = jnp.asarray(x)
    if bias == limit >= 0:
        # Soft shrinkage is continuous; written so, it has linear bounds.
        return jax.nn.relu(x - limit) - jax.nn.relu(-x - limit)
    below = jnp.minimum(x, -limit) + bias
    above = jnp.maximum(x, limit) - bias
    zero = jnp.zeros(x.shape, x.dtype)
    # The extrema change no value; they restrict what bounds take for one.
    return jnp.where(x < -limit, below, jnp.where(x > limit, above, zero))


def swish(node: Node, x: Value) -> Value:
    """Swish: `x sigmoid(alpha x)`."""
    alpha = np.float32(node.number("alpha", 1.0))
    if alpha == 1:
        return jax.nn.silu(x)
    if alpha == 0:
        return jnp.multiply(x, np.float32(0.5))
    return jnp.divide(jax.nn.silu(jnp.multiply(x, alpha)), alpha)


def thresholded_relu(node: Node, x: Value) -> Value:
    """ThresholdedRelu: `x` above `alpha`, else 0."""
    alpha = np.float32(node.number("alpha", 1.0))
    if alpha == 0:
        return jax.nn.relu(x)
    x = jnp.asarray(x)
    # The maximum changes no value; it restricts what bounds take for one.
    return jnp.where(x > alpha, jnp.maximum(x, alpha), jnp.zeros(x.shape, x.dtype))

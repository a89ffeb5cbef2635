"""Operators that normalise: by constants, by the moments of a row, by its length.

Layer, instance, group and RMS norms are written in a form that tracing knows as one op. Variances
are means of squares around the mean, as onnxruntime computes them, and for groups, where it follows
the operator's definition, `E[x^2] - E[x]^2`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.onnx.node import Node, Value


def batch_normalization(
    node: Node,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    variance: Value,
) -> Value:
    """BatchNormalization at inference: one scale and one shift per channel."""
    node.number("momentum", 0.9)  # affects only training
    node.only("training_mode", 0)
    node.only("spatial", 1)
    epsilon = np.float32(node.number("epsilon", 1e-5))
    shapes = {v.shape for v in (scale, bias, mean, variance)}
    if x.ndim < 2 or shapes != {(x.shape[1],)}:
        raise node.error(
            f"expected four arrays with one number per channel of {x.shape}, got {sorted(shapes)}"
        )
    # Computed where it is traced, not by numpy, so that bounds account for all of the rounding.
    factor = jnp.divide(scale, jnp.sqrt(jnp.add(variance, epsilon)))
    shift = bias - mean * factor
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    return x * factor.reshape(per_channel) + shift.reshape(per_channel)


def _centred(x: Value, axes: Sequence[int]) -> Array:
    return jnp.subtract(x, jnp.mean(x, axis=tuple(axes), keepdims=True))


def _by_root_mean_square(node: Node, d: Value, axes: Sequence[int]) -> Array:
    """`d / sqrt(mean(d^2) + epsilon)`."""
    epsilon = np.float32(node.number("epsilon", 1e-5))
    mean = jnp.mean(jnp.square(d), axis=tuple(axes), keepdims=True)
    return jnp.multiply(d, jax.lax.rsqrt(jnp.add(mean, epsilon)))


def _affine(node: Node, y: Array, scale: Value, bias: Value | None) -> Array:
    """`scale y + bias`, both of which must broadcast to `y`."""
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and np.broadcast_shapes(value.shape, y.shape) != y.shape:
            raise node.error(f"expected a {name} that broadcasts to {y.shape}, got {value.shape}")

    def full(value: Value) -> Value:
        return value.reshape((1,) * (y.ndim - value.ndim) + value.shape)

    y = jnp.multiply(y, full(scale))
    return y if bias is None else jnp.add(y, full(bias))


def layer_normalization(node: Node, x: Value, scale: Value, bias: Value | None = None) -> Value:
    """LayerNormalization over `axis` and all later axes, without its other outputs."""
    node.only("stash_type", 1)
    axes = range(node.axis(node.integer("axis", -1), x.ndim), x.ndim)
    return _affine(node, _by_root_mean_square(node, _centred(x, axes), axes), scale, bias)


def rms_normalization(node: Node, x: Value, scale: Value) -> Value:
    """RMSNormalization and SimplifiedLayerNormalization, without its other output."""
    node.only("stash_type", 1)
    axes = range(node.axis(node.integer("axis", -1), x.ndim), x.ndim)
    return _affine(node, _by_root_mean_square(node, x, axes), scale, None)


def _per_channel(node: Node, x: Value, values: Value) -> Value:
    if values.shape != (x.shape[1],):
        raise node.error(f"expected one number per channel of {x.shape}, got {values.shape}")
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def instance_normalization(node: Node, x: Value, scale: Value, bias: Value) -> Value:
    """InstanceNormalization: every channel by the moments of its pixels."""
    if x.ndim < 3:
        raise node.error(f"expected [batch, channels, *spatial], got shape {x.shape}")
    scale, bias = (_per_channel(node, x, v) for v in (scale, bias))
    axes = range(2, x.ndim)
    return _affine(node, _by_root_mean_square(node, _centred(x, axes), axes), scale, bias)


def group_normalization(node: Node, x: Value, scale: Value, bias: Value) -> Value:
    """GroupNormalization; scale and bias belong to groups before opset 21, to channels since."""
    groups = node.integer("num_groups")
    node.only("stash_type", 1)
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        raise node.error(
            f"expected [batch, channels, *spatial] with {groups} groups, got shape {x.shape}"
        )
    rows = jnp.reshape(x, (x.shape[0], groups, -1))
    if node.opset < 21:
        if {scale.shape, bias.shape} != {(groups,)}:
            raise node.error(f"expected one number per group, got {scale.shape} and {bias.shape}")
        scale, bias = (v.reshape(1, -1, 1) for v in (scale, bias))
    epsilon = np.float32(node.number("epsilon", 1e-5))
    mean, squares = (jnp.mean(v, axis=2, keepdims=True) for v in (rows, jnp.square(rows)))
    # This cancels where means are large, and so does what runtimes compute.
    variance = jnp.subtract(squares, jnp.square(mean))
    y = (rows - mean) * jax.lax.rsqrt(variance + epsilon)
    if node.opset < 21:
        return jnp.reshape(_affine(node, y, scale, bias), x.shape)
    scale, bias = (_per_channel(node, x, v) for v in (scale, bias))
    return _affine(node, jnp.reshape(y, x.shape), scale, bias)


def lp_normalization(node: Node, x: Value) -> Value:
    """LpNormalization: rows divided by their length; a row of zeros stays."""
    axis = node.axis(node.integer("axis", -1), x.ndim)
    power = node.integer("p", 2)
    if power not in (1, 2):
        raise node.error(f"attribute p: only 1 and 2 are supported, got {power}")
    terms = jnp.square(x) if power == 2 else jnp.abs(x)
    total = jnp.sum(terms, axis=axis, keepdims=True)
    length = jnp.sqrt(total) if power == 2 else total
    divided = jnp.divide(x, length)
    return jnp.where(length > 0, divided, jnp.zeros(divided.shape, divided.dtype))


def mean_variance_normalization(node: Node, x: Value) -> Value:
    """MeanVarianceNormalization: `(x - mean) / (deviation + 1e-9)`."""
    axes = node.axes(node.integers("axes") or (0, 2, 3), x.ndim)
    centred = _centred(x, axes)
    variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
    return jnp.divide(centred, jnp.add(jnp.sqrt(variance), np.float32(1e-9)))


def local_response_normalization(node: Node, x: Value) -> Value:
    """LRN: `x / (bias + alpha / size sum(x^2))^beta`, the sum over neighbouring channels."""
    size = node.integer("size")
    alpha, beta, bias = (
        np.float32(node.number(name, value))
        for name, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    if x.ndim < 3 or size < 1 or size % 2 == 0 or bias <= 0 or alpha < 0:
        raise node.error(
            "expected [batch, channels, *spatial], an odd size, a bias above 0 and an alpha of at "
            f"least 0, got shape {x.shape}, {size}, {bias} and {alpha}"
        )
    ones = (1,) * (x.ndim - 2)
    pads = [(0, 0), (size // 2, size // 2), *((0, 0) for _ in ones)]
    total = jax.lax.reduce_window(
        jnp.square(x), np.float32(0), jax.lax.add, (1, size, *ones), (1,) * x.ndim, pads
    )
    # The quotient is rounded, and therefore traced.
    factor = jnp.divide(alpha, np.float32(size))
    base = jnp.add(jnp.multiply(total, factor), bias)
    return jnp.multiply(x, jnp.power(base, -beta))

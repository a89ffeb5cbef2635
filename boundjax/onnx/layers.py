"""Operators of layers: products, convolutions, pooling, softmax.

Products run at full precision: an accelerator's default would lose the digits in which a
counterexample differs from a safe output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from boundjax.onnx.node import Node, Value
from boundjax.ops.extremum import Pooling, pooled

_EXACT = lax.Precision.HIGHEST


def matmul(node: Node, x: Value, y: Value) -> Value:
    """MatMul, with numpy's semantics."""
    if x.ndim and y.ndim and x.ndim != y.ndim and min(x.ndim, y.ndim) > 2:
        rank = max(x.ndim, y.ndim)
        x, y = (jnp.reshape(v, (1,) * (rank - v.ndim) + v.shape) for v in (x, y))
    return jnp.matmul(x, y, precision=_EXACT)


def gemm(node: Node, x: Value, y: Value, z: Value | None = None) -> Value:
    """Gemm: `alpha x y + beta z`, with `x` and `y` transposed if the attributes say so."""
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    transpose_x, transpose_y = node.flag("transA", False), node.flag("transB", False)
    if x.ndim != 2 or y.ndim != 2:
        raise node.error(f"expected two matrices, got shapes {x.shape} and {y.shape}")
    x, y = (x.T if transpose_x else x), (y.T if transpose_y else y)
    if alpha != 1.0:
        y = jnp.multiply(y, np.float32(alpha))  # traced, so that bounds count its rounding
    result = jnp.matmul(x, y, precision=_EXACT)
    if z is None or beta == 0.0:
        return result
    if np.broadcast_shapes(z.shape, result.shape) != result.shape:
        raise node.error(f"expected a C that broadcasts to {result.shape}, got {z.shape}")
    addend = z.reshape((1,) * (2 - z.ndim) + z.shape)
    return result + (addend if beta == 1.0 else jnp.multiply(addend, np.float32(beta)))


class _Window:
    """The window of a convolution or a pooling.

    Attributes:
      size, strides, dilations: one per spatial axis.
      pads: one pair (before, after) per spatial axis.
      extra: elements behind the last window of a transposed convolution, per spatial axis.
    """

    def __init__(self, node: Node, x: Value, size: Sequence[int], transposed: bool = False) -> None:
        """Reads and checks the attributes of a node.

        Args:
          node: whose attributes are read.
          x: the operand `[batch, channels, *spatial]`.
          size: of the window.
          transposed: whether the window moves over the result, as in ConvTranspose.
        """
        rank = len(size)
        if rank < 1 or x.ndim != rank + 2:
            raise node.error(
                f"expected an operand [batch, channels, {rank} spatial axes], got shape {x.shape}"
            )
        self.size = tuple(size)
        self.strides = node.integers("strides") or (1,) * rank
        self.dilations = node.integers("dilations") or (1,) * rank
        for values in (self.size, self.strides, self.dilations):
            if len(values) != rank or min(values) < 1:
                raise node.error(
                    f"expected {rank} positive sizes, strides and dilations, got {values}"
                )
        self.extra = (0,) * rank
        if transposed:
            self.extra = node.integers("output_padding") or self.extra
            if len(self.extra) != rank or min(self.extra) < 0:
                raise node.error(f"expected {rank} output_padding of at least 0, got {self.extra}")
        declared = node.integers("pads")
        auto = node.text("auto_pad", "NOTSET")
        if declared is not None and (len(declared) != 2 * rank or min(declared) < 0):
            raise node.error(f"expected {2 * rank} pads of at least 0, got {declared}")
        if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise node.error(f"attribute auto_pad: {auto!r} is not supported")
        if auto != "NOTSET" and declared is not None and any(declared):
            raise node.error(f"expected pads or auto_pad, got both {declared} and {auto!r}")
        flat = declared or (0,) * (2 * rank)
        self.pads = tuple(zip(flat[:rank], flat[rank:], strict=True))
        lengths = x.shape[2:]
        wanted = self._wanted(node, lengths, auto) if transposed else None
        if wanted is not None:
            self.pads = tuple(
                self._pads_to(node, auto, k, *sizes)
                for k, sizes in enumerate(zip(lengths, wanted, strict=True))
            )
        elif auto.startswith("SAME"):
            self.pads = tuple(self._same_pads(length, k, auto) for k, length in enumerate(lengths))

    def _wanted(self, node: Node, lengths: Sequence[int], auto: str) -> tuple[int, ...] | None:
        """The sizes that a transposed convolution must have, if the pads follow from them."""
        shape = node.integers("output_shape")
        if not shape:
            if not auto.startswith("SAME"):
                return None
            return tuple(n * stride for n, stride in zip(lengths, self.strides, strict=True))
        shape = shape[-len(self.size) :] if len(shape) == len(self.size) + 2 else shape
        if len(shape) != len(self.size):
            raise node.error(f"expected an output_shape of {len(self.size)} sizes, got {shape}")
        return shape

    def _pads_to(self, node: Node, auto: str, k: int, length: int, size: int) -> tuple[int, int]:
        """The pads that leave `size` elements of an axis of a transposed convolution."""
        full = (length - 1) * self.strides[k] + self.extra[k] + self.extents[k]
        if not 1 <= size <= full:
            raise node.error(
                f"expected 1 to {full} elements of spatial axis {k}, got {size}; "
                "what lies beyond the kernel is undefined"
            )
        return _shares(full - size, auto == "SAME_UPPER")

    def _same_pads(self, length: int, k: int, auto: str) -> tuple[int, int]:
        outputs = -(-length // self.strides[k])
        total = max(0, (outputs - 1) * self.strides[k] + self.extents[k] - length)
        return _shares(total, auto == "SAME_UPPER")

    @property
    def extents(self) -> tuple[int, ...]:
        """Length of the dilated window along each axis."""
        return tuple((n - 1) * d + 1 for n, d in zip(self.size, self.dilations, strict=True))


def _shares(total: int, small_first: bool) -> tuple[int, int]:
    """Halves a number of pads; one end gets the odd one."""
    small, large = total // 2, total - total // 2
    return (small, large) if small_first else (large, small)


def _kernel(node: Node, x: Value, weights: Value, channels: int) -> int:
    """Checks a kernel whose axis `channels` counts the operand's channels; returns the groups."""
    groups = node.integer("group", 1)
    declared = node.integers("kernel_shape")
    if weights.ndim < 3 or weights.ndim != x.ndim:
        raise node.error(f"expected a kernel of rank {x.ndim}, got shape {weights.shape}")
    if declared is not None and declared != weights.shape[2:]:
        raise node.error(f"expected a kernel of size {declared}, got shape {weights.shape}")
    if groups < 1 or x.shape[1] % groups or weights.shape[0] % groups:
        raise node.error(f"expected groups that divide the channels, got {groups} groups")
    if weights.shape[channels] * (groups if channels == 1 else 1) != x.shape[1]:
        raise node.error(
            f"expected a kernel for {x.shape[1]} channels, got shape {weights.shape} "
            f"and {groups} groups"
        )
    return groups


def _with_bias(node: Node, y: Value, bias: Value | None) -> Value:
    if bias is None:
        return y
    if bias.shape != (y.shape[1],):
        raise node.error(f"expected a bias of shape {(y.shape[1],)}, got {bias.shape}")
    return y + bias.reshape((1, -1) + (1,) * (y.ndim - 2))


def conv(node: Node, x: Value, weights: Value, bias: Value | None = None) -> Value:
    """Conv: kernel `[outputs, channels / groups, *size]`."""
    groups = _kernel(node, x, weights, channels=1)
    window = _Window(node, x, weights.shape[2:])
    y = lax.conv_general_dilated(
        x,
        weights,
        window.strides,
        window.pads,
        rhs_dilation=window.dilations,
        feature_group_count=groups,
        precision=_EXACT,
    )
    return _with_bias(node, y, bias)


def conv_transpose(node: Node, x: Value, weights: Value, bias: Value | None = None) -> Value:
    """ConvTranspose: kernel `[channels, outputs / groups, *size]`."""
    groups = _kernel(node, x, weights, channels=0)
    window = _Window(node, x, weights.shape[2:], transposed=True)
    inputs, outputs = weights.shape[:2]
    kernel = weights.reshape(groups, inputs // groups, outputs, *window.size)
    kernel = kernel.swapaxes(1, 2).reshape(groups * outputs, inputs // groups, *window.size)
    pads = [
        (extent - 1 - low, extent - 1 - high + more)
        for extent, (low, high), more in zip(window.extents, window.pads, window.extra, strict=True)
    ]
    y = lax.conv_general_dilated(
        x,
        _flipped(kernel),
        (1,) * len(window.size),
        # Crop afterwards: with pads of both signs XLA's CPU backend reads out of bounds.
        [(max(low, 0), max(high, 0)) for low, high in pads],
        lhs_dilation=window.strides,
        rhs_dilation=window.dilations,
        feature_group_count=groups,
        precision=_EXACT,
    )
    starts = [0, 0, *(max(-low, 0) for low, _ in pads)]
    ends = [
        *y.shape[:2],
        *(n - max(-high, 0) for n, (_, high) in zip(y.shape[2:], pads, strict=True)),
    ]
    if starts != [0] * y.ndim or ends != list(y.shape):
        y = lax.slice(y, starts, ends)
    return _with_bias(node, y, bias)


def _flipped(kernel: Value) -> Value:
    """Reverses the spatial axes of a kernel."""
    xp = np if isinstance(kernel, np.ndarray) else jnp
    return xp.flip(kernel, tuple(range(2, kernel.ndim)))


def _pooling_window(node: Node, x: Value) -> tuple[_Window, tuple[tuple[int, int], ...]]:
    """The window of a pooling and its pads, including those that `ceil_mode` adds at the end."""
    size = node.integers("kernel_shape")
    if not size:
        raise node.error("expected an attribute kernel_shape, got none")
    window = _Window(node, x, size)
    up = node.flag("ceil_mode", False)
    pads = []
    for k, (low, high) in enumerate(window.pads):
        length, extent, stride = x.shape[2 + k], window.extents[k], window.strides[k]
        if max(low, high) >= extent or length + low + high < extent:
            raise node.error(
                f"expected pads shorter than the window and a window inside the padded image, "
                f"got window {extent}, pads {(low, high)}, length {length}"
            )
        steps = length + low + high - extent
        outputs = (-(-steps // stride) if up else steps // stride) + 1
        # Drop a last window that would start beyond the image.
        if up and (outputs - 1) * stride >= length + low:
            outputs -= 1
        pads.append((low, max(high, (outputs - 1) * stride + extent - length - low)))
    return window, tuple(pads)


def _pooling(sign: int, window: _Window, pads: Sequence[tuple[int, int]]) -> Pooling:
    return Pooling(
        sign,
        window_dimensions=(1, 1, *window.size),
        window_strides=(1, 1, *window.strides),
        padding=((0, 0), (0, 0), *pads),
        base_dilation=(1,) * (2 + len(window.size)),
        window_dilation=(1, 1, *window.dilations),
    )


def max_pool(node: Node, x: Value) -> Value:
    """MaxPool, without its second output, the indices."""
    window, pads = _pooling_window(node, x)
    node.read.add("storage_order")  # affects only the indices
    pooling = _pooling(1, window, pads)
    if pooling.dilated:  # JAX cannot differentiate reduce_window then
        return pooled(x, pooling)
    return lax.reduce_window(x, np.float32(-np.inf), lax.max, *pooling[1:])


def average_pool(node: Node, x: Value) -> Value:
    """AveragePool: the mean over pixels of the image, or also over the declared pads."""
    window, pads = _pooling_window(node, x)
    count_pads = node.flag("count_include_pad", False)
    counts = np.ones((1, 1), np.float32)
    for k, (low, high) in enumerate(pads):
        length = x.shape[2 + k]
        first, last = (-low, length + window.pads[k][1]) if count_pads else (0, length)
        stride, extent = window.strides[k], window.extents[k]
        outputs = (length + low + high - extent) // stride + 1
        node.check_size((*counts.shape, outputs, window.size[k]))
        taps = (np.arange(outputs) * stride - low)[:, None] + (
            np.arange(window.size[k]) * window.dilations[k]
        )
        inside = ((taps >= first) & (taps < last)).sum(axis=1)
        counts = counts[..., None] * inside.astype(np.float32)
    total = lax.reduce_window(x, np.float32(0), lax.add, *_pooling(1, window, pads)[1:])
    if (counts == math.prod(window.size)).all():
        return total / np.float32(math.prod(window.size))
    return total / counts


def global_average_pool(node: Node, x: Value) -> Value:
    """GlobalAveragePool: the mean of every channel."""
    return jnp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True)


def global_max_pool(node: Node, x: Value) -> Value:
    """GlobalMaxPool: the maximum of every channel."""
    return jnp.max(x, axis=tuple(range(2, x.ndim)), keepdims=True)


def softmax(function: Callable[..., Value]) -> Callable[[Node, Value], Value]:
    """Softmax or LogSoftmax over one axis; before opset 13, over all axes from `axis` on."""

    def apply(node: Node, x: Value) -> Value:
        if node.opset >= 13:
            return function(x, axis=node.axis(node.integer("axis", -1), x.ndim))
        axis = node.axis(node.integer("axis", 1), x.ndim)
        if axis == x.ndim - 1:
            return function(x, axis=axis)
        rows = jnp.reshape(x, (*x.shape[:axis], math.prod(x.shape[axis:])))
        return jnp.reshape(function(rows, axis=axis), x.shape)

    return apply

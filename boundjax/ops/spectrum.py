"""Provable upper bounds on the largest singular value of dense layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Inexact

from boundjax.ir.node import Node

# After k squarings the bound is at most rank ** (1 / 2 ** (k + 1)) times the norm. That is 0.3 %
# above the norm for rank 512.
_SQUARINGS = 10
# Roundings of the iteration, which weigh less with every squaring.
_SLACK = 64
# The most elements of the frequencies' matrices that are held at once.
_AT_ONCE = 2**22


def largest_singular_value(matrices: Inexact[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """Upper bounds on the spectral norms of real or complex matrices.

    Gram iteration (Delattre et al. 2023): `||W||_2^2 = ||G||_2` for the Gram matrix `G`,
    `||G||_2^2 = ||G^2||_2`, and a Frobenius norm is never below a spectral norm. Every power is
    scaled to Frobenius norm 1. The number of squarings is fixed and the bound is valid after each,
    so the iteration cannot fail to converge; `_SQUARINGS` states how loose the bound may be.
    """
    # Without the barrier XLA would fold all of this while compiling, if the weights are constants.
    matrices = lax.optimization_barrier(matrices)
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True, initial=0.0)
    matrices, size = _scaled(matrices, largest)
    matrices, frobenius = _scaled(matrices, _frobenius(matrices))
    bound = size * frobenius
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.swapaxes(-2, -1)
    gram = _product(matrices.conj().swapaxes(-2, -1), matrices)
    for k in range(_SQUARINGS + 1):
        gram, frobenius = _scaled(gram, _frobenius(gram))
        bound = bound * frobenius ** (0.5 ** (k + 1))
        if k < _SQUARINGS:
            gram = _product(gram, gram)
    slack = 1.0 + _SLACK * float(jnp.finfo(bound.dtype).eps)
    # `> 0` would treat NaN as a zero matrix.
    return jnp.where(largest == 0, 0.0, slack * bound)[..., 0, 0]


def _scaled(matrices: Array, size: Array) -> tuple[Array, Array]:
    safe = jnp.where(size == 0, 1.0, size)
    return matrices / safe.astype(matrices.dtype), safe


def _frobenius(matrices: Array) -> Array:
    squares = jnp.square(matrices.real) + jnp.square(matrices.imag)
    total = jnp.sum(squares, axis=(-2, -1), keepdims=True)
    zero = total == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, total)))


def _product(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second, precision=lax.Precision.HIGHEST)


def of_product(node: Node) -> Array:
    """Bounds for a `dot_general` with one constant factor, one per batch position of the factor."""
    contract, batch = node.params["dimension_numbers"]
    side = 1 if node.perturbed[0] else 0
    (weights,) = node.constants
    axes = batch[side], contract[side]
    free = [k for k in range(weights.ndim) if k not in (*axes[0], *axes[1])]
    moved = jnp.transpose(weights, (*axes[0], *axes[1], *free))
    sizes = [math.prod(weights.shape[k] for k in group) for group in (*axes, free)]
    return largest_singular_value(moved.reshape(sizes).astype(node.dtype))


def of_convolution(node: Node) -> Array | None:
    """Bounds for a convolution, one per frequency and group; None if it has batch groups.

    A convolution of a zero-padded image is a part of the same convolution on a torus that holds the
    padding. The torus's singular values are those of one matrix per frequency (Sedghi et al. 2019).
    With a stride, the positions modulo the stride become channels.
    """
    params = node.params
    if params["batch_group_count"] != 1:
        return None
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    (kernel,) = node.constants
    kernel = jnp.transpose(kernel, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])).astype(node.dtype)
    groups, rank = params["feature_group_count"], kernel.ndim - 2
    kernel = kernel.reshape(*kernel.shape[:-1], groups, -1)  # [*k, I / g, g, O / g]
    # With stride 1, a convolution of a dilated input is the transpose of a strided convolution.
    transposed = all(s == 1 for s in params["window_strides"])
    transposed = transposed and any(d != 1 for d in params["lhs_dilation"])
    if transposed:
        kernel = jnp.swapaxes(kernel, rank, rank + 2)
    tables = []
    for a in range(rank):
        taps = range(kernel.shape[a])
        dilation, (low, _) = params["rhs_dilation"][a], params["padding"][a]
        length = node.input_shapes[0].shape[lhs_spec[2 + a]]
        result = node.shape[out_spec[2 + a]]
        if transposed:
            offsets = [low - dilation * k for k in taps]
            tables.append(_frequencies(offsets, params["lhs_dilation"][a], result, length))
        else:
            offsets = [dilation * k - low for k in taps]
            length = params["lhs_dilation"][a] * (length - 1) + 1
            tables.append(_frequencies(offsets, params["window_strides"][a], length, result))
    if not tables:
        return largest_singular_value(jnp.moveaxis(kernel, 1, 0))
    return _over_frequencies(kernel, tables)


def _frequencies(offsets: Sequence[int], stride: int, fine: int, coarse: int) -> np.ndarray:
    """Factors `[frequencies, taps, stride]` of the taps along one axis.

    Position `i` of the coarse side meets `stride * i + offset` of the fine one, zero outside.
    """
    steps, phases = np.divmod(np.asarray(offsets), stride)
    length = math.ceil(fine / stride)
    before = max(0, -int(steps.min()))
    after = max(0, coarse - 1 + int(steps.max()) - (length - 1))
    # The torus is long enough that no padding wraps around onto the image.
    count = max(1, length + max(before, after))
    angles = 2.0 * np.pi * np.outer(np.arange(count), steps) / count
    return np.exp(1j * angles)[:, :, None] * (phases[:, None] == np.arange(stride))


def _over_frequencies(kernel: Array, tables: list[np.ndarray]) -> Array:
    """Bounds for all frequencies of a kernel `[*k, fine, g, coarse]`."""
    rank = len(tables)
    dtype = jnp.complex128 if kernel.dtype == jnp.float64 else jnp.complex64
    # The kernel is real, so frequencies come in pairs of complex conjugates.
    first = tables[0][: len(tables[0]) // 2 + 1]
    rest = [jnp.asarray(table, dtype) for table in tables[1:]]

    def bounds(row: Array) -> Array:
        """Bounds at one frequency of the first axis, `row [taps, stride]`, and all of the rest."""
        matrices = jnp.tensordot(kernel.astype(dtype), row, axes=([0], [0]))
        for table in rest:
            matrices = jnp.tensordot(matrices, table, axes=([0], [1]))
        # [fine, g, coarse, s_1, F_2, s_2, ...] -> [F_2, ..., g, fine * s_1 * ..., coarse]
        frequencies = range(4, 3 + 2 * (rank - 1), 2)
        strides = range(3, 4 + 2 * (rank - 1), 2)
        matrices = jnp.transpose(matrices, (*frequencies, 1, 0, *strides, 2))
        shape = (*matrices.shape[:rank], -1, matrices.shape[-1])
        return largest_singular_value(matrices.reshape(shape))

    size = kernel.size * math.prod(t.shape[0] * t.shape[2] for t in tables[1:])
    size = size * tables[0].shape[2] // math.prod(kernel.shape[:rank])
    at_once = max(1, min(len(first), _AT_ONCE // max(1, size)))
    return lax.map(bounds, jnp.asarray(first, dtype), batch_size=at_once)

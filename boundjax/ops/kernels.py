"""Convolutions with a perturbed kernel: matrix products of patches with the kernel.

The patches of an image are slices of it, padded and strided, so that a product with a constant
image is a linear layer of the kernel, and one with a perturbed image a matrix product of two
perturbed values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from boundjax import precision
from boundjax.ir.families import Expansion
from boundjax.ir.node import Node
from boundjax.ir.table import register


def _perturbed_kernel(node: Node) -> bool:
    return node.perturbed[1] and jnp.issubdtype(node.dtype, jnp.floating)


def _patches(node: Node, image: Array, window: tuple[int, ...]) -> Array:
    """`[N, *spatial, C] -> [N, *out, K, C]`, the taps of the kernel in the order of its axes."""
    p, rank = node.params, len(window)
    out = [node.shape[axis] for axis in p["dimension_numbers"].out_spec[2:]]
    config = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(p["padding"], p["lhs_dilation"], strict=True)
    ]
    # Strides may leave the last elements out; a slice must not reach beyond the end.
    padded = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    taps = []
    for tap in itertools.product(*map(range, window)):
        start = [k * d for k, d in zip(tap, p["rhs_dilation"], strict=True)]
        limit = [
            s + (n - 1) * step + 1
            for s, n, step in zip(start, out, p["window_strides"], strict=True)
        ]
        taps.append(
            lax.slice(
                padded,
                (0, *start, 0),
                (padded.shape[0], *limit, padded.shape[-1]),
                (1, *p["window_strides"], 1),
            )
        )
    return jnp.stack(taps, axis=1 + rank)


def _product(node: Node, image: Array, kernel: Array, groups: int) -> Array:
    """`[N, *spatial, C]`, `[*window, C / g, O] -> [N, *out, O]`."""
    rank = kernel.ndim - 2
    window = kernel.shape[:rank]
    patches = _patches(node, image, window)  # [N, *out, K, C]
    lead, channels = patches.shape[: 1 + rank], kernel.shape[rank]
    patches = patches.reshape(*lead, patches.shape[1 + rank], groups, channels)
    flat = kernel.reshape(patches.shape[1 + rank], channels, groups, kernel.shape[-1] // groups)
    parts = []
    for g in range(groups):
        numbers = (((1 + rank, 2 + rank), (0, 1)), ((), ()))
        part, weights = patches[..., g, :], flat[:, :, g]
        parts.append(lax.dot_general(part, weights, numbers, precision=precision.of_products()))
    return jnp.concatenate(parts, axis=-1)


def _convolution(node: Node) -> Callable[[Array, Array], Array]:
    p = node.params
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]

    def function(image: Array, kernel: Array) -> Array:
        image = jnp.transpose(image, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
        kernel = jnp.transpose(kernel, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
        batches = p["batch_group_count"]
        images = jnp.split(image, batches, axis=0)
        kernels = jnp.split(kernel, batches, axis=-1)
        parts = [
            _product(node, i, k, p["feature_group_count"])
            for i, k in zip(images, kernels, strict=True)
        ]
        result = jnp.concatenate(parts, axis=-1)
        order = [0] * result.ndim
        for source, target in enumerate((out_spec[0], *out_spec[2:], out_spec[1])):
            order[target] = source
        return jnp.transpose(result, order)

    return function


register(
    Expansion(
        name="conv_general_dilated",
        note="perturbed kernel, image constant or perturbed",
        accepts=_perturbed_kernel,
        expand=_convolution,
    )
)

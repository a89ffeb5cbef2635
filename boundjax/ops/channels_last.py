"""Stride-1 channels-last convolutions as one primitive whose transposes have the same form.

XLA's CPU backend has one fast convolution: channels last, with the kernel's axes in the order
`[*k, I, O]`. It brings others into that form, but not inside loops and branches, where they run
three times slower. Blocks of rows and optimizer steps are loops, and the gradient that JAX derives
with respect to the rows exchanges the kernel's channels. This primitive transposes the kernel
itself. As in `matmul.rows_matmul`, `vmap` folds a batch into the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from boundjax import precision

_primitive = Primitive("boundjax_convolution")


def convolution(
    rows: Float[Array, "N *in C"],
    kernel: Float[Array, "*k C_per_group O"],
    *,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
) -> Float[Array, "N *out O"]:
    """Convolves `[N, *in, C]` with `[*k, C / groups, O]` to `[N, *out, O]`.

    The result is linear in each operand.

    Args:
      rows: the images.
      kernel: its taps are `dilation` apart.
      padding: not negative (see `convolution._native`).
      dilation: of the kernel, per axis.
      groups: of channels.
    """
    return _primitive.bind(
        rows,
        kernel,
        padding=tuple((int(low), int(high)) for low, high in padding),
        dilation=tuple(int(d) for d in dilation),
        groups=int(groups),
        precision=precision.of_products(),
    )


def exchanged(kernel: Array, groups: int) -> Array:
    """Exchanges input and output channels: `[*k, I / groups, O]` -> `[*k, O / groups, I]`."""
    split = kernel.reshape(*kernel.shape[:-1], groups, -1)
    split = jnp.swapaxes(split, -1, -3)
    return split.reshape(*split.shape[:-2], -1)


def _plain(
    rows: Array, kernel: Array, *, padding: Any, dilation: Any, groups: int, precision: Any
) -> Array:
    spatial = "XYZUVW"[: rows.ndim - 2]
    return lax.conv_general_dilated(
        rows,
        kernel,
        window_strides=(1,) * len(spatial),
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


def _batched(operands: tuple[Array, Array], axes: tuple[int | None, int | None], **how: Any) -> Any:
    rows, kernel = operands
    if axes[1] is not None:
        return jax.vmap(lambda r, k: _plain(r, k, **how), in_axes=axes)(rows, kernel), 0
    assert axes[0] is not None  # `vmap` maps at least one operand
    rows = jnp.moveaxis(rows, axes[0], 0)
    result = _primitive.bind(rows.reshape(-1, *rows.shape[2:]), kernel, **how)
    return result.reshape(*rows.shape[:2], *result.shape[1:]), 0


def _transpose_rows(
    cotangent: Array, rows: Any, kernel: Array, *, padding: Any, dilation: Any, groups: int, **how
) -> Array:
    del rows
    rank = kernel.ndim - 2
    reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape[:rank], strict=True)]
    around = [(r - low, r - high) for r, (low, high) in zip(reach, padding, strict=True)]
    # Padding beyond the kernel's reach gets nothing from the rows, so its cotangent is cropped.
    crops = [(0, 0, 0), *((min(low, 0), min(high, 0), 0) for low, high in around), (0, 0, 0)]
    return _primitive.bind(
        lax.pad(cotangent, jnp.zeros((), cotangent.dtype), crops),
        jnp.flip(exchanged(kernel, groups), range(rank)),
        padding=tuple((max(low, 0), max(high, 0)) for low, high in around),
        dilation=dilation,
        groups=groups,
        **how,
    )


def _transpose_kernel(cotangent: Array, rows: Array, kernel: Any, **how: Any) -> Array:
    shape = jax.ShapeDtypeStruct(kernel.aval.shape, kernel.aval.dtype)
    (kernel_cotangent,) = jax.linear_transpose(lambda k: _plain(rows, k, **how), shape)(cotangent)
    return kernel_cotangent


def _abstract_value(rows: Any, kernel: Any, **how: Any) -> ShapedArray:
    result = jax.eval_shape(lambda r, k: _plain(r, k, **how), rows, kernel)
    return ShapedArray(result.shape, result.dtype)


_primitive.def_impl(jax.jit(_plain, static_argnames=("padding", "dilation", "groups", "precision")))
_primitive.def_abstract_eval(_abstract_value)
mlir.register_lowering(_primitive, mlir.lower_fun(_plain, multiple_results=False))
batching.primitive_batchers[_primitive] = _batched
ad.defbilinear(_primitive, _transpose_rows, _transpose_kernel)

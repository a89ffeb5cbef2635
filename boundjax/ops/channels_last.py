"""Stride-1 convolutions of channels-last rows as one primitive, all of whose transposes are again.

XLA's CPU backend has one fast convolution: channels last, the kernel's axes in the order ``[*k, I,
O]``. It brings others into that form, but not inside of loops and branches, where all others run
three times slower. Blocks of rows and steps of an optimizer are loops; and what JAX derives from a
convolution (its gradient with respect to the rows) has the kernel's channels exchanged. Here the
kernel itself is transposed. Like ``matmul.rows_matmul``, ``vmap`` folds a batch into the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from boundjax import precision

_primitive = Primitive("boundjax_convolution")


def convolution(
    rows: Array,
    kernel: Array,
    *,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
) -> Array:
    """``[N, *in, C]`` with ``[*k, C / groups, O]`` -> ``[N, *out, O]``.

    Linear in each operand. The padding is not negative (see ``convolution._native``); the kernel's
    taps are ``dilation`` apart.
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
    """``[*k, I / groups, O]`` -> ``[*k, O / groups, I]``: the roles of the channels exchanged."""
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
    rows = jnp.moveaxis(rows, axes[0], 0)
    found = _primitive.bind(rows.reshape(-1, *rows.shape[2:]), kernel, **how)
    return found.reshape(*rows.shape[:2], *found.shape[1:]), 0


def _transpose_rows(
    cotangent: Array, rows: Any, kernel: Array, *, padding: Any, dilation: Any, groups: int, **how
) -> Array:
    del rows
    rank = kernel.ndim - 2
    reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape[:rank], strict=True)]
    around = [(r - low, r - high) for r, (low, high) in zip(reach, padding, strict=True)]
    # More padding than the kernel reaches over: nothing of it comes from the rows.
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
    (found,) = jax.linear_transpose(lambda k: _plain(rows, k, **how), shape)(cotangent)
    return found


def _shape(rows: Any, kernel: Any, **how: Any) -> jax.core.ShapedArray:
    found = jax.eval_shape(lambda r, k: _plain(r, k, **how), rows, kernel)
    return jax.core.ShapedArray(found.shape, found.dtype)


_primitive.def_impl(jax.jit(_plain, static_argnames=("padding", "dilation", "groups", "precision")))
_primitive.def_abstract_eval(_shape)
mlir.register_lowering(_primitive, mlir.lower_fun(_plain, multiple_results=False))
batching.primitive_batchers[_primitive] = _batched
ad.defbilinear(_primitive, _transpose_rows, _transpose_kernel)

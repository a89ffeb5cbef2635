"""The pull-back of coefficients through a convolution, in the form that is fast on the platform.

The pull-back is the transposed convolution. With a stride, XLA's CPU backend computes it slowly,
and its gradient with respect to the kernel very slowly (18 times the forward convolution). The
*sub-pixel* form avoids both: the output positions of one phase (their index modulo the stride)
depend on the rows through an ordinary stride-1 convolution with every stride-th tap of the kernel,
and the phases are interleaved. Its derivatives are ordinary convolutions too. For an image with few
channels, where those convolutions would be narrow, one matrix product computes all taps instead.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from boundjax import precision
from boundjax.ir.families import Local
from boundjax.ir.node import Node
from boundjax.ops import channels_last, matmul
from boundjax.ops.local import window_before
from boundjax.windows import Frame, Windowed, whole

_LOWERING: contextvars.ContextVar[str] = contextvars.ContextVar("lowering", default="auto")

# With at most this many input channels (images) one matrix product computes all taps.
_FEW_CHANNELS = 4


@contextlib.contextmanager
def transposed_convolution(lowering: Literal["auto", "native", "subpixel"]) -> Iterator[None]:
    """Selects how everything traced in this context pulls back through strided convolutions.

    Args:
      lowering: `"native"` is XLA's transposed convolution, `"subpixel"` interleaves phases,
        `"auto"` (default) is sub-pixel on CPU and native elsewhere. Without a stride there is one
        phase, the only form that is fast inside loops on CPU.

    Raises:
      ValueError: if `lowering` is another name.
    """
    if lowering not in ("auto", "native", "subpixel"):
        raise ValueError(f"lowering must be 'auto', 'native' or 'subpixel', got {lowering!r}")
    token = _LOWERING.set(lowering)
    try:
        yield
    finally:
        _LOWERING.reset(token)


def terms(node: Node) -> int:
    """The number of products that an element of a convolution sums, away from the border."""
    outputs = node.constants[0].shape[node.params["dimension_numbers"].rhs_spec[0]]
    return node.constants[0].size // max(1, outputs)


def reach(node: Node) -> int:
    """The largest number of products in which an element of the operand may occur."""
    inputs = node.constants[0].shape[node.params["dimension_numbers"].rhs_spec[1]]
    return node.constants[0].size // max(1, inputs)


def pull_back(node: Node, rows: Array) -> tuple[Array, ...]:
    """Pulls coefficients `[m, *node.shape]` back through a convolution, to `[m, *input.shape]`.

    The rows (and, under `vmap`, the examples) share the batch dimension of one convolution.
    """
    params = node.params
    (example,) = node.input_shapes
    (kernel,) = node.constants
    if params["batch_group_count"] != 1:
        # Batch groups give the batch dimension a meaning, so rows cannot share it.
        return tuple(jax.vmap(jax.linear_transpose(node.apply, example))(rows))
    return (_transposed(params, example.shape, rows, kernel),)


def _transposed(
    params: Mapping[str, Any], input_shape: Sequence[int], rows: Array, kernel: Array
) -> Array:
    lhs_spec, _, out_spec = params["dimension_numbers"]
    count, axis = rows.shape[0], lhs_spec[0]
    shape = list(input_shape)
    shape[axis] *= count
    merged = _merge_rows(rows, out_spec[0])
    transposed = _subpixel if _use_subpixel(params) else _native
    result = transposed(params, tuple(shape), merged, kernel)
    split = result.reshape(*shape[:axis], count, input_shape[axis], *shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)


def _whole(node: Node) -> tuple[int, ...]:
    return node.params["dimension_numbers"].out_spec[:2]


def _operand_frames(node: Node, frame: Frame) -> tuple[Frame, ...] | None:
    params = node.params
    if params["batch_group_count"] != 1 or any(d != 1 for d in params["lhs_dilation"]):
        return None
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    (example,) = node.input_shapes
    (kernel,) = node.constants
    axes = list(whole(example.shape))
    for k, (source, target) in enumerate(zip(lhs_spec[2:], out_spec[2:], strict=True)):
        axes[source] = window_before(
            frame[target],
            example.shape[source],
            params["window_strides"][k],
            params["rhs_dilation"][k],
            params["padding"][k][0],
            kernel.shape[rhs_spec[2 + k]],
        )
    return (tuple(axes),)


def _pull_back_windows(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    """Treats each window as an unpadded input; all rows share the batch dimension."""
    (frame,) = frames
    (kernel,) = node.constants
    padding = ((0, 0),) * (len(frame) - 2)
    shape = [axis.size for axis in frame]
    return (_transposed({**node.params, "padding": padding}, shape, rows.values, kernel),)


LOCAL = Local(frames=_operand_frames, transpose=_pull_back_windows, whole=_whole)


def _merge_rows(rows: Array, axis: int) -> Array:
    """`[m, ..., N, ...]` (N at `axis` of an example) -> `[..., m * N, ...]`."""
    moved = jnp.moveaxis(rows, 0, axis)
    shape = moved.shape
    return moved.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _use_subpixel(params: Mapping[str, Any]) -> bool:
    lowering = _LOWERING.get()
    # A dilated input (the model's own transposed convolution) keeps the native form.
    if any(d != 1 for d in params["lhs_dilation"]) or lowering == "native":
        return False
    if lowering == "subpixel":
        return True
    return jax.default_backend() == "cpu"


def _native(params: Mapping[str, Any], shape: tuple[int, ...], rows: Array, kernel: Array) -> Array:
    """Applies JAX's transpose of the convolution, for an input of this shape."""
    lhs_spec, rhs_spec, _ = params["dimension_numbers"]
    # Padding beyond the kernel's reach becomes negative padding in the transpose, for which XLA's
    # CPU convolution (jaxlib 0.10) reads out of bounds. A separate pad avoids that.
    pad_separately = any(
        low > dilation * (kernel.shape[axis] - 1)
        for (low, _), dilation, axis in zip(
            params["padding"], params["rhs_dilation"], rhs_spec[2:], strict=True
        )
    )

    def forward(x: Array) -> Array:
        padding, input_dilation = params["padding"], params["lhs_dilation"]
        if pad_separately:
            config = [(0, 0, 0)] * x.ndim
            for i, axis in enumerate(lhs_spec[2:]):
                config[axis] = (*padding[i], input_dilation[i] - 1)
            x = lax.pad(x, jnp.zeros((), x.dtype), config)
            padding, input_dilation = [(0, 0)] * len(padding), [1] * len(padding)
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=params["window_strides"],
            padding=padding,
            lhs_dilation=input_dilation,
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=params["dimension_numbers"],
            feature_group_count=params["feature_group_count"],
            precision=precision.of_products(),
            preferred_element_type=params["preferred_element_type"],
        )

    (result,) = jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, rows.dtype))(rows)
    return result


def _subpixel(
    params: Mapping[str, Any], shape: tuple[int, ...], rows: Array, kernel: Array
) -> Array:
    """Computes `x_bar[s i + d k - pad] = sum_k rows[i] kernel[k]^T` by phases `y mod s`."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    groups = params["feature_group_count"]
    rank = len(lhs_spec) - 2
    rows = jnp.transpose(rows, (out_spec[0], *out_spec[2:], out_spec[1]))  # [N, *out, O]
    kernel = jnp.transpose(kernel, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))  # [*k, I / g, O]
    window = kernel.shape[:rank]
    kernel = channels_last.exchanged(kernel, groups)  # [*k, O / g, I]
    sizes = [shape[axis] for axis in lhs_spec[2:]]

    few = groups == 1 and kernel.shape[-1] <= _FEW_CHANNELS
    if few:
        flat = jnp.moveaxis(kernel, rank, 0).reshape(kernel.shape[rank], -1)  # [O, k * I]
        products = matmul.rows_matmul(rows.reshape(-1, rows.shape[-1]), flat)
        products = products.reshape(*rows.shape[:-1], *window, kernel.shape[-1])

    def shifted(taps: list[_Taps]) -> Array:
        """Computes one phase as a sum of shifted products."""
        total = jnp.zeros((rows.shape[0], *(t.size for t in taps), kernel.shape[-1]), rows.dtype)
        for places in itertools.product(*(zip(t.positions, t.shifts, strict=True) for t in taps)):
            index = (..., *(position for position, _ in places), slice(None))
            config = [(0, 0, 0)]
            for axis, ((_, shift), tap) in enumerate(zip(places, taps, strict=True)):
                config.append((-shift, tap.size - rows.shape[1 + axis] + shift, 0))
            part = products[index]
            total = total + lax.pad(part, jnp.zeros((), part.dtype), [*config, (0, 0, 0)])
        return total

    def convolved(taps: list[_Taps]) -> Array:
        """Computes one phase as an ordinary convolution."""
        part = kernel
        for axis, tap in enumerate(taps):
            part = jnp.take(part, jnp.asarray(tap.positions, jnp.int32), axis=axis)
        # Crop before the convolution: see `_native` on negative padding.
        paddings = [tap.padding(rows.shape[1 + axis]) for axis, tap in enumerate(taps)]
        crops = [(min(low, 0), min(high, 0), 0) for low, high in paddings]
        return channels_last.convolution(
            lax.pad(rows, jnp.zeros((), rows.dtype), [(0, 0, 0), *crops, (0, 0, 0)]),
            part,
            padding=[(max(low, 0), max(high, 0)) for low, high in paddings],
            dilation=[tap.dilation for tap in taps],
            groups=groups,
        )

    def interleave(axis: int, taps: list[_Taps]) -> Array:
        if axis == rank:
            if all(tap.positions for tap in taps):
                return shifted(taps) if few else convolved(taps)
            return jnp.zeros((rows.shape[0], *(t.size for t in taps), kernel.shape[-1]), rows.dtype)
        stride, size = params["window_strides"][axis], sizes[axis]
        longest = math.ceil(size / stride)
        parts = []
        for p in range(stride):
            tap = _Taps.of_phase(
                p,
                stride,
                params["rhs_dilation"][axis],
                params["padding"][axis][0],
                window[axis],
                size,
            )
            part = interleave(axis + 1, [*taps, tap])
            fill = [(0, 0)] * part.ndim
            fill[1 + axis] = (0, longest - tap.size)
            parts.append(jnp.pad(part, fill))
        joined = jnp.stack(parts, axis=2 + axis)
        before, after = joined.shape[: 1 + axis], joined.shape[3 + axis :]
        joined = joined.reshape(*before, longest * stride, *after)
        return lax.slice_in_dim(joined, 0, size, axis=1 + axis)

    result = interleave(0, [])  # [N, *in, I]
    inverse = [0] * (rank + 2)
    for source, target in enumerate((lhs_spec[0], *lhs_spec[2:], lhs_spec[1])):
        inverse[target] = source
    return jnp.transpose(result, inverse)


class _Taps(NamedTuple):
    """The kernel positions that reach the outputs `y = s q + p` of one phase, along one axis.

    `y = s i + d k - pad` with `i = q + shift_k`. Taps are sorted by shift, so that the phase is an
    ordinary convolution of the rows with dilation `shift_(k+1) - shift_k`.
    """

    positions: tuple[int, ...]
    shifts: tuple[int, ...]
    size: int

    @classmethod
    def of_phase(
        cls, p: int, stride: int, dilation: int, pad: int, window: int, size: int
    ) -> _Taps:
        count = max(0, math.ceil((size - p) / stride))
        by_shift = sorted(
            ((p + pad - dilation * k) // stride, k)
            for k in range(window if count else 0)
            if (p + pad - dilation * k) % stride == 0
        )
        return cls(tuple(k for _, k in by_shift), tuple(shift for shift, _ in by_shift), count)

    @property
    def dilation(self) -> int:
        return self.shifts[1] - self.shifts[0] if len(self.shifts) > 1 else 1

    def padding(self, rows: int) -> tuple[int, int]:
        """Padding (crops, if negative) with which q, reading rows[q + shift], spans the phase."""
        return -self.shifts[0], self.size - rows + self.shifts[-1]

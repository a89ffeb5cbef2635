"""Linear ops on windowed rows: the windows of their operands and the coefficients in them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax import windows
from boundjax.ir.families import Local, Structural, linear_op
from boundjax.ir.node import Node
from boundjax.windows import Axis, Frame, Windowed


def window_size(node: Node) -> int:
    """The number of elements of a pooling window."""
    return math.prod(node.params["window_dimensions"])


def window_before(axis: Axis, full: int, stride: int, dilation: int, pad: int, taps: int) -> Axis:
    """The window on the operand of a convolution or pooling, from the one on its result."""
    return axis._replace(
        full=full,
        size=stride * (axis.size - 1) + dilation * (taps - 1) + 1,
        stride=stride * axis.stride,
        offset=int(stride * axis.offset - pad),
    )


def pull_back(node: Node, rows: Windowed) -> tuple[Windowed | Array, ...] | None:
    """Pulls windowed rows back through a linear op; None if the op needs complete rows.

    Operands whose windows would be no smaller than their value get complete rows.
    """
    rule = linear_op(node).local
    frames = operand_frames(node, rows.frame)
    if rule is None or frames is None:
        return None
    rows = rows.expand(rule.whole(node))
    values = rule.transpose(node, rows, frames)
    operands = [
        dataclasses.replace(rows, values=value, frame=frame).masked()
        for value, frame in zip(values, frames, strict=True)
    ]
    return tuple(
        operand if windows.smaller(operand.frame) else operand.dense() for operand in operands
    )


def operand_frames(node: Node, frame: Frame) -> tuple[Frame, ...] | None:
    """The frames of a linear op's perturbed operands; None if the op needs complete rows."""
    rule = linear_op(node).local
    return rule and rule.frames(node, windows.expanded(frame, rule.whole(node)))


def _same_shape(node: Node, frame: Frame) -> tuple[Frame, ...] | None:
    same = all(shape.shape == node.shape for shape in node.input_shapes)
    return (frame,) * len(node.inputs) if same else None


def _signed(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    assert isinstance(node.op, Structural)
    return tuple(rows.values if sign > 0 else -rows.values for sign in node.op.sign(node))


def _scaled(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    factor = node.apply(jnp.ones(node.shape, rows.dtype))
    return (rows.values * rows.crop(factor),)


def _unit_axes(node: Node, frame: Frame) -> tuple[Frame, ...] | None:
    """The operand's frame, if a reshape only adds and removes axes of length 1."""
    (source,) = node.input_shapes
    if [n for n in source.shape if n > 1] != [n for n in node.shape if n > 1]:
        return None
    if any(a.full == 1 and not a.whole for a in frame):
        return None
    axes = iter(a for a in frame if a.full > 1)
    return (tuple(next(axes) if n > 1 else Axis(1, 1) for n in source.shape),)


def _reshaped(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    return (rows.values.reshape(len(rows.values), *(a.size for a in frames[0])),)


def _permuted(node: Node, frame: Frame) -> tuple[Frame, ...]:
    axes = [frame[0]] * len(frame)
    for target, source in enumerate(node.params["permutation"]):
        axes[source] = frame[target]
    return (tuple(axes),)


def _transposed(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    order = [0] * len(rows.frame)
    for target, source in enumerate(node.params["permutation"]):
        order[source] = target
    return (jnp.transpose(rows.values, (0, *(1 + k for k in order))),)


def _unpadded(node: Node, frame: Frame) -> tuple[Frame, ...] | None:
    config = node.params["padding_config"]
    if node.perturbed != (True, False) or any(interior for _, _, interior in config):
        return None
    (source,) = node.input_shapes
    return (
        tuple(
            a._replace(full=n, offset=a.offset - int(low))
            for a, n, (low, _, _) in zip(frame, source.shape, config, strict=True)
        ),
    )


def _parts(node: Node, frame: Frame) -> tuple[Frame, ...]:
    axis = node.params["dimension"]
    return tuple(
        tuple(Axis(s.shape[k], s.shape[k]) if k == axis else a for k, a in enumerate(frame))
        for s in node.input_shapes
    )


def _cut(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    axis, start, parts = node.params["dimension"], 0, []
    shapes = iter(node.input_shapes)
    constants = iter(node.constants)
    for perturbed in node.perturbed:
        size = next(shapes).shape[axis] if perturbed else jnp.shape(next(constants))[axis]
        if perturbed:
            parts.append(lax.slice_in_dim(rows.values, start, start + size, axis=1 + axis))
        start += size
    return tuple(parts)


def _pooled(node: Node, frame: Frame) -> tuple[Frame, ...] | None:
    p = node.params
    if any(d != 1 for d in p["base_dilation"]):
        return None
    (source,) = node.input_shapes
    geometry = zip(
        frame,
        source.shape,
        p["window_strides"],
        p["window_dilation"],
        p["padding"],
        p["window_dimensions"],
        strict=True,
    )
    return (
        tuple(
            a
            if (stride, taps, pad) == (1, 1, (0, 0))
            else window_before(a, n, stride, dilation, pad[0], taps)
            for a, n, stride, dilation, pad, taps in geometry
        ),
    )


def _spread_out(node: Node, rows: Windowed, frames: tuple[Frame, ...]) -> tuple[Array, ...]:
    p = node.params

    def window_sums(value: Array) -> Array:
        return lax.reduce_window(
            value,
            np.zeros((), value.dtype),  # NumPy, as JAX transposes only with a concrete number
            lax.add,
            p["window_dimensions"],
            p["window_strides"],
            "VALID",
            window_dilation=p["window_dilation"],
        )

    example = jax.ShapeDtypeStruct([a.size for a in frames[0]], rows.dtype)
    return tuple(jax.vmap(jax.linear_transpose(window_sums, example))(rows.values))


ELEMENTWISE = Local(frames=_same_shape, transpose=_signed)
SCALED = Local(frames=_same_shape, transpose=_scaled)
UNIT_AXES = Local(frames=_unit_axes, transpose=_reshaped)
PERMUTED = Local(frames=_permuted, transpose=_transposed)
PADDED = Local(frames=_unpadded, transpose=_signed)
CONCATENATED = Local(frames=_parts, transpose=_cut, whole=lambda node: (node.params["dimension"],))
POOLED = Local(frames=_pooled, transpose=_spread_out)

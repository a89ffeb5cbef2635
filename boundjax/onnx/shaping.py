"""Operators that move values or compute shapes; they take integers too.

Integers that depend on the network's input are carried as float32, because JAX has no 64-bit
integers by default and only floating-point values have bounds. Where float32 would be wrong (a cast
outside of the type's range, arithmetic beyond 2^24) bounds are NaN, see `boundjax.ops.integers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.onnx import casts, indexing
from boundjax.onnx.node import STORED, Node, Value, kind_of


def constant(node: Node) -> np.ndarray:
    """Constant; one of several attributes holds the value."""
    tensor = node.tensor("value")
    if tensor is not None:
        return tensor
    for name, dtype in (("int", np.int64), ("float", np.float32)):
        for key in (f"value_{name}", f"value_{name}s"):
            value = node.attributes.get(key)
            if isinstance(value, int | float | tuple):
                node.read.add(key)
                return np.asarray(value, dtype)
    raise node.error("expected an attribute value with a dense tensor or numbers, got none")


def constant_of_shape(node: Node, sizes: np.ndarray) -> np.ndarray:
    """ConstantOfShape."""
    value = node.tensor("value")
    shape = node.to_integers(sizes)
    node.check_size(shape)
    return np.full(shape, np.float32(0) if value is None else node.to_number(value))


def arange(node: Node, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> Value:
    """Range; floating-point numbers are traced, because they may be rounded."""
    first, last, step = (node.to_number(v) for v in (start, limit, delta))
    if not len({v.dtype for v in (first, last, step)}) == 1 or step == 0:
        raise node.error("expected start, limit and a step other than 0, all of one type")
    # Python numbers: numpy's would overflow near the ends of int64.
    span, width = last.item() - first.item(), step.item()
    if not all(map(math.isfinite, (span, width))):
        raise node.error(f"expected finite numbers, got {first} to {last} by {step}")
    count = max(0, -((-span) // width) if isinstance(width, int) else math.ceil(span / width))
    node.check_size((count,))
    positions = np.arange(count, dtype=first.dtype)
    if first.dtype.kind == "i":
        return first + positions * step
    return jnp.add(first, jnp.multiply(positions, step))


def shape(node: Node, operand: tuple[int, ...]) -> np.ndarray:
    """Shape of the operand, or since opset 15 a slice of it."""
    start, end = node.integer("start", 0), node.integer("end", len(operand))
    return np.asarray(operand[start:end], np.int64)


def size(node: Node, operand: tuple[int, ...]) -> np.ndarray:
    """Size: the number of elements."""
    return np.asarray(math.prod(operand), np.int64)


def identity(node: Node, x: Value) -> Value:
    """Identity."""
    return x


def dropout(
    node: Node, x: Value, ratio: np.ndarray | None = None, training: np.ndarray | None = None
) -> Value:
    """Dropout at inference, which is the identity."""
    for name in ("ratio", "seed"):
        node.read.add(name)
    if training is not None and training.any():
        raise node.error("expected inference mode, got training; export the network for inference")
    return x


def cast_kind(node: Node) -> str:
    """The kind of the values that Cast computes."""
    to = node.integer("to")
    if to not in STORED:
        raise node.error(f"only casts to numbers and bool are supported, got element type {to}")
    return kind_of(STORED[to])


def cast(node: Node, x: Value) -> Value:
    """Cast; a number that depends on the input stays float32 and is rounded towards 0.

    A number that the integer type cannot hold has NaN bounds, and is an error if it is constant.
    """
    kind = cast_kind(node)
    dtype = STORED[node.integer("to")]
    node.integer("saturate", 1)  # affects only 8-bit floats
    if node.xp is np:
        if kind == "i" and x.dtype.kind == "f":
            casts.require_in_range(node, x, dtype)
        return x.astype(dtype)
    if kind == "b":
        return x if x.dtype == jnp.bool_ else x != 0
    if x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    return x if kind == "f" else casts.truncated(x, dtype)


def concat(node: Node, *values: Value) -> Value:
    """Concat."""
    axis = node.axis(node.integer("axis"), values[0].ndim)
    if len({v.dtype for v in values}) > 1:
        raise node.error(f"expected operands of one type, got {[str(v.dtype) for v in values]}")
    return node.xp.concatenate(values, axis=axis)


def expand(node: Node, x: Value, sizes: np.ndarray) -> Value:
    """Expand, which broadcasts in both directions."""
    target = node.to_integers(sizes)
    node.check_size(target)
    rank = max(x.ndim, len(target))
    x = node.xp.reshape(x, (1,) * (rank - x.ndim) + x.shape)
    return node.xp.broadcast_to(x, np.broadcast_shapes(x.shape, target))


def flatten(node: Node, x: Value) -> Value:
    """Flatten to a matrix, with the axes before `axis` as rows."""
    axis = node.integer("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        raise node.error(f"axis {axis} is out of range for rank {x.ndim}")
    axis = axis + x.ndim if axis < 0 else axis
    return node.xp.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def pad(
    node: Node,
    x: Value,
    pads: np.ndarray | None = None,
    value: Value | None = None,
    axes: np.ndarray | None = None,
) -> Value:
    """Pad with a constant or with the operand's own elements; negative pads crop."""
    mode = node.text("mode", "constant")
    if mode not in ("constant", *_REPEATS):
        raise node.error(
            "attribute mode: only 'constant', 'edge', 'reflect' and 'wrap' are supported, "
            f"got {mode!r}"
        )
    amounts = node.attribute_or_operand("pads", pads)
    if value is None:
        fill = np.float32(node.number("value", 0.0))
    else:
        fill = node.to_number(node.carried(value) if node.computes_integers else value)
    padded = range(x.ndim) if axes is None else node.axes(node.to_integers(axes), x.ndim)
    if amounts is None or len(amounts) != 2 * len(padded):
        raise node.error(f"expected {2 * len(padded)} pads, got {amounts}")
    low, high = [0] * x.ndim, [0] * x.ndim
    for k, axis in enumerate(padded):
        low[axis], high[axis] = amounts[k], amounts[k + len(padded)]
    node.check_size([n + a + b for n, a, b in zip(x.shape, low, high, strict=True)])
    grown = [(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True)]
    node.check_size([n + a + b for n, (a, b) in zip(x.shape, grown, strict=True)])
    if mode != "constant":
        return _repeated(node, x, mode, low, high)
    if any(a or b for a, b in grown):
        x = node.xp.pad(x, grown, constant_values=node.xp.asarray(fill, x.dtype))
    ends = [n + min(b, 0) for n, b in zip(x.shape, high, strict=True)]
    return _cut(node, x, [max(-a, 0) for a in low], ends, [1] * x.ndim)


# Mode of Pad -> the largest pad of an axis of length `n`.
_REPEATS: Mapping[str, Callable[[int], float]] = {
    "edge": lambda n: math.inf if n else 0,
    "reflect": lambda n: max(n - 1, 0),
    "wrap": lambda n: math.inf if n else 0,
}


def _repeated(node: Node, x: Value, mode: str, low: list[int], high: list[int]) -> Value:
    """Crops, then pads with elements of what is left."""
    pad: Any = np.pad  # its stubs know the modes by name only
    for axis, (before, after) in enumerate(zip(low, high, strict=True)):
        length = x.shape[axis]
        left = np.arange(length)[max(-before, 0) : max(length + min(after, 0), 0)]
        if max(before, after) > _REPEATS[mode](len(left)):
            raise node.error(
                f"expected pads that mode {mode!r} finds among {len(left)} elements, "
                f"got {before} and {after}"
            )
        positions = pad(left, (max(before, 0), max(after, 0)), mode) if len(left) else left
        x = indexing.take(node, x, positions, axis)
    return x


def _cut(node: Node, x: Value, starts: list[int], ends: list[int], steps: list[int]) -> Value:
    """Slices `x[start:end:step]` along every axis, for positive steps and ends within `x`."""
    if node.xp is np:
        return x[tuple(map(slice, starts, ends, steps))]
    if (starts, ends, steps) == ([0] * x.ndim, list(x.shape), [1] * x.ndim):
        return x
    return jax.lax.slice(x, starts, ends, steps)


def reshape(node: Node, x: Value, sizes: np.ndarray) -> Value:
    """Reshape; a size of -1 is inferred, and 0 copies the operand's size (unless `allowzero`)."""
    keep = not node.flag("allowzero", False)
    target = list(node.to_integers(sizes))
    for k, count in enumerate(target):
        if count == 0 and keep:
            if k >= x.ndim:
                raise node.error(
                    f"size {k} of {target} copies an axis that {x.shape} does not have"
                )
            target[k] = x.shape[k]
    rest = math.prod(count for count in target if count != -1)
    if target.count(-1) == 1 and rest > 0 and x.size % rest == 0:
        target[target.index(-1)] = x.size // rest
    if min(target, default=0) < 0 or math.prod(target) != x.size:
        raise node.error(f"expected a shape for {x.size} elements of {x.shape}, got {target}")
    return node.xp.reshape(x, tuple(target))


def slice_(
    node: Node,
    x: Value,
    starts: np.ndarray | None = None,
    ends: np.ndarray | None = None,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> Value:
    """Slice; ends are clamped to the axis, and negative steps go backwards."""
    first = node.attribute_or_operand("starts", starts)
    last = node.attribute_or_operand("ends", ends)
    if first is None or last is None:
        raise node.error("expected starts and ends, got none")
    listed = node.attribute_or_operand("axes", axes)
    sliced = node.axes(range(len(first)) if listed is None else listed, x.ndim)
    stride = (1,) * len(first) if steps is None else node.to_integers(steps)
    if not len(first) == len(last) == len(sliced) == len(stride) or 0 in stride:
        raise node.error(
            "expected as many starts as ends, axes and steps, and no step of 0, "
            f"got {first}, {last}, {sliced} and {stride}"
        )
    low, high, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
    backwards = []
    for axis, a, b, s in zip(sliced, first, last, stride, strict=True):
        # Python's slices follow the rules of ONNX but for one: where steps are negative, ONNX moves
        # a start before the first element to it.
        a = max(a, -x.shape[axis]) if s < 0 else a
        indices = range(x.shape[axis])[a:b:s]
        if s < 0:
            indices = indices[::-1]
            backwards.append(axis)
        low[axis], step[axis] = (indices[0] if indices else 0), abs(s)
        high[axis] = indices[-1] + 1 if indices else 0
    x = _cut(node, x, low, high, step)
    if not backwards:
        return x
    return np.flip(x, tuple(backwards)) if node.xp is np else jax.lax.rev(x, backwards)


def split(node: Node, x: Value, sizes: np.ndarray | None = None) -> tuple[Value, ...]:
    """Split into parts of the listed lengths, or into equal parts with a smaller last one."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    lengths = node.attribute_or_operand("split", sizes)
    count = node.integer("num_outputs", len(node.outputs))
    if lengths is None:
        part = -(-x.shape[axis] // max(count, 1))
        lengths = (part,) * (count - 1) + (x.shape[axis] - part * (count - 1),)
    if len(lengths) != len(node.outputs) or min(lengths) < 0 or sum(lengths) != x.shape[axis]:
        raise node.error(
            f"expected {len(node.outputs)} lengths that add up to {x.shape[axis]}, got {lengths}"
        )
    ends = np.cumsum(lengths)
    return tuple(node.xp.split(x, [int(end) for end in ends[:-1]], axis=axis))


def squeeze(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
    """Squeeze the listed axes, or all axes of length 1."""
    listed = node.attribute_or_operand("axes", axes)
    if listed is None:
        listed = [k for k, length in enumerate(x.shape) if length == 1]
    squeezed = node.axes(listed, x.ndim)
    if any(x.shape[axis] != 1 for axis in squeezed):
        raise node.error(f"expected axes of length 1, got {squeezed} of {x.shape}")
    return node.xp.squeeze(x, axis=squeezed)


def unsqueeze(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
    """Unsqueeze: insert axes of length 1 at the listed positions of the result."""
    inserted = node.attribute_or_operand("axes", axes)
    if inserted is None:
        raise node.error("expected axes, got none")
    return node.xp.expand_dims(x, node.axes(inserted, x.ndim + len(inserted)))


def tile(node: Node, x: Value, repeats: np.ndarray) -> Value:
    """Tile."""
    counts = node.to_integers(repeats)
    if len(counts) != x.ndim:
        raise node.error(f"expected {x.ndim} repeats, got {len(counts)}")
    node.check_size([n * count for n, count in zip(x.shape, counts, strict=True)])
    return node.xp.tile(x, counts)


def transpose(node: Node, x: Value) -> Value:
    """Transpose; the axes are reversed if there is no attribute `perm`."""
    order = node.integers("perm")
    if order is None:
        order = tuple(reversed(range(x.ndim)))
    if sorted(order) != list(range(x.ndim)):
        raise node.error(f"expected a permutation of {x.ndim} axes, got {order}")
    return node.xp.transpose(x, order)


def depth_to_space(node: Node, x: Value) -> Value:
    """DepthToSpace: blocks of channels become blocks of pixels."""
    block, mode = _block(node, x), node.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise node.error(f"attribute mode: expected 'DCR' or 'CRD', got {mode!r}")
    batch, channels, height, width = x.shape
    depth = channels // block**2
    if depth * block**2 != channels:
        raise node.error(f"expected channels that {block**2} divides, got {channels}")
    first = (depth, block, block) if mode == "CRD" else (block, block, depth)
    order = (0, 1, 4, 2, 5, 3) if mode == "CRD" else (0, 3, 4, 1, 5, 2)
    blocks = node.xp.reshape(x, (batch, *first, height, width))
    moved = node.xp.transpose(blocks, order)
    return node.xp.reshape(moved, (batch, depth, height * block, width * block))


def space_to_depth(node: Node, x: Value) -> Value:
    """SpaceToDepth: blocks of pixels become blocks of channels."""
    block = _block(node, x)
    batch, channels, height, width = x.shape
    if height % block or width % block:
        raise node.error(f"expected an image of blocks of {block} pixels, got {x.shape}")
    rows, columns = height // block, width // block
    blocks = node.xp.reshape(x, (batch, channels, rows, block, columns, block))
    moved = node.xp.transpose(blocks, (0, 3, 5, 1, 2, 4))
    return node.xp.reshape(moved, (batch, channels * block**2, rows, columns))


def _block(node: Node, x: Value) -> int:
    block = node.integer("blocksize")
    if x.ndim != 4 or block < 1:
        raise node.error(
            "expected an operand [batch, channels, height, width] and a blocksize of at least 1, "
            f"got shape {x.shape} and {block}"
        )
    return block

"""Operators that move values or compute shapes; they take integers too.

Integers that depend on the network's input are carried as float32: JAX has no 64-bit integers by
default, and bounds are of floating-point values. Where that would be wrong (a cast outside of the
type's range, arithmetic beyond 2^24) bounds are NaN, see `boundjax.ops.integers`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.onnx.node import DTYPES, Node
from boundjax.ops import integers

Value = Any  # np.ndarray while constants are folded, else a JAX array


def constant(node: Node) -> np.ndarray:
    """Constant: one of several attributes holds the value."""
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
    shape = node.known_integers(sizes)
    node.check_size(shape)
    return np.full(shape, np.float32(0) if value is None else node.known_number(value))


def arange(node: Node, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Range."""
    first, last, step = (node.known_number(v) for v in (start, limit, delta))
    if not len({v.dtype for v in (first, last, step)}) == 1 or step == 0:
        raise node.error("expected start, limit and a step other than 0, all of one type")
    # In Python's numbers: numpy's would overflow on the ends of the range of int64.
    span, width = last.item() - first.item(), step.item()
    if not all(map(math.isfinite, (span, width))):
        raise node.error("expected finite numbers")
    count = max(0, -((-span) // width) if isinstance(width, int) else math.ceil(span / width))
    node.check_size((count,))
    return (first + np.arange(count, dtype=first.dtype) * step).astype(first.dtype)


def shape(node: Node, operand: tuple[int, ...]) -> np.ndarray:
    """Shape: of the operand, or part of it (opset 15)."""
    start, end = node.integer("start", 0), node.integer("end", len(operand))
    return np.asarray(operand[start:end], np.int64)


def size(node: Node, operand: tuple[int, ...]) -> np.ndarray:
    """Size: number of elements."""
    return np.asarray(math.prod(operand), np.int64)


def identity(node: Node, x: Value) -> Value:
    """Identity."""
    return x


def dropout(
    node: Node, x: Value, ratio: np.ndarray | None = None, training: np.ndarray | None = None
) -> Value:
    """Dropout at inference: the identity."""
    for name in ("ratio", "seed"):
        node.read.add(name)
    if training is not None and training.any():
        raise node.error("is in training mode; export the network for inference")
    return x


def cast_kind(node: Node) -> str:
    """The kind of values that Cast gives."""
    to = node.integer("to")
    if to not in DTYPES:
        raise node.error(
            f"only casts to float32, int32, int64 and bool are supported, got element type {to}"
        )
    return np.dtype(DTYPES[to]).kind


def cast(node: Node, x: Value) -> Value:
    """Cast; a number that depends on the input stays float32, rounded towards 0.

    What the integer type cannot hold has no bounds, and no value where it is known.
    """
    kind = cast_kind(node)
    dtype = np.dtype(DTYPES[node.integer("to")])
    node.integer("saturate", 1)  # of 8-bit floats only
    if node.xp is np:
        if kind == "i" and x.dtype.kind == "f":
            _require_held(node, x, dtype)
        return x.astype(dtype)
    if kind == "b":
        return x if x.dtype == jnp.bool_ else x != 0
    if x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    return x if kind == "f" else _truncated(x, dtype)


def _require_held(node: Node, x: np.ndarray, dtype: np.dtype) -> None:
    """Raises OnnxError for a number that the integer type cannot hold: runtimes differ on it."""
    least, end = float(np.iinfo(dtype).min), -float(np.iinfo(dtype).min)
    outside = ~((x >= least) & (x < end))
    if outside.any():
        raise node.error(f"expected numbers that {dtype} can hold, got {x[outside].flat[0]}")


def _truncated(x: Value, dtype: np.dtype) -> Value:
    """`x` rounded towards 0 where the integer type holds it."""
    x = integers.held_by(x, dtype)
    # jnp.trunc selects on the sign of x, which costs bounds their tightness; this is monotone.
    return jnp.floor(jax.nn.relu(x)) - jnp.floor(jax.nn.relu(-x))


def concat(node: Node, *values: Value) -> Value:
    """Concat."""
    axis = node.axis(node.integer("axis"), values[0].ndim)
    if len({v.dtype for v in values}) > 1:
        raise node.error("expected operands of one type")
    return node.xp.concatenate(values, axis=axis)


def expand(node: Node, x: Value, sizes: np.ndarray) -> Value:
    """Expand: broadcasting in both directions."""
    target = node.known_integers(sizes)
    node.check_size(target)
    rank = max(x.ndim, len(target))
    x = node.xp.reshape(x, (1,) * (rank - x.ndim) + x.shape)
    return node.xp.broadcast_to(x, np.broadcast_shapes(x.shape, target))


def flatten(node: Node, x: Value) -> Value:
    """Flatten: to a matrix, whose rows are the axes before ``axis``."""
    axis = node.integer("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        raise node.error(f"axis {axis} is out of range for rank {x.ndim}")
    axis = axis + x.ndim if axis < 0 else axis
    return node.xp.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def gather(node: Node, x: Value, indices: np.ndarray) -> Value:
    """Gather at known indices."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    length = x.shape[axis]
    if indices.dtype.kind != "i":
        raise node.error(f"expected integer indices, got {indices.dtype}")
    if indices.size and not -length <= indices.min() <= indices.max() < length:
        raise node.error(f"indices are out of range for an axis of length {length}")
    indices = np.where(indices < 0, indices + length, indices)
    if node.xp is np:
        node.check_size((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
        return np.take(x, indices, axis=axis)
    if indices.ndim == 0:
        return jax.lax.index_in_dim(x, int(indices), axis, keepdims=False)
    # float32 counts positions exactly only below 2^24, int32 always: lengths are checked above.
    return jnp.take(x, indices.astype(np.int32), axis=axis, mode="clip")


def one_hot(node: Node, indices: Value, depth: np.ndarray, values: Value) -> Value:
    """OneHot: ``values`` are the two that stand for off and on; negative indices wrap.

    Indices that are no integers are cast to int64 first.
    """
    count = int(node.known_number(depth))
    axis = node.integer("axis", -1)
    rank = indices.ndim + 1
    axis = node.axis(axis, rank)
    if values.shape != (2,) or not isinstance(values, np.ndarray):
        raise node.error("expected a known off value and a known on value")
    if count < 1:
        raise node.error(f"expected a depth of at least 1, got {count}")
    xp = node.xp
    full = (*indices.shape[:axis], count, *indices.shape[axis:])
    node.check_size(full)
    if xp is np and indices.dtype.kind == "f":
        _require_held(node, indices, np.dtype(np.int64))
        indices = indices.astype(np.int64)
    elif xp is not np and node.kinds[0] == "f":
        indices = _truncated(indices, np.dtype(np.int64))
    indices = xp.expand_dims(indices, axis)
    place = np.arange(count).reshape([-1 if i == axis else 1 for i in range(rank)])
    place = place.astype(indices.dtype)
    hit = xp.logical_or(indices == place, indices == place - place.dtype.type(count))
    if xp is np:
        return np.where(hit, values[1], values[0])
    # A sum of a predicate as a number, for which there are bounds, and not a selection of two
    # constants.
    off, on = (np.float32(v) for v in values)
    return hit.astype(jnp.float32) * (on - off) + off


def pad(
    node: Node,
    x: Value,
    pads: np.ndarray | None = None,
    value: np.ndarray | None = None,
    axes: np.ndarray | None = None,
) -> Value:
    """Pad with a constant; negative pads crop."""
    node.only("mode", "constant")
    amounts = node.integers_of("pads", pads)
    if value is None:
        fill = np.float32(node.number("value", 0.0))
    else:
        fill = node.known_number(node.carried(value) if node.computes_integers else value)
    chosen = range(x.ndim) if axes is None else node.axes(node.known_integers(axes), x.ndim)
    if amounts is None or len(amounts) != 2 * len(chosen):
        raise node.error(f"expected {2 * len(chosen)} pads, got {amounts}")
    low, high = [0] * x.ndim, [0] * x.ndim
    for k, axis in enumerate(chosen):
        low[axis], high[axis] = amounts[k], amounts[k + len(chosen)]
    node.check_size([n + a + b for n, a, b in zip(x.shape, low, high, strict=True)])
    grown = [(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True)]
    node.check_size([n + a + b for n, (a, b) in zip(x.shape, grown, strict=True)])
    if any(a or b for a, b in grown):
        x = node.xp.pad(x, grown, constant_values=np.asarray(fill, x.dtype))
    ends = [n + min(b, 0) for n, b in zip(x.shape, high, strict=True)]
    return _cut(node, x, [max(-a, 0) for a in low], ends, [1] * x.ndim)


def _cut(node: Node, x: Value, starts: list[int], ends: list[int], steps: list[int]) -> Value:
    """``x[start:end:step]`` in every axis, with positive steps and ends inside."""
    if node.xp is np:
        return x[tuple(map(slice, starts, ends, steps))]
    if (starts, ends, steps) == ([0] * x.ndim, list(x.shape), [1] * x.ndim):
        return x
    return jax.lax.slice(x, starts, ends, steps)


def reshape(node: Node, x: Value, sizes: np.ndarray) -> Value:
    """Reshape: -1 is inferred, 0 copies the operand's size (unless ``allowzero``)."""
    keep = not node.flag("allowzero", False)
    target = list(node.known_integers(sizes))
    for k, count in enumerate(target):
        if count == 0 and keep:
            if k >= x.ndim:
                raise node.error(f"size {k} of {target} copies an axis that {x.shape} has not")
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
    """Slice; ends beyond an axis are cut to it, negative steps walk backwards."""
    first, last = node.integers_of("starts", starts), node.integers_of("ends", ends)
    if first is None or last is None:
        raise node.error("expected starts and ends, got none")
    chosen = node.integers_of("axes", axes)
    chosen = node.axes(range(len(first)) if chosen is None else chosen, x.ndim)
    stride = (1,) * len(first) if steps is None else node.known_integers(steps)
    if not len(first) == len(last) == len(chosen) == len(stride) or 0 in stride:
        raise node.error("expected as many starts as ends, axes and steps, and no step of 0")
    low, high, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
    turned = []
    for axis, a, b, s in zip(chosen, first, last, stride, strict=True):
        # Python's own slices have the rules of ONNX, but read a start before the first element,
        # from which steps go back, as outside.
        a = max(a, -x.shape[axis]) if s < 0 else a
        places = range(x.shape[axis])[a:b:s]
        if s < 0:
            places = places[::-1]
            turned.append(axis)
        low[axis], step[axis] = (places[0] if places else 0), abs(s)
        high[axis] = places[-1] + 1 if places else 0
    x = _cut(node, x, low, high, step)
    if not turned:
        return x
    return np.flip(x, turned) if node.xp is np else jax.lax.rev(x, turned)


def split(node: Node, x: Value, sizes: np.ndarray | None = None) -> tuple[Value, ...]:
    """Split: into given sizes, or into equal ones of which the last may be smaller."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    lengths = node.integers_of("split", sizes)
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
    """Squeeze: named axes, or all of length 1."""
    chosen = node.integers_of("axes", axes)
    if chosen is None:
        chosen = [k for k, length in enumerate(x.shape) if length == 1]
    chosen = node.axes(chosen, x.ndim)
    if any(x.shape[axis] != 1 for axis in chosen):
        raise node.error(f"expected axes of length 1, got {chosen} of {x.shape}")
    return node.xp.squeeze(x, axis=chosen)


def unsqueeze(node: Node, x: Value, axes: np.ndarray | None = None) -> Value:
    """Unsqueeze: new axes of length 1, counted in the result."""
    chosen = node.integers_of("axes", axes)
    if chosen is None:
        raise node.error("expected axes, got none")
    return node.xp.expand_dims(x, node.axes(chosen, x.ndim + len(chosen)))


def resize(
    node: Node,
    x: Value,
    roi: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> Value:
    """Resize and Upsample: to the nearest pixel, by integer factors, so that pixels repeat."""
    if node.operator == "Upsample" or node.opset < 11:
        roi, scales = None, roi  # the operand's place before opset 11
        rounding, coordinates = "floor", "asymmetric"
    else:
        rounding = node.text("nearest_mode", "round_prefer_floor")
        coordinates = node.text("coordinate_transformation_mode", "half_pixel")
        node.number("cubic_coeff_a", -0.75)  # of another mode
        node.number("extrapolation_value", 0.0)  # likewise
        for name, value in (("exclude_outside", 0), ("antialias", 0)):
            node.only(name, value)
        node.only("keep_aspect_ratio_policy", "stretch")
    node.only("mode", "nearest")
    # A pixel's centre is nearest to itself, and so is all of it; its corner only when rounded down.
    centred = coordinates in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_")
    if not centred and (coordinates, rounding) != ("asymmetric", "floor"):
        raise node.error(f"{coordinates!r} coordinates with {rounding!r} are not supported")
    if sizes is not None and sizes.size:
        target = node.known_integers(sizes)
        factors = [b / a for a, b in zip(x.shape, target, strict=True)]
    elif scales is not None and scales.shape == (x.ndim,):
        factors = [float(v) for v in scales]
    else:
        raise node.error(f"expected {x.ndim} scales or sizes")
    if not all(factor >= 1 and factor.is_integer() for factor in factors):
        raise node.error(f"expected integer factors of at least 1, got {factors}")
    node.check_size([int(n * factor) for n, factor in zip(x.shape, factors, strict=True)])
    for axis, factor in enumerate(map(int, factors)):
        if factor > 1:
            shape = (*x.shape[: axis + 1], factor, *x.shape[axis + 1 :])
            grown = node.xp.broadcast_to(node.xp.expand_dims(x, axis + 1), shape)
            shape = (*x.shape[:axis], x.shape[axis] * factor, *x.shape[axis + 1 :])
            x = node.xp.reshape(grown, shape)
    return x


def tile(node: Node, x: Value, repeats: np.ndarray) -> Value:
    """Tile."""
    counts = node.known_integers(repeats)
    if len(counts) != x.ndim:
        raise node.error(f"expected {x.ndim} repeats, got {len(counts)}")
    node.check_size([n * count for n, count in zip(x.shape, counts, strict=True)])
    return node.xp.tile(x, counts)


def transpose(node: Node, x: Value) -> Value:
    """Transpose; without ``perm`` the axes are reversed."""
    order = node.integers("perm")
    if order is None:
        order = tuple(reversed(range(x.ndim)))
    if sorted(order) != list(range(x.ndim)):
        raise node.error(f"expected a permutation of {x.ndim} axes, got {order}")
    return node.xp.transpose(x, order)

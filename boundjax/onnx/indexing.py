"""Operators that read or write elements at constant indices.

The positions are computed with numpy while the file is read. Bounds see selections of elements and,
for scatters that reduce, arithmetic on the elements selected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.onnx import casts
from boundjax.onnx.node import DTYPES, Node, Value
from boundjax.ops import integers

# A scatter that reduces writes once for each time that an index occurs.
_MAX_WRITES = 256


def take(node: Node, x: Value, positions: np.ndarray, axis: int) -> Value:
    """Elements of an axis at a list of positions that lie within it."""
    node.check_size((*x.shape[:axis], len(positions), *x.shape[axis + 1 :]))
    if node.xp is np:
        return np.take(x, positions, axis=axis)
    length = x.shape[axis]
    if len(positions) == length and (positions == np.arange(length)).all():
        return x
    repeats, rest = divmod(len(positions), max(length, 1))
    if length and not rest and (positions == np.repeat(np.arange(length), repeats)).all():
        shape = (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
        grown = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
        return jnp.reshape(grown, (*x.shape[:axis], length * repeats, *x.shape[axis + 1 :]))
    step = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    if len(positions) and step > 0 and (np.diff(positions) == step).all():
        first, last = int(positions[0]), int(positions[-1])
        return jax.lax.slice_in_dim(x, first, last + 1, step, axis)
    return jnp.take(jnp.asarray(x), _narrow(node, positions, length), axis=axis, mode="clip")


def _narrow(node: Node, positions: np.ndarray, length: int) -> np.ndarray:
    """Positions as int32, which holds every one; float32 would only up to 2^24."""
    if length > np.iinfo(np.int32).max:
        raise node.error(f"indices into {length} elements are not supported")
    return positions.astype(np.int32)


def _elements(node: Node, x: Value, positions: np.ndarray) -> Value:
    """Elements of `x` at positions in C order, in the shape of these."""
    node.check_size(positions.shape)
    flat = node.xp.reshape(x, (-1,))
    return node.xp.reshape(take(node, flat, positions.reshape(-1), 0), positions.shape)


def _positions(shape: tuple[int, ...]) -> np.ndarray:
    """The positions of elements in C order, as an array of this shape."""
    return np.arange(math.prod(shape)).reshape(shape)


def _within(node: Node, indices: np.ndarray, length: int) -> np.ndarray:
    """Checks indices and counts them from the front."""
    if indices.dtype.kind != "i":
        raise node.error(f"expected integer indices, got {indices.dtype}")
    if indices.size and not -length <= indices.min() <= indices.max() < length:
        raise node.error(f"indices are out of range for an axis of length {length}")
    return np.where(indices < 0, indices + length, indices)


# --- reading --------------------------------------------------------------------------------------


def gather(node: Node, x: Value, indices: np.ndarray) -> Value:
    """Gather at constant indices."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    length = x.shape[axis]
    indices = _within(node, indices, length)
    if node.xp is np:
        node.check_size((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
        return np.take(x, indices, axis=axis)
    if indices.ndim == 0:
        return jax.lax.index_in_dim(x, int(indices), axis, keepdims=False)
    return jnp.take(x, _narrow(node, indices, length), axis=axis, mode="clip")


def gather_elements(node: Node, x: Value, indices: np.ndarray) -> Value:
    """GatherElements at constant indices."""
    axis, indices = _along(node, x, indices)
    return _elements(node, x, _places(x.shape, indices, axis))


def _along(node: Node, x: Value, indices: np.ndarray) -> tuple[int, np.ndarray]:
    """The axis of GatherElements or ScatterElements, and its checked indices."""
    axis = node.axis(node.integer("axis", 0), x.ndim)
    fits = indices.ndim == x.ndim and all(
        k == axis or m <= n for k, (n, m) in enumerate(zip(x.shape, indices.shape, strict=True))
    )
    if not fits:
        raise node.error(f"expected indices that fit {x.shape}, got shape {indices.shape}")
    return axis, _within(node, indices, x.shape[axis])


def _places(shape: tuple[int, ...], indices: np.ndarray, axis: int) -> np.ndarray:
    """Positions whose index along one axis is given, and along the others is the entry's own."""
    own: list[np.ndarray] = list(np.indices(indices.shape, sparse=True))
    own[axis] = indices
    return np.broadcast_to(_positions(shape)[tuple(own)], indices.shape)


def gather_nd(node: Node, x: Value, indices: np.ndarray) -> Value:
    """GatherND: the last axis of constant indices lists the first axes of the operand."""
    batch = node.integer("batch_dims", 0)
    fits = 0 <= batch < min(indices.ndim, x.ndim) and indices.shape[:batch] == x.shape[:batch]
    if not fits or not 1 <= indices.shape[-1] <= x.ndim - batch:
        raise node.error(
            f"expected indices that fit {x.shape} with {batch} batch axes, "
            f"got shape {indices.shape}"
        )
    return _elements(node, x, _slices(node, x.shape, indices, batch))


def _slices(node: Node, shape: tuple[int, ...], indices: np.ndarray, batch: int) -> np.ndarray:
    """Positions of the slices that the last axis of indices lists."""
    rank = indices.ndim - 1
    batches = [
        np.arange(n).reshape([-1 if i == k else 1 for i in range(rank)])
        for k, n in enumerate(shape[:batch])
    ]
    listed = [_within(node, indices[..., k], shape[batch + k]) for k in range(indices.shape[-1])]
    node.check_size((*indices.shape[:-1], *shape[batch + len(listed) :]))
    return _positions(shape)[(*batches, *listed)]


def compress(node: Node, x: Value, condition: np.ndarray) -> Value:
    """Compress: the elements, or the slices along an axis, where a constant is true."""
    axis = node.integer("axis", None) if "axis" in node.attributes else None
    if axis is None:
        x, axis = node.xp.reshape(x, (-1,)), 0
    axis = node.axis(axis, x.ndim)
    if condition.dtype != np.bool_ or condition.ndim != 1 or len(condition) > x.shape[axis]:
        raise node.error(
            f"expected at most {x.shape[axis]} conditions, "
            f"got {condition.dtype} of shape {condition.shape}"
        )
    return take(node, x, np.flatnonzero(condition), axis)


def reverse_sequence(node: Node, x: Value, lengths: np.ndarray) -> Value:
    """ReverseSequence: the first elements of every sequence of the batch, backwards."""
    time = node.axis(node.integer("time_axis", 0), x.ndim)
    batch = node.axis(node.integer("batch_axis", 1), x.ndim)
    count, longest = x.shape[batch], x.shape[time]
    numbers = node.to_integers(lengths)
    if {time, batch} != {0, 1}:
        raise node.error(f"expected batch_axis and time_axis 0 and 1, got {batch} and {time}")
    if len(numbers) != count or not all(0 <= n <= longest for n in numbers):
        raise node.error(f"expected {count} lengths from 0 to {longest}, got {numbers[:8]}")
    steps = np.arange(longest)
    order = np.stack([np.where(steps < n, n - 1 - steps, steps) for n in numbers])
    order = order if batch < time else order.T
    sides = [n if k in (time, batch) else 1 for k, n in enumerate(x.shape)]
    indices = np.broadcast_to(order.reshape(sides), x.shape)
    return _elements(node, x, _places(x.shape, indices, time))


def trilu(node: Node, x: Value, diagonal: np.ndarray | None = None) -> Value:
    """Trilu: the upper or the lower triangle of matrices, with 0 elsewhere."""
    upper = node.flag("upper", True)
    k = 0 if diagonal is None else int(node.to_number(diagonal))
    if x.ndim < 2:
        raise node.error(f"expected matrices, got shape {x.shape}")
    rows, columns = (np.arange(n) for n in x.shape[-2:])
    offset = columns[None] - rows[:, None]
    inside = np.broadcast_to(offset >= k if upper else offset <= k, x.shape)
    return node.xp.where(inside, x, node.xp.zeros(x.shape, x.dtype))


# --- writing --------------------------------------------------------------------------------------

# A function of numpy or of JAX for each. Integers stay with numpy, because JAX's have 32 bits.
_REDUCTIONS = {"add": "add", "mul": "multiply", "max": "maximum", "min": "minimum"}


def scatter_elements(node: Node, x: Value, indices: np.ndarray, updates: Value) -> Value:
    """ScatterElements and Scatter at constant indices."""
    axis, indices = _along(node, x, indices)
    if updates.shape != indices.shape:
        raise node.error(f"expected updates of shape {indices.shape}, got {updates.shape}")
    return _written(node, x, _places(x.shape, indices, axis), updates)


def scatter_nd(node: Node, x: Value, indices: np.ndarray, updates: Value) -> Value:
    """ScatterND: writes slices at constant indices."""
    if not indices.ndim or not 1 <= indices.shape[-1] <= x.ndim:
        raise node.error(f"expected indices that fit {x.shape}, got shape {indices.shape}")
    places = _slices(node, x.shape, indices, 0)
    if updates.shape != places.shape:
        raise node.error(f"expected updates of shape {places.shape}, got {updates.shape}")
    return _written(node, x, places, updates)


def _written(node: Node, x: Value, places: np.ndarray, updates: Value) -> Value:
    """`x` with its elements at positions replaced by updates, or combined with them."""
    reduction = node.text("reduction", "none")
    if reduction not in ("none", *_REDUCTIONS):
        raise node.error(
            f"attribute reduction: only 'none', {', '.join(map(repr, _REDUCTIONS))} are "
            f"supported, got {reduction!r}"
        )
    places = places.reshape(-1)
    flat, new = (node.xp.reshape(v, (-1,)) for v in (x, updates))
    occurrence = _occurrences(places)
    count = int(occurrence.max(initial=-1)) + 1
    if count > (1 if reduction == "none" else _MAX_WRITES):
        why = "which update wins is undefined" if reduction == "none" else "more are not supported"
        most = 1 if reduction == "none" else _MAX_WRITES
        raise node.error(f"expected an index at most {most} times, got {count}; {why}")
    for entries in (np.flatnonzero(occurrence == k) for k in range(count)):
        at, values = places[entries], take(node, new, entries, 0)
        if reduction != "none":
            values = _combined(node, reduction, take(node, flat, at, 0), values)
        # Elements behind the old ones are the new ones.
        source = np.arange(len(flat))
        source[at] = len(flat) + np.arange(len(at))
        flat = take(node, node.xp.concatenate([flat, values]), source, 0)
    return node.xp.reshape(flat, x.shape)


def _combined(node: Node, reduction: str, x: Value, y: Value) -> Value:
    if x.dtype == np.bool_:
        raise node.error(f"attribute reduction: {reduction!r} of bool is not supported")
    if x.dtype.kind == "i":
        return getattr(np, _REDUCTIONS[reduction])(x, y)
    result = getattr(jnp, _REDUCTIONS[reduction])(x, y)
    return integers.exact(result) if node.computes_integers else result


def _occurrences(places: np.ndarray) -> np.ndarray:
    """How many earlier entries have the same place, for every entry."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]][: len(places)]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(places)), 0))
    result = np.empty(len(places), np.int64)
    result[order] = np.arange(len(places)) - starts
    return result


# --- positions as values --------------------------------------------------------------------------


def one_hot(node: Node, indices: Value, depth: np.ndarray, values: Value) -> Value:
    """OneHot; `values` holds the off and the on value, and negative indices wrap around.

    Indices that are not integers are cast to int64 first.
    """
    count = int(node.to_number(depth))
    axis = node.integer("axis", -1)
    rank = indices.ndim + 1
    axis = node.axis(axis, rank)
    if values.shape != (2,) or not isinstance(values, np.ndarray):
        raise node.error("expected two constants as off and on values, got other operands")
    if count < 1:
        raise node.error(f"expected a depth of at least 1, got {count}")
    xp = node.xp
    full = (*indices.shape[:axis], count, *indices.shape[axis:])
    node.check_size(full)
    if xp is np and indices.dtype.kind == "f":
        casts.require_in_range(node, indices, np.dtype(np.int64))
        indices = indices.astype(np.int64)
    elif xp is not np and node.kinds[0] == "f":
        indices = casts.truncated(indices, np.dtype(np.int64))
    indices = xp.expand_dims(indices, axis)
    positions = np.arange(count).reshape([-1 if i == axis else 1 for i in range(rank)])
    positions = positions.astype(indices.dtype)
    wrapped = positions - positions.dtype.type(count)
    hit = xp.logical_or(indices == positions, indices == wrapped)
    if xp is np:
        return np.where(hit, values[1], values[0])
    off, on = (np.float32(v) for v in values)
    return jnp.where(hit, on, off)


def eye_like_kind(node: Node, kinds: Sequence[str]) -> str:
    """The kind of the values that EyeLike computes."""
    number = node.integer("dtype", 0)
    if number and number not in DTYPES:
        raise node.error(
            "only identities of float32, int32, int64 and bool are supported, "
            f"got element type {number}"
        )
    return np.dtype(DTYPES[number]).kind if number else kinds[0]


def eye_like(node: Node, x: Value) -> Value:
    """EyeLike: ones on a diagonal of a matrix of the operand's shape."""
    if x.ndim != 2:
        raise node.error(f"expected a matrix, got shape {x.shape}")
    diagonal = np.eye(x.shape[0], x.shape[1], node.integer("k", 0))
    number = node.integer("dtype", 0)
    if node.xp is np:
        return diagonal.astype(DTYPES[number] if number else x.dtype)
    kind = eye_like_kind(node, node.kinds)
    return jnp.asarray(diagonal.astype(np.bool_ if kind == "b" else np.float32))

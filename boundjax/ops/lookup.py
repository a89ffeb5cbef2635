"""Values read at an index that depends on the input: embeddings, dynamic slices, perturbed orders.

The result is one of the rows that the index may reach. Its interval is their hull, which is exact;
where the index is decided, linear bounds keep the row that it picks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.composite import composite
from boundjax.ir.families import Joint, Planes, Position, no_error
from boundjax.ir.node import Node, Perturbed
from boundjax.ir.table import register
from boundjax.numerics import largest_along
from boundjax.ops import whole
from boundjax.sets.interval import Interval


def looked_up(rows: Array, *indices: Array, sizes: tuple[int, ...] | None = None) -> Array:
    """Reads the row that indices name, elementwise. Only for traced graphs.

    Args:
      rows: `[N, *row]`, in the order of the indices, the last one fastest.
      *indices: whole numbers carried as floats, within `sizes`. They and `row` are broadcast to the
        shape of the result, `result[e] = rows[index[e], e]`.
      sizes: how many values each index has, `N` in all; by default there is one index.
    """
    sizes = (rows.shape[0],) if sizes is None else sizes
    assert math.prod(sizes) == rows.shape[0], "there is one row for all values of the indices"
    return composite("lookup", _lookup, rows, *indices, sizes=sizes)


def _lookup(rows: Array, *indices: Array, sizes: tuple[int, ...]) -> Array:
    shape = jnp.broadcast_shapes(rows.shape[1:], *(i.shape for i in indices))
    flat = jnp.zeros(shape, np.int32)
    for index, size in zip(indices, sizes, strict=True):
        place = jnp.clip(index, 0.0, float(size - 1)).astype(np.int32)
        flat = flat * size + jnp.broadcast_to(place, shape)
    return jnp.take_along_axis(_aligned(rows, shape), flat[None], 0, mode="clip")[0]


def _aligned(rows: Array, shape: Sequence[int]) -> Array:
    """`[N, *row] -> [N, *shape]`."""
    rows = rows.reshape(rows.shape[0], *(1,) * (len(shape) + 1 - rows.ndim), *rows.shape[1:])
    return jnp.broadcast_to(rows, (rows.shape[0], *shape))


def _operands(node: Node, intervals: tuple[Interval, ...]) -> list[Interval]:
    perturbed = iter(intervals)
    operands: list[Interval] = []
    for operand in node.operands:
        if isinstance(operand, Perturbed):
            operands.append(next(perturbed))
        else:
            value = jnp.asarray(operand)
            operands.append(Interval(value, value))
    return operands


def _reached(node: Node, indices: Sequence[Interval]) -> Array:
    """`[N, *shape]`: which rows an element may read."""
    sizes: tuple[int, ...] = node.params["sizes"]
    reached = jnp.ones((math.prod(sizes), *node.shape), bool)
    places = np.indices(sizes).reshape(len(sizes), -1)
    for index, values in zip(indices, places, strict=True):
        lower, upper = whole.ends(index.lower, index.upper)
        values = jnp.asarray(values, lower.dtype).reshape(-1, *(1,) * len(node.shape))
        low, high = (jnp.broadcast_to(end, node.shape)[None] for end in (lower, upper))
        reached = reached & (values >= low) & (values <= high)
    return reached


def _unknown(node: Node, indices: Sequence[Interval]) -> Array:
    """Where an index is NaN or may leave its range, for which no row stands."""
    unknown = jnp.zeros(node.shape, bool)
    for index, size in zip(indices, node.params["sizes"], strict=True):
        lower, upper = whole.ends(index.lower, index.upper)
        inside = (lower >= 0) & (upper <= size - 1) & (lower <= upper)
        unknown = unknown | jnp.broadcast_to(~inside, node.shape)
    return unknown


def _image(node: Node, *intervals: Interval) -> Interval:
    rows, *indices = _operands(node, intervals)
    reached, unknown = _reached(node, indices), _unknown(node, indices)
    low, high = (_aligned(end, node.shape) for end in rows)
    nan = jnp.any(reached & (jnp.isnan(low) | jnp.isnan(high)), 0) | unknown
    low = -largest_along(jnp.where(reached, -low, -jnp.inf))
    high = largest_along(jnp.where(reached, high, -jnp.inf))
    return Interval(jnp.where(nan, jnp.nan, low), jnp.where(nan, jnp.nan, high))


def _planes(node: Node, *intervals: Interval, position: Position) -> Planes:
    rows, *indices = _operands(node, intervals)
    hull = _image(node, *intervals)
    reached = _reached(node, indices)
    decided = (jnp.sum(reached, 0) == 1) & ~_unknown(node, indices)
    picks: tuple[Array, ...] = ()
    lower, upper = hull
    if node.perturbed[0]:
        picks = (jnp.where(decided[None] & reached, 1.0, 0.0).astype(node.dtype),)
        lower, upper = (jnp.where(decided, 0.0, end) for end in hull)
        # Rows are finite where a plane keeps them: an infinite one would meet weights of 0.
        unbounded = jnp.any(~(jnp.isfinite(rows.lower) & jnp.isfinite(rows.upper)))
        picks = (jnp.where(unbounded, 0.0, picks[0]),)
        lower = jnp.where(unbounded, hull.lower, lower)
        upper = jnp.where(unbounded, hull.upper, upper)
    return Planes(functools.partial(_pick, node), picks, lower, picks, upper)


def _pick(node: Node, picks: tuple[Array, ...], *operands: Array) -> Array:
    rows, indices = (operands[0], operands[1:]) if picks else (None, operands)
    # No line bounds an index: it has the weight 0.
    nothing = sum((0.0 * jnp.sum(i) for i in indices), jnp.zeros((), operands[-1].dtype))
    nothing = jnp.broadcast_to(nothing.astype(node.dtype), node.shape)
    return nothing if rows is None else jnp.sum(picks[0] * _aligned(rows, node.shape), 0) + nothing


register(
    Joint(
        name="lookup",
        note="rows at a perturbed index: the hull of those that it may reach",
        image=_image,
        planes=_planes,
        error=no_error,
        terms=lambda node: 8 + math.prod(node.params["sizes"]),
    )
)

"""Blocks of a layer's units: how many rows a walk takes at once, and which rows it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import windows
from boundjax.ir.families import Scalar
from boundjax.ir.node import Graph, Node
from boundjax.sets.interval import Interval
from boundjax.transforms import backward
from boundjax.transforms.relaxations import Relaxations

# Arrays the size of a block's rows that are alive at once in the backward walk: both sides of the
# coefficients before and after an op, and the temporaries of their product with the lines.
_LIVE_ARRAYS = 6
# Arrays per free line of an optimised row: its position, the gradient, the best, two moments.
_LIVE_POSITIONS = 6
# Larger blocks do not fit the caches of a CPU, which costs twice the time.
_CACHED_BYTES = 2**26
# Limits where blocks without a wanted unit are skipped: at least so many units per block, because
# smaller matrix products are inefficient, and at most so many blocks.
_SMALLEST_BLOCK = 256
_MOST_BLOCKS = 64

# Lower and upper bounds; None for a side that was not asked for.
Ends: TypeAlias = tuple[Array | None, Array | None]


def size_of(
    graph: Graph,
    node: Node,
    relaxations: Relaxations,
    optimized: Iterable[int],
    *,
    complete_rows: bool,
    max_bytes: int,
) -> int:
    """The largest number of a node's units in one block.

    Args:
      graph, node: the node and its graph.
      relaxations: the relaxations, for the sizes of free lines.
      optimized: the nodes whose free lines are optimised for every row.
      complete_rows: whether rows on the input must be complete.
      max_bytes: the memory for the rows of one block.
    """
    frames = backward.frames_of(graph, node.index)
    largest = max(windows.elements(frame) for frame in frames.values())
    if complete_rows:
        largest = max(largest, graph.nodes[0].size)
    row = _LIVE_ARRAYS * largest
    for index in optimized:
        for key in relaxations.keys.get(index, ()):
            windowed = isinstance(graph.nodes[index].op, Scalar)
            frame = frames[graph.nodes[index].inputs[0]]
            size = windows.elements(frame) if windowed else relaxations.slopes[key].size
            row += _LIVE_POSITIONS * size
    budget = max_bytes
    if jax.default_backend() == "cpu":
        budget = min(budget, _CACHED_BYTES)
    return max(1, budget // max(1, row * jnp.dtype(node.dtype).itemsize))


def bounds_of(
    bounds: Callable[[Array], Ends],
    interval: Interval,
    wanted: Array | None,
    limit: int,
    max_rows: int | None,
) -> Ends:
    """Bounds on the units of a node `[*shape]`, in blocks.

    Args:
      bounds: flat indices `[k]` of units -> bounds `[k]`.
      interval: the units' interval `[*shape]`, which the units that are not bounded keep.
      wanted: which units to bound, `[*shape]`; None for all.
      limit: the largest number of units in a block.
      max_rows: the largest number of units to bound, those of the widest intervals; None for all.
    """
    shape, size = interval.lower.shape, interval.lower.size
    selected = None  # all units, in order
    if max_rows is not None and max_rows < size:
        selected = _widest(interval, wanted, max_rows)
    elif wanted is not None and size > limit:
        limit = min(limit, max(_SMALLEST_BLOCK, math.ceil(size / _MOST_BLOCKS)))
        (selected,) = jnp.nonzero(wanted.reshape(-1), size=size, fill_value=size)
    ends = _mapped(bounds, jnp.arange(size) if selected is None else selected, limit, size)

    def placed(end: Array, old: Array) -> Array:
        if selected is not None:
            return old.reshape(-1).at[selected].set(end, mode="drop").reshape(shape)
        end = end.reshape(shape)
        return end if wanted is None else jnp.where(wanted, end, old)

    lower, upper = ends
    return (
        None if lower is None else placed(lower, interval.lower),
        None if upper is None else placed(upper, interval.upper),
    )


def _widest(interval: Interval, wanted: Array | None, count: int) -> Array:
    """The wanted units with the widest intervals, `[count]`, filled up with the number of units."""
    comparable = ~jnp.isnan(interval.width)
    wanted = comparable if wanted is None else wanted & comparable
    width = jnp.where(wanted, interval.width, -1.0).reshape(-1)
    widest, indices = jax.lax.top_k(jax.lax.stop_gradient(width), count)
    return jnp.where(widest >= 0, indices, width.size)


def _mapped(bounds: Callable[[Array], Ends], indices: Array, limit: int, size: int) -> Ends:
    """Bounds of the units `[k]`, in blocks of at most `limit`; the index `size` is no unit.

    Blocks without a unit are skipped, except under `vmap`, which computes them all.
    """
    count = len(indices)
    if count <= limit:
        return bounds(indices)
    blocks = math.ceil(count / limit)
    block = math.ceil(count / blocks)
    indices = jnp.pad(indices, (0, blocks * block - count), constant_values=size)
    shapes = jax.eval_shape(bounds, indices[:block])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def if_any(indices: Array) -> Ends:
        some = (indices < size).any()
        return jax.lax.cond(some, jax.checkpoint(bounds), lambda _: zeros, indices)

    stacked = jax.lax.map(if_any, indices.reshape(blocks, block))
    return jax.tree.map(lambda array: array.reshape(-1)[:count], stacked)

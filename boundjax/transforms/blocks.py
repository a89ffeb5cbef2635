"""Units of a layer in blocks: how many rows are walked at once, and which ones at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import windows
from boundjax.ir.families import Scalar
from boundjax.ir.node import Graph, Node
from boundjax.sets.interval import Interval
from boundjax.transforms import backward
from boundjax.transforms.relaxations import Relaxations

# Arrays of a block's rows that are alive at once in the backward walk: both sides of coefficients
# before and after an op, and what their product with the lines needs.
_LIVE_ARRAYS = 6
# Arrays per free line of a row that is optimised: it, its gradient, the best, two moments.
_LIVE_POSITIONS = 6
# On CPU: larger blocks leave the caches, which costs twice the time.
_CACHED_BYTES = 2**26
# Units of a block where blocks without a unit that matters are skipped: neither so few that matrix
# products become inefficient, nor so many that little is skipped.
_SMALLEST_BLOCK = 256
_MOST_SKIPPED = 64

# Lower and upper bounds; None for a side that nobody asked for.
Ends = tuple[Array | None, Array | None]


def size_of(
    graph: Graph,
    node: Node,
    relaxations: Relaxations,
    optimized: Iterable[int],
    *,
    complete_rows: bool,
    max_bytes: int,
) -> int:
    """How many units of a node are walked at once.

    Args:
      graph, node: whose units.
      relaxations: which free lines there are.
      optimized: the nodes whose free lines are optimised for every row.
      complete_rows: whether rows on the input cannot stay in windows.
      max_bytes: what the rows of one block may take.
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
      interval: the units' interval `[*shape]`, which units that are not bounded keep.
      wanted: which units matter, `[*shape]`; None: all.
      limit: units in a block, at most.
      max_rows: how many units are bounded, those of the widest intervals; None: all.
    """
    shape, size = interval.lower.shape, interval.lower.size
    chosen = None  # all units, in order
    if max_rows is not None and max_rows < size:
        chosen = _widest(interval, wanted, max_rows)
    elif wanted is not None and size > limit:
        limit = min(limit, max(_SMALLEST_BLOCK, math.ceil(size / _MOST_SKIPPED)))
        (chosen,) = jnp.nonzero(wanted.reshape(-1), size=size, fill_value=size)
    ends = _mapped(bounds, jnp.arange(size) if chosen is None else chosen, limit, size)

    def placed(end: Array, old: Array) -> Array:
        if chosen is not None:
            return old.reshape(-1).at[chosen].set(end, mode="drop").reshape(shape)
        end = end.reshape(shape)
        return end if wanted is None else jnp.where(wanted, end, old)

    lower, upper = ends
    return (
        None if lower is None else placed(lower, interval.lower),
        None if upper is None else placed(upper, interval.upper),
    )


def _widest(interval: Interval, wanted: Array | None, count: int) -> Array:
    """The wanted units of the widest intervals, `[count]`; the size if too few."""
    comparable = ~jnp.isnan(interval.width)
    wanted = comparable if wanted is None else wanted & comparable
    width = jnp.where(wanted, interval.width, -1.0).reshape(-1)
    widest, indices = jax.lax.top_k(jax.lax.stop_gradient(width), count)
    return jnp.where(widest >= 0, indices, width.size)


def _mapped(bounds: Callable[[Array], Ends], indices: Array, limit: int, end: int) -> Ends:
    """Bounds of the units `[k]`, in blocks of at most `limit`; `end` stands for none.

    Blocks without a unit are skipped; under `vmap` they are computed.
    """
    count = len(indices)
    if count <= limit:
        return bounds(indices)
    blocks = math.ceil(count / limit)
    block = math.ceil(count / blocks)
    indices = jnp.pad(indices, (0, blocks * block - count), constant_values=end)
    shapes = jax.eval_shape(bounds, indices[:block])
    none = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def if_any(indices: Array) -> Ends:
        some = (indices < end).any()
        return jax.lax.cond(some, jax.checkpoint(bounds), lambda _: none, indices)

    stacked = jax.lax.map(if_any, indices.reshape(blocks, block))
    return jax.tree.map(lambda array: array.reshape(-1)[:count], stacked)

"""Order statistics of perturbed values: sort, top-k, and the indices argsort, argmax and argmin.

A sorted row is written as a network of comparators (Batcher 1968, "Sorting networks and their
applications"), each a minimum and a maximum of two elements. Its intervals are exact, because the
ends of the operand's intervals pass it as numbers do, and where the order of two elements is
decided, a comparator is the identity in linear bounds as well.

An index is carried as a whole number (`ops.whole`). Its interval holds every place that an element
may take, among them those that ties and rounding allow. Which of a few elements is the largest is
decided by their differences, too: the intervals of two logits may overlap where one is always
larger, as margins show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from boundjax.ir.composite import composite
from boundjax.ir.families import Expansion, Joint, Planes, Position, no_error
from boundjax.ir.node import Node, Perturbed
from boundjax.ir.table import register
from boundjax.ops import lookup
from boundjax.sets.interval import Interval

# --- values ---------------------------------------------------------------------------------------


def _rounds(size: int) -> list[list[tuple[int, int]]]:
    """Batcher's odd-even merge sort: rounds of disjoint pairs, the smaller element first."""
    rounds, p = [], 1
    while p < size:
        k = p
        while k:
            pairs = [
                (i + j, i + j + k)
                for j in range(k % p, size - k, 2 * k)
                for i in range(min(k, size - j - k))
                if (i + j) // (2 * p) == (i + j + k) // (2 * p)
            ]
            rounds.append(pairs)
            k //= 2
        p *= 2
    return [pairs for pairs in rounds if pairs]


def sorted_along(x: Array, axis: int) -> Array:
    """`jnp.sort(x, axis)` of numbers that are not NaN, by minima and maxima of pairs."""
    x = jnp.moveaxis(x, axis, 0)
    for pairs in _rounds(x.shape[0]):
        small, large = (np.asarray(side, np.int32) for side in zip(*pairs, strict=True))
        first, second = (jnp.take(x, side, axis=0, mode="clip") for side in (small, large))
        rest = np.setdiff1d(np.arange(x.shape[0], dtype=np.int32), np.concatenate([small, large]))
        parts = [jnp.minimum(first, second), jnp.maximum(first, second)]
        if len(rest):
            parts.append(jnp.take(x, rest, axis=0, mode="clip"))
        places = np.argsort(np.concatenate([small, large, rest])).astype(np.int32)
        x = jnp.take(jnp.concatenate(parts), places, axis=0, mode="clip")
    return jnp.moveaxis(x, 0, axis)


def _sort(node: Node) -> Callable[..., list[Array]]:
    axis = node.params["dimension"]

    def function(*operands: Array) -> list[Array]:
        key, *payloads = operands
        if not node.perturbed[0]:
            order = jnp.argsort(key, axis=axis, stable=True)
            return [jnp.take_along_axis(o, order, axis, mode="clip") for o in operands]
        results = [sorted_along(key, axis)]
        for k, values in enumerate(payloads, start=1):
            order = composite("argsort", _argsort, key, axis=axis)
            if not _counts_places(node.operands[k], axis):
                rows = jnp.moveaxis(values.astype(key.dtype), axis, 0)
                order = jnp.moveaxis(order, axis, 0)
                rows = rows[:, None]  # one row for every place of the result
                order = jnp.moveaxis(lookup.looked_up(rows, order), 0, axis)
            results.append(order)
        return results

    return function


def _counts_places(operand: Any, axis: int) -> bool:
    """Whether a constant holds the index along the axis, as the second operand of an argsort."""
    if isinstance(operand, Perturbed | Tracer) or not np.issubdtype(operand.dtype, np.integer):
        return False
    shape = [-1 if k == axis else 1 for k in range(operand.ndim)]
    return bool((np.asarray(operand) == np.arange(operand.shape[axis]).reshape(shape)).all())


def _top_k(node: Node) -> Callable[[Array], list[Array]]:
    k, axis = node.params["k"], node.params.get("axis", -1) % len(node.input_shapes[0].shape)

    def function(x: Array) -> list[Array]:
        values = -sorted_along(-x, axis)
        order = composite("argsort", _argsort, -x, axis=axis)
        return [lax.slice_in_dim(part, 0, k, axis=axis) for part in (values, order)]

    return function


def _one_key(node: Node) -> bool:
    return node.params["num_keys"] == 1


# --- indices --------------------------------------------------------------------------------------


_MOST_COMPARED = 16  # elements of a row; there are half as many differences as their square


def _argmax(x: Array, *differences: Array, axis: int, sign: int) -> Array:
    del differences
    index = jnp.argmax(x if sign > 0 else -x, axis=axis)
    return index.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32)


def _argsort(x: Array, *, axis: int) -> Array:
    return jnp.argsort(x, axis=axis, stable=True).astype(x.dtype)


def index_of_largest(
    x: Array, axis: int, sign: int = 1, ordered_like: Array | None = None
) -> Array:
    """The first index of the largest (`sign` = -1: least) number, carried as a float.

    Args:
      x: numbers.
      axis, sign: along which axis, and of which end.
      ordered_like: numbers in the same order as finite `x`, whose differences have tighter bounds.
    """
    operands, numbers = [x], x if ordered_like is None else ordered_like
    if jnp.issubdtype(x.dtype, jnp.floating) and 1 < x.shape[axis] <= _MOST_COMPARED:
        first, second = (jnp.take(numbers, p, axis, mode="clip") for p in _pairs(x.shape[axis]))
        operands.append(first - second)
    return composite("argmax", _argmax, *operands, axis=axis, sign=sign)


def _pairs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of places, the earlier first."""
    first, second = np.triu_indices(size, k=1)
    return first.astype(np.int32), second.astype(np.int32)


def _before(x: Interval) -> tuple[Array, Array]:
    """`[..., n, n]`: whether element j comes before element k in a stable sort; surely, perhaps."""
    size, lead = x.lower.shape[-1], (1,) * (x.lower.ndim - 1)
    earlier = jnp.tri(size, k=-1, dtype=bool).T.reshape(*lead, size, size)  # [j, k]: j < k
    other = ~jnp.eye(size, dtype=bool).reshape(*lead, size, size)
    low, high = x.lower[..., None, :], x.upper[..., None, :]
    mine_low, mine_high = x.lower[..., :, None], x.upper[..., :, None]
    surely = jnp.where(earlier, mine_high <= low, mine_high < low)
    perhaps = jnp.where(earlier, mine_low <= high, mine_low < high)
    return surely, perhaps & other


def _hull(places: Array, dtype: np.dtype) -> Interval:
    """The least and the largest index of `[..., n]` that may be meant; NaN if there is none."""
    indices = jnp.arange(places.shape[-1], dtype=dtype).reshape((1,) * (places.ndim - 1) + (-1,))
    low = jnp.min(jnp.where(places, indices, jnp.inf), -1)
    high = jnp.max(jnp.where(places, indices, -jnp.inf), -1)
    empty = ~places.any(-1)
    return Interval(jnp.where(empty, jnp.nan, low), jnp.where(empty, jnp.nan, high))


def _rows(x: Interval, axis: int, sign: int, dtype: np.dtype) -> Interval:
    """Intervals `[..., n]` as numbers, of the negated values for a maximum."""
    lower, upper = (jnp.moveaxis(end, axis, -1).astype(dtype) for end in x)
    return Interval(lower, upper) if sign < 0 else Interval(-upper, -lower)


def _nan(x: Interval) -> Array:
    return jnp.isnan(x.lower).any(-1, keepdims=True) | jnp.isnan(x.upper).any(-1, keepdims=True)


def _argmax_image(node: Node, x: Interval, *differences: Interval) -> Interval:
    axis, sign = node.params["axis"], node.params["sign"]
    rows = _rows(x, axis, sign, node.dtype)
    surely, _ = _before(rows)
    for difference in differences:
        # For a maximum these are negated, like the rows. An interval that holds 0, as underflow
        # leaves it, decides nothing.
        lower, upper = _rows(difference, axis, sign, node.dtype)
        first, second = _pairs(rows.lower.shape[-1])
        surely = surely.at[..., first, second].max(upper < 0)
        surely = surely.at[..., second, first].max(lower > 0)
    first = ~surely.any(-2)  # nothing surely comes before it
    return _hull(first & ~_nan(rows), node.dtype)


def _argsort_image(node: Node, x: Interval) -> Interval:
    """The element at place p has at most p elements surely before it and at least p perhaps."""
    axis = node.params["axis"]
    rows = _rows(x, axis, -1, node.dtype)
    surely, perhaps = (jnp.sum(before, -2) for before in _before(rows))
    places = jnp.arange(rows.lower.shape[-1]).reshape((1,) * (surely.ndim - 1) + (-1, 1))
    may = (surely[..., None, :] <= places) & (perhaps[..., None, :] >= places)
    hull = _hull(may & ~_nan(rows)[..., None], node.dtype)
    return Interval(*(jnp.moveaxis(end, -1, axis) for end in hull))


def _constant_planes(image: Callable[..., Interval]) -> Callable[..., Planes]:
    def planes(node: Node, *intervals: Interval, position: Position) -> Planes:
        bounds = image(node, *intervals)

        def nothing(weights: tuple[Array, ...], *operands: Array) -> Array:
            # Linear in the operand, with the weight 0: no line bounds an index.
            total = sum((0.0 * jnp.sum(o) for o in operands), jnp.zeros((), node.dtype))
            return jnp.broadcast_to(total, node.shape)

        return Planes(nothing, (), bounds.lower, (), bounds.upper)

    return planes


register(Expansion(name="sort", note="by one key", accepts=_one_key, expand=_sort))
register(Expansion(name="top_k", expand=_top_k))
for _name, _image in (("argmax", _argmax_image), ("argsort", _argsort_image)):
    register(
        Joint(
            name=_name,
            note="an index, carried as a float: the places that may be meant",
            image=_image,
            planes=_constant_planes(_image),
            error=no_error,
            terms=lambda node: 8,
        )
    )

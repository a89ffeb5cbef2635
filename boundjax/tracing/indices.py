"""Gathers, slices and updates at an index that depends on the input, as lookups (`ops.lookup`).

All values that the index may have are read beforehand, at constant indices. What the program reads
is one of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.ir.node import Perturbed
from boundjax.ops import lookup

_MODES = lax.GatherScatterMode
# The first operand that is an index, by op.
_FIRST = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}


class Read(NamedTuple):
    """A function in place of an equation, and its operands."""

    function: Callable[..., Any]
    operands: Sequence[Any]


def reads(name: str) -> bool:
    """Whether an op takes indices that may be perturbed."""
    return name in _FIRST


def is_index(name: str, position: int) -> bool:
    """Whether an operand of an op is an index."""
    return name in _FIRST and position >= _FIRST[name]


def is_read(name: str, operands: Sequence[Any]) -> bool:
    """Whether an index of an op is perturbed."""
    return any(isinstance(o, Perturbed) for o in operands[_FIRST.get(name, len(operands)) :])


def read(eqn: Any, operands: list[Any], dtype: np.dtype, largest: int) -> Any:
    """The lookup in place of an equation with a perturbed index; a reason if it is too large.

    Args:
      eqn: an equation for which `is_read` holds.
      operands: its operands.
      dtype: in which integers are carried.
      largest: the number of elements of all rows for all places, at most.
    """
    gathers = eqn.primitive.name == "gather"
    rows, function = _gather(eqn, dtype) if gathers else _slice(eqn, operands)
    elements = rows * math.prod(eqn.outvars[0].aval.shape)
    if elements > largest:
        return (
            f"its index depends on the perturbed input and may read {rows} rows, {elements} "
            f"elements in all, and at most {largest} have bounds; bound a smaller table or batch"
        )
    return Read(function, operands)


def _gather(eqn: Any, dtype: np.dtype) -> tuple[int, Callable[[Array, Array], Array]]:
    """`lax.gather`, in all of its modes; batch dimensions are indices that count."""
    p, shape = eqn.params, eqn.invars[0].aval.shape
    numbers, out = p["dimension_numbers"], eqn.outvars[0].aval.shape
    batch = tuple(numbers.operand_batching_dims)
    axes = (*numbers.start_index_map, *batch)
    sizes = tuple(shape[axis] - p["slice_sizes"][axis] + 1 for axis in axes)
    dropped = {*numbers.collapsed_slice_dims, *batch}
    offsets = tuple(k for k in range(len(shape)) if k not in dropped)
    row = [p["slice_sizes"][k] for k in offsets]
    # The result's axes: those of the row where the numbers say, those of the index elsewhere.
    lookups = [k for k in range(len(out)) if k not in numbers.offset_dims]
    order = [int(k) for k in np.argsort([*lookups, *numbers.offset_dims])]

    def all_rows(operand: Array) -> Array:
        starts = np.indices(sizes, dtype=np.int32).reshape(len(sizes), -1).T
        plain = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(1, 1 + len(row))),
            collapsed_slice_dims=tuple(sorted(dropped)),
            start_index_map=axes,
        )
        starts, mode = jnp.asarray(starts), _MODES.PROMISE_IN_BOUNDS
        return lax.gather(operand, starts, plain, tuple(p["slice_sizes"]), mode=mode)

    def function(operand: Array, starts: Array) -> Array:
        starts = starts.astype(dtype)
        parts = [starts[..., k] for k in range(len(numbers.start_index_map))]
        for axis in numbers.start_indices_batching_dims:
            counted = lax.broadcasted_iota(np.int32, starts.shape[:-1], axis)
            parts.append(counted.astype(dtype))
        lead, fills = (*starts.shape[:-1], *(1,) * len(row)), p["mode"] == _MODES.FILL_OR_DROP
        inside = jnp.ones(lead, bool)
        places = []
        for part, size in zip(parts, sizes, strict=True):
            part = part.reshape(lead)
            inside = inside & (part >= 0.0) & (part <= float(size - 1))
            # In the third mode nobody says what is read outside: there is no bound.
            clips = fills or p["mode"] == _MODES.CLIP
            places.append(jnp.clip(part, 0.0, float(size - 1)) if clips else part)
        result = lookup.looked_up(all_rows(operand), *places, sizes=sizes)
        if fills:
            fill = np.nan if p["fill_value"] is None else p["fill_value"]
            filled = jnp.full(result.shape, fill, result.dtype)
            result = jnp.where(jnp.broadcast_to(inside, result.shape), result, filled)
        return jnp.transpose(result, order)

    return math.prod(sizes), function


def _slice(eqn: Any, operands: list[Any]) -> tuple[int, Callable[..., Array]]:
    """`lax.dynamic_slice` and `lax.dynamic_update_slice`, whose starts are clamped."""
    updates = eqn.primitive.name == "dynamic_update_slice"
    shape = eqn.invars[0].aval.shape
    window = eqn.invars[1].aval.shape if updates else eqn.params["slice_sizes"]
    first = _FIRST[eqn.primitive.name]
    moving = [k for k in range(len(shape)) if isinstance(operands[first + k], Perturbed)]
    sizes = tuple(shape[k] - window[k] + 1 for k in moving)

    def function(*values: Array) -> Array:
        arrays, starts = values[:first], values[first:]

        def at(place: Array) -> Array:
            here = [
                place[moving.index(k)] if k in moving else start.astype(np.int32)
                for k, start in enumerate(starts)
            ]
            if updates:
                return lax.dynamic_update_slice(arrays[0], arrays[1], here)
            return lax.dynamic_slice(arrays[0], here, window)

        places = np.indices(sizes, dtype=np.int32).reshape(len(sizes), -1).T
        rows = jax.vmap(at)(jnp.asarray(places))
        indices = [
            jnp.clip(starts[k], 0.0, float(size - 1)).reshape((1,) * (rows.ndim - 1))
            for k, size in zip(moving, sizes, strict=True)
        ]
        return lookup.looked_up(rows, *indices, sizes=sizes)

    return math.prod(sizes), function

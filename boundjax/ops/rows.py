"""Rows of a value along some of its axes, for ops that act on whole rows."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.node import Node
from boundjax.numerics import larger, signed_parts
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic


def axes_of(node: Node, ndim: int) -> tuple[int, ...]:
    """The axes of a node's rows, counted from 0."""
    return tuple(axis % ndim for axis in node.params["axes"])


def to_rows(value: Array, axes: tuple[int, ...]) -> Array:
    """Moves the axes to the end and merges them: `[..., n]`."""
    kept = value.ndim - len(axes)
    moved = jnp.moveaxis(value, axes, range(kept, value.ndim))
    return moved.reshape(*moved.shape[:kept], math.prod(moved.shape[kept:]))


def from_rows(rows: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Restores `shape`; repeats an entry that a whole row shares (`n = 1`)."""
    kept = [size for axis, size in enumerate(shape) if axis not in axes]
    sizes = [shape[axis] for axis in axes]
    full = jnp.broadcast_to(rows, (*rows.shape[:-1], int(np.prod(sizes))))
    return jnp.moveaxis(full.reshape(*kept, *sizes), range(len(kept), len(shape)), axes)


def rows_of(x: Interval, axes: tuple[int, ...]) -> Interval:
    """Rows of an interval; one NaN end makes all ends of its row NaN."""
    lower, upper = (to_rows(end, axes) for end in x)
    nan = (jnp.isnan(lower) | jnp.isnan(upper)).any(-1, keepdims=True)
    return Interval(jnp.where(nan, jnp.nan, lower), jnp.where(nan, jnp.nan, upper))


def sum_of_others(terms: Array) -> Array:
    """For each of `[..., n]` non-negative entries, the sum of the other entries.

    Subtracting an entry from the total loses no digits if another entry is at least as large; the
    sum without the largest entry is computed separately.
    """
    first = first_largest(terms)
    rest = jnp.sum(jnp.where(first, 0.0, terms), -1, keepdims=True)
    total = jnp.sum(terms, -1, keepdims=True)
    return jnp.where(first, rest, total - jnp.where(first, 0.0, terms))


def first_largest(values: Array) -> Array:
    """Where the largest entries of rows `[..., n]` are; one per row."""
    index = jnp.argmax(values, -1, keepdims=True)
    return index == jnp.arange(values.shape[-1]).reshape((1,) * (values.ndim - 1) + (-1,))


def row_size(node: Node) -> int:
    """The number of entries of a row."""
    shape = node.input_shapes[0].shape
    return math.prod(shape[axis] for axis in axes_of(node, len(shape)))


def nearest_to_zero(x: Interval) -> Array:
    """The distance of an interval from 0."""
    return signed_parts(larger(x.lower, -x.upper))[1]


def row_error(node: Node, arithmetic: Arithmetic) -> float:
    """The relative error of a sum over the axes, and of a few functions around it at 4 ulp each."""
    return arithmetic.gamma(row_size(node) + 32)

"""Piecewise linear functions with any pieces, also with jumps: `where(x > t, x, 0)`.

Within a piece only operands beyond its threshold count, so the image is the union of the pieces'.
A line lies above the function if it lies above both ends of every piece. The one that is lowest at
a point passes through two of these ends, one on each side of the point.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, smaller, with_derivative_of
from boundjax.sets.rounding import with_flushed


class Term(NamedTuple):
    """A number, or a constant operand with a sign (a factor of 1 or -1)."""

    factor: float
    operand: int | None = None

    def of(self, constants: Sequence[Array], like: Array) -> Array:
        """Its value in the shape and dtype of an array."""
        if self.operand is None:
            return jnp.full(like.shape, self.factor, like.dtype)
        constant = jnp.asarray(constants[self.operand], like.dtype)
        # Negating is exact, and a formula that says so needs no proof.
        return jnp.broadcast_to(constant if self.factor > 0 else -constant, like.shape)


class Bound(NamedTuple):
    """A half-line that ends at a threshold.

    Attributes:
      end: the threshold.
      below: whether numbers above the threshold belong to it, which bounds them from below.
      strict: whether the threshold itself does not.
    """

    end: Term
    below: bool
    strict: bool


class Piece(NamedTuple):
    """`slope x + offset` on the intersection of half-lines."""

    bounds: tuple[Bound, ...]
    slope: Term
    offset: Term


def contains(bounds: Sequence[Bound], x: Array, constants: Sequence[Array]) -> Array:
    """Where numbers lie in an intersection of half-lines."""
    inside = jnp.ones(x.shape, bool)
    for end, below, strict in bounds:
        c = end.of(constants, x)
        if below:
            inside = inside & (x > c if strict else x >= c)
        else:
            inside = inside & (x < c if strict else x <= c)
    return inside


def pieces(x: Array, *constants: Array, parts: tuple[Piece, ...]) -> Array:
    """The first piece that contains `x`, or else the last one.

    Args:
      x: any shape.
      *constants: which the terms of the pieces name.
      parts: the pieces.
    """
    value = _at(parts[-1], x, constants)
    for part in parts[-2::-1]:
        value = jnp.where(contains(part.bounds, x, constants), _at(part, x, constants), value)
    return value


def _at(part: Piece, x: Array, constants: Sequence[Array]) -> Array:
    slope, offset = part.slope.of(constants, x), part.offset.of(constants, x)
    # 0 times an infinite end is NaN.
    return jnp.where(slope == 0, 0.0, slope) * jnp.where(slope == 0, 0.0, x) + offset


class _Segment(NamedTuple):
    """A piece on an interval: its ends, its values there, and whether it has any numbers."""

    exists: Array
    left: Array
    right: Array
    at_left: Array
    at_right: Array
    slope: Array
    offset: Array


def _segments(node: Node, lower: Array, upper: Array) -> list[_Segment]:
    constants, segments = node.constants, []
    lower, upper = with_flushed(lower, upper)
    for part in node.params["parts"]:
        left, right, exists = lower, upper, jnp.ones(lower.shape, bool)
        for end, below, strict in part.bounds:
            c = end.of(constants, lower)
            if below:
                exists = exists & (upper > c if strict else upper >= c)
                left = jnp.where(left < c, c, left)
            else:
                exists = exists & (lower < c if strict else lower <= c)
                right = jnp.where(right > c, c, right)
        exists = exists & (left <= right)
        left, right = jnp.where(exists, left, lower), jnp.where(exists, right, lower)
        at_left, at_right = _at(part, left, constants), _at(part, right, constants)
        slope, offset = part.slope.of(constants, lower), part.offset.of(constants, lower)
        segments.append(_Segment(exists, left, right, at_left, at_right, slope, offset))
    return segments


def _image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    low, high = jnp.full_like(lower, jnp.inf), jnp.full_like(lower, -jnp.inf)
    for segment in _segments(node, lower, upper):
        for value in (segment.at_left, segment.at_right):
            low = smaller(low, jnp.where(segment.exists, value, jnp.inf))
            high = larger(high, jnp.where(segment.exists, value, -jnp.inf))
    # No piece contains NaN.
    unknown = jnp.isnan(lower) | jnp.isnan(upper) | ~(low <= high)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _line_above(
    segments: Sequence[_Segment], sign: float, at: Array, least: Array
) -> tuple[Array, Array]:
    """The line above `sign` times the pieces that is lowest at a point: slope and intercept."""
    ends = [
        (exists, x, jnp.where(exists, sign * y, least))
        for exists, left, right, at_left, at_right, *_ in segments
        for x, y in ((left, at_left), (right, at_right))
    ]
    best, slope = jnp.full_like(at, -jnp.inf), jnp.zeros_like(at)
    for first, x, y in ends:
        for second, other, value in ends:
            between = first & second & (x <= at) & (at <= other)
            apart = between & (other > x)
            rise = jnp.where(apart, value - y, 0.0) / jnp.where(apart, other - x, 1.0)
            there = jnp.where(apart, y + rise * (at - x), larger(y, value))
            better = jax.lax.stop_gradient(between & (there > best))
            best, slope = jnp.where(better, there, best), jnp.where(better, rise, slope)
    slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
    # Proven for any slope; where it touches decides about the derivative only.
    intercepts = [jnp.where(exists, y - slope * x, -jnp.inf) for exists, x, y in ends]
    intercept = functools.reduce(jnp.maximum, intercepts)
    return slope, with_derivative_of(intercept, best - slope * at)


def _lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    low, high = _image(node, lower, upper)
    fits = jnp.isfinite(low) & jnp.isfinite(high) & jnp.isfinite(upper - lower)
    lower, upper = jnp.where(fits, lower, 0.0), jnp.where(fits, upper, 0.0)
    segments = _segments(node, lower, upper)
    default = jnp.full_like(lower, 0.5)
    shares = position(lower, upper, default=default), position(lower, upper, default=default)
    ends = [lower + share * (upper - lower) for share in shares]
    ends = [jnp.clip(end, *jax.lax.stop_gradient((lower, upper))) for end in ends]
    above = _line_above(segments, 1.0, ends[0], jnp.where(fits, low, 0.0))
    slope, intercept = _line_above(segments, -1.0, ends[1], -jnp.where(fits, high, 0.0))
    below = -slope, -intercept
    # On one piece alone the function is linear, and both lines are the function.
    single = sum(s.exists.astype(jnp.int32) for s in segments) == 1
    only = [
        sum(jnp.where(s.exists, value, 0.0) for s, value in zip(segments, values, strict=True))
        for values in ([s.slope for s in segments], [s.offset for s in segments])
    ]

    def chosen(line: tuple[Array, Array], end: Array) -> tuple[Array, Array]:
        slope, intercept = (jnp.where(single, o, v) for o, v in zip(only, line, strict=True))
        usable = fits & jnp.isfinite(slope) & jnp.isfinite(intercept)
        return jnp.where(usable, slope, 0.0), jnp.where(usable, intercept, end)

    return Lines(*chosen(below, low), *chosen(above, high))


def _lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """The steepest piece; infinite where pieces that meet have different values."""
    segments, constants = _segments(node, lower, upper), node.constants
    largest = jnp.zeros_like(lower)
    for segment in segments:
        largest = jnp.where(segment.exists, jnp.maximum(largest, jnp.abs(segment.slope)), largest)
    for part in node.params["parts"]:
        for bound in part.bounds:
            c = bound.end.of(constants, lower)
            low, high = jnp.full_like(lower, jnp.inf), jnp.full_like(lower, -jnp.inf)
            for segment, other in zip(segments, node.params["parts"], strict=True):
                closed = [b._replace(strict=False) for b in other.bounds]
                meets = segment.exists & contains(closed, c, constants)
                value = _at(other, c, constants)
                low = jnp.where(meets, jnp.minimum(low, value), low)
                high = jnp.where(meets, jnp.maximum(high, value), high)
            inside = (lower <= c) & (c <= upper) & (high > low)
            largest = jnp.where(inside, jnp.inf, largest)
    return jnp.where(jnp.isnan(lower) | jnp.isnan(upper), jnp.nan, largest)


def _change(node: Node, position: int) -> tuple[float, float] | None:
    """What a slope or an offset changes; nothing is stated for a threshold, where it may jump."""
    slope = offset = 0.0
    for part in node.params["parts"]:
        if any(bound.end.operand == position - 1 for bound in part.bounds):
            return None
        slope = max(slope, float(part.slope.operand == position - 1))
        offset = max(offset, float(part.offset.operand == position - 1))
    return slope, offset


register(
    Scalar(
        name="pieces",
        note="where(x > t, a x + b, c x + d): thresholds, shrinkage, jumps",
        accepts=lambda node: node.perturbed[0] and len(node.inputs) == 1,
        image=_image,
        lines=_lines,
        lipschitz=_lipschitz,
        monotone=False,
        partial=True,
        pieces=True,
        jumps=True,
        change=_change,
    )
)

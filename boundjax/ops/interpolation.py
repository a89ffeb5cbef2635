"""Functions given by constant knots: `jnp.interp`, and the index of `jnp.searchsorted`.

Between its knots an interpolated function is straight, so its range and the largest difference to
any line are attained at knots and at the ends of the interval. The line above touches the concave
envelope at the middle of the interval: among all lines above it has the least area.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.ir.families import Expansion, Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import largest_along, with_derivative_of

_PLAIN = "jnp.interp with constant knots"
_RIGHT_ONLY = "jnp.interp with constant knots, a value right of them only"
# Halvings of the bracket of a slope; what remains of it changes a line to second order only.
_HALVINGS = 40


class _Points(NamedTuple):
    """Points `[P, *shape]` of the graph of a function, among them all of its corners and ends."""

    at: Array
    value: Array

    def negated(self) -> _Points:
        return _Points(self.at, -self.value)


def _points(node: Node, lower: Array, upper: Array) -> _Points:
    """The ends of the interval, and the knots inside; knots outside become the nearer end.

    A value beyond the last knot that differs from the one at it (`left`, `right`) jumps there, so
    that both values count.
    """
    (knots, values), outside = node.constants[:2], _outside(node)
    axes = (-1, *(1,) * lower.ndim)
    inner, heights = (jnp.asarray(c, lower.dtype).reshape(axes) for c in (knots, values))
    at_lower, at_upper = node.apply(lower), node.apply(upper)
    inner = jnp.broadcast_to(inner, (knots.shape[0], *lower.shape))
    heights = jnp.broadcast_to(heights, inner.shape)
    if outside:
        beyond = [heights[0], heights[-1]]
        for k, value in outside.items():
            beyond[k] = jnp.broadcast_to(jnp.asarray(value, lower.dtype), lower.shape)
        inner = jnp.concatenate([inner[:1], inner, inner[-1:]])
        heights = jnp.concatenate([beyond[0][None], heights, beyond[1][None]])
    # At a single point only the value there counts, also where the function jumps.
    before, after = (inner < lower[None]) | (lower == upper)[None], inner > upper[None]
    at = jnp.where(before, lower[None], jnp.where(after, upper[None], inner))
    value = jnp.where(before, at_lower[None], jnp.where(after, at_upper[None], heights))
    unsorted = ~jnp.all(knots[1:] >= knots[:-1])
    ends = jnp.stack([at_lower, at_upper])
    return _Points(
        jnp.concatenate([jnp.stack([lower, upper]), at]),
        jnp.where(unsorted, jnp.nan, jnp.concatenate([ends, value])),
    )


def _outside(node: Node) -> dict[int, Array]:
    """The values left (0) and right (1) of all knots that differ from those at the last knots."""
    assert node.op is not None
    values = node.constants[2:]
    return {1: values[0]} if node.op.note == _RIGHT_ONLY else dict(enumerate(values))


def _image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    value = _points(node, lower, upper).value
    return -largest_along(-value), largest_along(value)


def _line_above(points: _Points, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Slope and intercept of the line that is lowest at the middle of the interval.

    For a slope `s` the intercept is the largest `value - s at`. The height at the middle is convex
    in `s`, and falls as long as the point that decides lies right of the middle.
    """
    # Double where: no infinite end reaches a slope, nor its derivative.
    bounded = jnp.isfinite(lower) & jnp.isfinite(upper)
    highest = largest_along(points.value)
    lower, upper = (jnp.where(bounded, end, 0.0) for end in (lower, upper))
    points = _Points(jnp.where(bounded[None], points.at, 0.0), points.value)
    at, value = jax.lax.stop_gradient(points)
    middle = jax.lax.stop_gradient(0.5 * lower + 0.5 * upper)
    heights = jnp.where(jnp.isfinite(value), value, 0.0)
    # No chord between points on both sides of the middle is steeper than this.
    width = jnp.where(at == middle[None], jnp.inf, jnp.abs(at - middle[None]))
    nearest = jnp.min(width, 0)
    nearest = jnp.where(jnp.isfinite(nearest) & (nearest > 0), nearest, 1.0)
    steepest = 2.0 * (jnp.max(heights, 0) - jnp.min(heights, 0)) / nearest

    def deciding(slope: Array) -> Array:
        return jnp.argmax(heights - slope[None] * (at - middle[None]), axis=0)

    def pick(array: Array, index: Array) -> Array:
        return jnp.take_along_axis(array, index[None], axis=0, mode="clip")[0]

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        half = 0.5 * (low + high)
        right = pick(at, deciding(half)) > middle
        return jnp.where(right, half, low), jnp.where(right, high, half)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (-steepest, steepest))
    first, last = deciding(high), deciding(low)
    (p, f_p), (q, f_q) = (
        (pick(points.at, index), pick(points.value, index)) for index in (first, last)
    )
    share, scale = 8.0 * float(jnp.finfo(lower.dtype).eps), jnp.abs(lower) + jnp.abs(upper)
    distance = jax.lax.stop_gradient(q - p)
    close = ~(distance > share * scale)
    slope = jnp.where(close, 0.0, (f_q - f_p) / jnp.where(close, 1.0, q - p))
    # On a narrow interval the quotient's derivative would be one of rounding errors.
    narrow = ~(distance > share**0.5 * (scale + 1.0))
    slope = jnp.where(narrow, jax.lax.stop_gradient(slope), slope)
    fixed = jax.lax.stop_gradient(slope)
    intercept = jnp.max(value - fixed[None] * at, axis=0)
    intercept = with_derivative_of(intercept, f_p - slope * p)
    # The chord's product and the function between its knots are rounded.
    size = jnp.max(jnp.abs(heights), 0) + jnp.abs(fixed) * (jnp.abs(lower) + jnp.abs(upper))
    intercept = jnp.where(bounded, intercept, highest)
    return jnp.where(bounded, slope, 0.0), intercept + jax.lax.stop_gradient(share * size)


def _lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    points = _points(node, lower, upper)
    above, high = _line_above(points, lower, upper)
    below, low = _line_above(points.negated(), lower, upper)
    return Lines(-below, -low, above, high)


def _lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """The steepest piece that the interval meets, or infinite where the function jumps."""
    knots, values = (jnp.asarray(c, lower.dtype) for c in node.constants[:2])
    rise, run = jnp.abs(jnp.diff(values)), jnp.diff(knots)
    flat = rise == 0
    steps = jnp.where(flat, 0.0, jnp.where(run > 0, rise / jnp.where(run > 0, run, 1.0), jnp.inf))
    axes = (-1, *(1,) * lower.ndim)
    meets = (knots[1:].reshape(axes) >= lower[None]) & (knots[:-1].reshape(axes) <= upper[None])
    slope = jnp.max(jnp.where(meets, steps.reshape(axes), 0.0), 0, initial=0.0)
    for k, value in _outside(node).items():
        knot = knots[-k]
        jumps = (value != values[-k]) & (lower <= knot) & (upper >= knot)
        slope = jnp.where(jumps, jnp.inf, slope)
    return slope


def _constant_knots(node: Node) -> bool:
    """Whether only the argument is perturbed, and the knots are not known to be unsorted."""
    if not (node.perturbed[0] and not any(node.perturbed[1:]) and len(node.constants) >= 2):
        return False
    knots = node.constants[0]
    floating = jnp.issubdtype(node.dtype, jnp.floating) and node.shape == node.input_shapes[0].shape
    if not floating or np.ndim(knots) != 1 or not np.size(knots):
        return False
    return isinstance(knots, Tracer) or bool((np.diff(np.asarray(knots)) >= 0).all())


# Whether a knot lies before the argument.
Compare = Callable[[Array, Array], Array]


def _count(knots: Array, x: Array, before: Compare) -> Array:
    """How many knots lie before the argument: every term of the sum is monotone."""
    knots = jnp.broadcast_to(knots.reshape(-1, *(1,) * x.ndim), (knots.shape[0], *x.shape))
    inside = before(knots, jnp.broadcast_to(x[None], knots.shape))
    return jnp.sum(inside.astype(x.dtype), 0)


def _counts_knots(position: int, before: Compare, falling: Compare | None = None) -> dict[str, Any]:
    """The fields of an entry that counts the knots in the operand at this position.

    Only sorted knots are counted right: rising ones, or with `falling` also those that fall.
    """

    def rising(node: Node) -> bool | None:
        """Whether the knots rise (True) or fall (False); None if they do neither."""
        knots = node.constant(position)
        if isinstance(knots, Tracer):
            return None
        steps = np.diff(np.asarray(knots))
        return True if (steps >= 0).all() else False if (steps <= 0).all() else None

    def accepts(node: Node) -> bool:
        x = node.input_shapes[0]
        if len(node.inputs) != 1 or node.perturbed[position]:
            return False
        knots = node.constant(position)
        numbers = knots.dtype == x.dtype and jnp.issubdtype(x.dtype, jnp.floating)
        sides = (True,) if falling is None else (True, False)
        return numbers and np.ndim(knots) == 1 and rising(node) in sides

    def expand(node: Node) -> Callable[[Array, Array], Array]:
        compare = before if rising(node) else falling
        assert compare is not None, "`accepts` refuses knots that fall"

        def function(*operands: Array) -> Array:
            return _count(operands[position], operands[1 - position], compare)

        return function

    return {"accepts": accepts, "expand": expand}


def _with_right(x: Array, xp: Array, fp: Array, right: Array) -> Array:
    return jnp.interp(x, xp, fp, right=right)


for _note, _function in ((_PLAIN, jnp.interp), (_RIGHT_ONLY, _with_right)):
    register(
        Scalar(
            name="_interp",
            note=_note,
            traced_as=_function,
            accepts=_constant_knots,
            image=_image,
            lines=_lines,
            lipschitz=_lipschitz,
        )
    )
for _side, _before, _falling in (
    ("left", jnp.less, jnp.greater_equal),
    ("right", jnp.less_equal, jnp.greater),
):
    register(
        Expansion(
            name="searchsorted",
            note=f"jnp.searchsorted in constants, side='{_side}'",
            traced_as=functools.partial(jnp.searchsorted, side=_side),
            **_counts_knots(0, _before),
        )
    )
    register(
        Expansion(
            name="digitize",
            note=f"jnp.digitize by constants, right={_side == 'left'}",
            traced_as=functools.partial(jnp.digitize, right=_side == "left"),
            **_counts_knots(1, _before, _falling),
        )
    )

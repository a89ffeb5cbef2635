"""The angle of a point, `atan2(y, x)`.

Along the negative x-axis it jumps from pi to -pi, and at the origin it has every value nearby.
Boxes that touch either have constant bounds. On all others the angle is continuous and its range
is attained at corners, since from the origin a box is seen between two of them.

Both planes have the slopes of the tangent plane in the middle of the box. What remains is harmonic,
so its extrema lie on the edges, where it is a function of one variable: at a corner, or where its
derivative vanishes, which has a solution in closed form.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import Array, lax

from boundjax.ir.families import Error, Joint, Planes, Position, copies
from boundjax.ir.node import Node, Perturbed
from boundjax.ir.table import register
from boundjax.ops.product import rounding, weighted_sum
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import with_flushed

_PI_ABOVE = math.pi * (1.0 + 1e-6)


def _operands(node: Node, intervals: tuple[Interval, ...]) -> tuple[Interval, Interval]:
    """The intervals of `y` and `x` in the node's shape; constants are points."""
    perturbed = iter(intervals)
    operands = []
    for operand in node.operands:
        value = None if isinstance(operand, Perturbed) else jnp.asarray(operand, node.dtype)
        ends = next(perturbed) if value is None else Interval(value, value)
        ends = Interval(*with_flushed(*(jnp.broadcast_to(end, node.shape) for end in ends)))
        operands.append(ends.poisoned())
    y, x = operands
    return y, x


def _jumps(y: Interval, x: Interval) -> Array:
    """Where a box touches the negative x-axis or the origin, or is unbounded."""
    cut = (y.lower <= 0) & (y.upper >= 0) & (x.lower <= 0)
    return cut | y.unbounded | x.unbounded


def _safe(y: Interval, x: Interval, jumps: Array) -> tuple[Interval, Interval]:
    """The point (1, 1) in place of boxes without lines; no gradient flows into those."""
    y, x = (Interval(*(jnp.where(jumps, 1.0, end) for end in z)) for z in (y, x))
    return y, x


def _image(node: Node, *intervals: Interval) -> Interval:
    y, x = _operands(node, intervals)
    jumps = _jumps(y, x)
    safe_y, safe_x = _safe(y, x, jumps)
    # The corners by the signs: upwards the angle grows right of the origin and falls left of it.
    above, under = safe_y.lower > 0, safe_y.upper < 0
    # A box around the x-axis lies right of the origin.
    least_x = jnp.where(above, safe_x.upper, safe_x.lower)
    most_x = jnp.where(under, safe_x.upper, safe_x.lower)
    least_y = jnp.where(least_x >= 0, safe_y.lower, safe_y.upper)
    most_y = jnp.where(most_x >= 0, safe_y.upper, safe_y.lower)
    low, high = jnp.arctan2(least_y, least_x), jnp.arctan2(most_y, most_x)
    low, high = low - rounding(jnp.abs(low)), high + rounding(jnp.abs(high))
    # Half planes that a box lies in, also an unbounded one.
    floor = jnp.where(y.lower > 0, 0.0, jnp.where(x.lower > 0, -0.5 * _PI_ABOVE, -_PI_ABOVE))
    ceiling = jnp.where(y.upper < 0, 0.0, jnp.where(x.lower > 0, 0.5 * _PI_ABOVE, _PI_ABOVE))
    low, high = jnp.where(jumps, floor, low), jnp.where(jumps, ceiling, high)
    nan = jnp.isnan(y.lower) | jnp.isnan(x.lower)
    return Interval(jnp.where(nan, jnp.nan, low), jnp.where(nan, jnp.nan, high))


def _planes(node: Node, *intervals: Interval, position: Position) -> Planes:
    y, x = _operands(node, intervals)
    image = _image(node, *intervals)
    jumps = _jumps(y, x)
    y, x = _safe(y, x, jumps | jnp.isnan(image.lower))
    cy, cx = y.middle, x.middle
    # Scaled, so that no square over- or underflows.
    scale = lax.stop_gradient(jnp.maximum(jnp.abs(cy), jnp.abs(cx)))
    scale = jnp.where(scale > 0, scale, 1.0)
    y, x = (Interval(*(end / scale for end in z)) for z in (y, x))
    cy, cx = cy / scale, cx / scale
    squares = jnp.square(cy) + jnp.square(cx)
    of_y, of_x = cx / squares, -cy / squares

    def remainder(at_y: Array, at_x: Array) -> Array:
        return jnp.arctan2(at_y, at_x) - of_y * at_y - of_x * at_x

    def critical(edge: Array, slope: Array, sign: float) -> Array:
        """Where the derivative `sign edge / (edge^2 + t^2) - slope` is 0, for `t >= 0`."""
        edge, slope = lax.stop_gradient((edge, slope))
        square = sign * edge / jnp.where(slope == 0, 1.0, slope) - jnp.square(edge)
        return jnp.where((slope != 0) & (square > 0), jnp.sqrt(jnp.maximum(square, 0.0)), 0.0)

    values = [remainder(at_y, at_x) for at_y in y for at_x in x]
    for at_x in x:
        t = critical(at_x, of_y, 1.0)
        values += [remainder(jnp.clip(sign * t, *lax.stop_gradient(y)), at_x) for sign in (1, -1)]
    for at_y in y:
        t = critical(at_y, of_x, -1.0)
        values += [remainder(at_y, jnp.clip(sign * t, *lax.stop_gradient(x))) for sign in (1, -1)]
    size = math.pi + jnp.abs(of_y) * y.largest + jnp.abs(of_x) * x.largest
    below = functools.reduce(jnp.minimum, values) - rounding(size)
    above = functools.reduce(jnp.maximum, values) + rounding(size)
    weights, middle = (of_y / scale, of_x / scale), of_y * cy + of_x * cx
    constant_below = jumps | ~(middle + below > image.lower)
    constant_above = jumps | ~(middle + above < image.upper)

    def plane(constant: Array, offset: Array, end: Array) -> tuple[tuple[Array, ...], Array]:
        usable = [jnp.where(constant, 0.0, weight) for weight in weights]
        offset, kept = jnp.where(constant, end, offset), []
        for weight, operand in zip(usable, node.operands, strict=True):
            if isinstance(operand, Perturbed):
                kept.append(weight)
            else:
                offset = offset + weight * jnp.broadcast_to(jnp.asarray(operand), node.shape)
        return tuple(kept), offset

    lower_weights, lower = plane(constant_below, below, image.lower)
    upper_weights, upper = plane(constant_above, above, image.upper)
    return Planes(weighted_sum, lower_weights, lower, upper_weights, upper)


register(
    Joint(
        name="atan2",
        note="constant where a box touches the origin or the negative x-axis",
        accepts=lambda node: jnp.issubdtype(node.dtype, jnp.floating),
        image=_image,
        planes=_planes,
        # A program's angle is off by a few units of a half turn; the planes by no more.
        error=lambda node, sizes, arithmetic: Error(64.0 * arithmetic.unit, 16.0 * arithmetic.unit),
        terms=lambda node: 16,
        reach=copies,
    )
)

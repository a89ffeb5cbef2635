"""Piecewise linear functions: hinges, ramps, steps, and their two lines on an interval.

* *hinges* (relu, leaky relu, abs, max and min with a constant): two straight pieces;
* *ramps* (clip, relu6, hard tanh): flat, straight, flat;
* *steps* (sign, floor, a predicate as a number): they jump.

Lines follow Zhang et al. 2018 (CROWN); the free slope of a hinge or ramp is a slope policy's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from boundjax.ir.families import Lines, Position
from boundjax.ir.node import Node
from boundjax.numerics import larger, signed_parts, smaller, with_derivative_of

# --- hinges: left * t for t < 0, right * t for t >= 0 ---------------------------------------------


def hinge_lines(
    lower: Array, upper: Array, left: ArrayLike, right: ArrayLike, position: Position
) -> Lines:
    """Lines of ``left * min(t, 0) + right * max(t, 0)`` on ``[lower, upper]``.

    On an interval around 0 one line is the chord through both ends; the other passes through the
    origin with a free slope between ``left`` and ``right``: ``left + (right - left) * position``.
    The hinge is convex (chord above) where ``right >= left``, else concave (chord below).
    For relu: chord slope ``u / (u - l)``, intercept ``-l u / (u - l)``.
    """
    on, off = lower >= 0, upper <= 0
    stable = on | off
    stable_slope = jnp.where(on, right, left).astype(lower.dtype)
    width = jnp.where(stable, 1.0, upper - lower)
    fraction = jnp.where(stable, 0.0, upper / width)  # NaN bounds are neither on nor off: NaN
    chord_slope = jnp.where(stable, stable_slope, left + (right - left) * fraction)
    chord_intercept = (left - right) * lower * fraction
    at_ends = left * lower - chord_slope * lower, right * upper - chord_slope * upper
    convex = right >= left
    chord_intercept = through_ends(chord_intercept, *at_ends, convex)
    chord_intercept = jnp.where(stable, 0.0, chord_intercept)
    free_slope = jnp.where(stable, stable_slope, left + (right - left) * position(lower, upper))
    if isinstance(left, float) and isinstance(right, float):
        if convex:
            return Lines(free_slope, None, chord_slope, chord_intercept)
        return Lines(chord_slope, chord_intercept, free_slope, None)
    zero = jnp.zeros_like(chord_intercept)
    return Lines(
        jnp.where(convex, free_slope, chord_slope),
        jnp.where(convex, zero, chord_intercept),
        jnp.where(convex, chord_slope, free_slope),
        jnp.where(convex, chord_intercept, zero),
    )


def through_ends(chord: Array, at_lower: Array, at_upper: Array, above: bool | Array) -> Array:
    """The intercept with which a chord of this slope is above (below) both of its ends.

    A slope that under- or overflows is not the chord's, by which its formula is wrong. `chord` is
    that formula, for the derivative.
    """
    high, low = jnp.maximum(at_lower, at_upper), jnp.minimum(at_lower, at_upper)
    if isinstance(above, bool):
        found = high if above else low
    else:
        found = jnp.where(above, high, low)
    return with_derivative_of(found, chord)


def shifted(lines: Lines, x: ArrayLike, y: ArrayLike) -> Lines:
    """Lines of ``y + f(t - x)`` from the lines of ``f``."""

    def move(slope: Array | None, intercept: Array | None) -> Array:
        value = 0.0 if intercept is None else intercept
        return value + y if slope is None else value + y - slope * x

    return Lines(
        lines.lower_slope,
        move(lines.lower_slope, lines.lower_intercept),
        lines.upper_slope,
        move(lines.upper_slope, lines.upper_intercept),
    )


def number(node: Node, index: int = 0) -> ArrayLike:
    """A constant operand, as a Python float where it is one known number."""
    constant = node.constants[index]
    if isinstance(constant, jax.core.Tracer) or np.ndim(constant):
        return jnp.asarray(constant, node.dtype)
    return float(constant)


def monotone_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Image of an increasing function whose values are exact in floating point."""
    return node.apply(lower), node.apply(upper)


def constant_slope(slope: float) -> Callable[[Node, Array, Array], Array]:
    """A Lipschitz constant that no interval changes."""
    return lambda node, lower, upper: jnp.full_like(lower, slope)


def relu_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of ``max(t, 0)``."""
    return hinge_lines(lower, upper, 0.0, 1.0, position)


def abs_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of ``|t|``."""
    return hinge_lines(lower, upper, -1.0, 1.0, position)


def abs_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Image of ``|t|``."""
    return (
        jax.nn.relu(lower) + jax.nn.relu(-upper),
        larger(jnp.abs(lower), jnp.abs(upper)),
    )


def leaky_slope(node: Node) -> ArrayLike:
    """jax.nn.leaky_relu's slope, an operand or its default."""
    return number(node) if node.constants else 0.01


def leaky_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of ``t`` right of 0 and ``slope t`` left of it, for any slope."""
    return hinge_lines(lower, upper, leaky_slope(node), 1.0, position)


def leaky_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Image of a leaky relu."""
    # A negative slope makes the function fall left of 0: its least value is then at 0 or at an end.
    at_lower, at_upper = node.apply(lower), node.apply(upper)
    around = (lower < 0) & (upper > 0)
    low = smaller(at_lower, at_upper)
    low = jnp.where(around, signed_parts(low)[0], low)
    return low, larger(at_lower, at_upper)


def leaky_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """The steeper of the two pieces."""
    return jnp.broadcast_to(
        jnp.maximum(jnp.abs(jnp.asarray(leaky_slope(node), lower.dtype)), 1.0), lower.shape
    )


def max_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of ``max(t, c)``."""
    c = number(node)
    if isinstance(c, float) and c == 0.0:
        return hinge_lines(lower, upper, 0.0, 1.0, position)
    return shifted(hinge_lines(lower - c, upper - c, 0.0, 1.0, position), c, c)


def min_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of ``min(t, c)``."""
    c = number(node)

    def mirrored(low: Array, high: Array) -> Array:
        # min(t, 0) = -relu(-t): the policy sees the relu's interval, and its slope left of 0 is 1.
        return 1.0 - position(-high, -low)

    return shifted(hinge_lines(lower - c, upper - c, 1.0, 0.0, mirrored), c, c)


# --- ramps: min(max(t, low), high) ----------------------------------------------------------------


def ramp_lines(
    lower: Array, upper: Array, low: ArrayLike, high: ArrayLike, position: Position
) -> Lines:
    """Lines of ``min(max(t, low), high)`` with ``low <= high`` on ``[lower, upper]``.

    Above, where the interval reaches past ``high``: a line through ``(high, high)`` whose slope is
    free between 0 and the slope to the left end's value; else the chord of the hinge at ``low``.
    Below by symmetry. The free slopes are the policy's, seen from the kink in question.
    """
    image_lower, image_upper = jnp.clip(lower, low, high), jnp.clip(upper, low, high)
    # Where the interval lies in one piece the two ends tell everything, and the lines coincide.
    straight = (lower >= low) & (upper <= high)
    flat = (upper <= low) | (lower >= high)
    single = straight | flat
    slope_single = jnp.where(flat, 0.0, 1.0).astype(lower.dtype)
    intercept_single = jnp.where(flat, image_lower, 0.0)

    past_high, past_low = upper > high, lower < low
    width = jnp.where(single, 1.0, upper - lower)
    chord = jnp.where(single, 0.0, (image_upper - image_lower) / width)
    from_lower, from_upper = image_lower - chord * lower, image_upper - chord * upper

    to_high = jnp.where(single | ~past_high, 1.0, high - lower)
    steepest_upper = (high - image_lower) / to_high
    upper_free = steepest_upper * position(high - upper, high - lower)
    upper_slope = jnp.where(past_high, upper_free, chord)
    upper_intercept = jnp.where(
        past_high,
        high - upper_free * high,
        through_ends(from_lower, from_lower, from_upper, above=True),
    )

    from_low = jnp.where(single | ~past_low, 1.0, upper - low)
    steepest_lower = (image_upper - low) / from_low
    lower_free = steepest_lower * position(lower - low, upper - low)
    lower_slope = jnp.where(past_low, lower_free, chord)
    lower_intercept = jnp.where(
        past_low,
        low - lower_free * low,
        through_ends(from_upper, from_lower, from_upper, above=False),
    )

    return Lines(
        jnp.where(single, slope_single, lower_slope),
        jnp.where(single, intercept_single, lower_intercept),
        jnp.where(single, slope_single, upper_slope),
        jnp.where(single, intercept_single, upper_intercept),
    )


def ramp(low: float, high: float) -> Callable[[Node, Array, Array, Position], Lines]:
    """Lines of a ramp with ends that are known numbers."""
    return lambda node, lower, upper, position: ramp_lines(lower, upper, low, high, position)


def clip_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of a clip or clamp with constant ends."""
    low, high = (jnp.asarray(c, node.dtype) for c in _clip_ends(node))
    low, high = jnp.broadcast_to(low, lower.shape), jnp.broadcast_to(high, lower.shape)
    # jnp.clip gives `high` wherever low > high.
    return ramp_lines(lower, upper, jnp.minimum(low, high), high, position)


def _clip_ends(node: Node) -> tuple[Array, Array]:
    # jnp.clip(x, low, high); the primitive is clamp(low, x, high).
    return node.constants[0], node.constants[1]


# --- steps ----------------------------------------------------------------------------------------


def rounding_lines(below: float, above: float) -> Callable[[Node, Array, Array, Position], Lines]:
    """Lines of a function with ``x + below <= f(x) <= x + above``: floor, ceil, round.

    Each is the better one, at the middle of the interval, of that line and of the image's end.
    """

    def lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
        middle = 0.5 * (lower + upper)
        at_lower, at_upper = node.apply(lower), node.apply(upper)
        constant_below = ~(middle + below > at_lower)  # NaN stays NaN
        constant_above = ~(middle + above < at_upper)
        one, zero = jnp.ones_like(lower), jnp.zeros_like(lower)
        return Lines(
            jnp.where(constant_below, zero, one),
            jnp.where(constant_below, at_lower, below),
            jnp.where(constant_above, zero, one),
            jnp.where(constant_above, at_upper, above),
        )

    return lines


def sign_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of the sign: the image's ends, or through ``(0, 1)`` and ``(lower, -1)``.

    The upper line must be at least 1 at 0+ and at least -1 at the lower end; its least value at the
    middle is that of slope ``-2 / lower`` where the middle is negative, else that of slope 0. The
    lower line is its half turn.
    """
    at_lower, at_upper = node.apply(lower), node.apply(upper)
    around = (lower < 0) & (upper > 0)
    middle = 0.5 * (lower + upper)
    # The quotient's rounding must not make the line too steep.
    two = 2.0 - 8.0 * float(jnp.finfo(lower.dtype).eps)
    rising_above, rising_below = around & (middle < 0), around & (middle > 0)
    return Lines(
        jnp.where(rising_below, two / jnp.where(rising_below, upper, 1.0), 0.0),
        at_lower,
        jnp.where(rising_above, -two / jnp.where(rising_above, lower, 1.0), 0.0),
        at_upper,
    )


def cast_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Constant lines of a predicate as a number: 0, 1 or in between."""
    return Lines(None, node.apply(lower), None, node.apply(upper))


def step_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """0 where the function is constant on the interval, else infinite."""
    flat = node.apply(lower) == node.apply(upper)
    return jnp.where(flat, 0.0, jnp.inf).astype(node.dtype)

"""Piecewise linear functions: hinges, ramps, steps, and their two lines on an interval.

* *hinges* (relu, leaky relu, abs, max and min with a constant) have two straight pieces;
* *ramps* (clip, relu6, hard tanh) are flat, straight, then flat;
* *steps* (sign, floor, a predicate as a number) jump.

Lines follow Zhang et al. 2018 (CROWN). A slope policy places the free slope of a hinge or ramp.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.ir.families import Lines, Position
from boundjax.ir.node import Node
from boundjax.numerics import larger, signed_parts, smaller, with_derivative_of

# A constant operand: a Python float if it is one concrete number.
Number = float | Array

# --- hinges: left * t for t < 0, right * t for t >= 0 ---------------------------------------------


def hinge_lines(
    lower: Array,
    upper: Array,
    left: Number,
    right: Number,
    position: Callable[[Array, Array], Array],
) -> Lines:
    """Lines of `left * min(t, 0) + right * max(t, 0)` on `[lower, upper]`.

    On an interval around 0 one line is the chord through both ends; the other passes through the
    origin with a free slope between `left` and `right`: `left + (right - left) * position`.
    The hinge is convex (chord above) where `right >= left`, else concave (chord below).
    For relu: chord slope `u / (u - l)`, intercept `-l u / (u - l)`.
    """
    on, off = lower >= 0, upper <= 0
    stable = on | off
    stable_slope = jnp.where(on, right, left).astype(lower.dtype)
    width = jnp.where(stable, 1.0, upper - lower)
    fraction = jnp.where(stable, 0.0, upper / width)  # NaN if a bound is NaN
    chord_slope = jnp.where(stable, stable_slope, left + (right - left) * fraction)
    chord_intercept = (left - right) * lower * fraction
    # Factored, so that large ends overflow to an infinity and not to the difference of two.
    at_ends = (left - chord_slope) * lower, (right - chord_slope) * upper
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
    """The intercept with which a chord is above (below) both of its ends.

    The chord's formula is wrong if its slope under- or overflows. `chord` is the intercept by that
    formula, which gives the derivative.
    """
    high, low = jnp.maximum(at_lower, at_upper), jnp.minimum(at_lower, at_upper)
    if isinstance(above, bool):
        intercept = high if above else low
    else:
        intercept = jnp.where(above, high, low)
    return with_derivative_of(intercept, chord)


def shifted(lines: Lines, x: Number, y: Number) -> Lines:
    """Lines of `y + f(t - x)` from the lines of `f`, whose slopes are arrays."""

    def move(slope: Array | None, intercept: Array | None) -> Array:
        assert slope is not None
        value = 0.0 if intercept is None else intercept
        return value + y - slope * x

    return Lines(
        lines.lower_slope,
        move(lines.lower_slope, lines.lower_intercept),
        lines.upper_slope,
        move(lines.upper_slope, lines.upper_intercept),
    )


def number(node: Node, index: int = 0) -> Number:
    """A constant operand, as a Python float if it is one concrete number."""
    constant = node.constants[index]
    if isinstance(constant, Tracer) or np.ndim(constant):
        return jnp.asarray(constant, node.dtype)
    return float(constant)


def monotone_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Image of an increasing function without rounding errors."""
    return node.apply(lower), node.apply(upper)


def constant_slope(slope: float) -> Callable[[Node, Array, Array], Array]:
    """The rule of a Lipschitz constant that is the same on every interval."""
    return lambda node, lower, upper: jnp.full_like(lower, slope)


def at_zero(node: Node) -> tuple[float]:
    """The kink of a function with two pieces that meet at 0."""
    return (0.0,)


def at_constants(node: Node) -> tuple[Number, ...]:
    """The kinks of a function that is cut at its constant operands."""
    return tuple(number(node, index) for index in range(len(node.constants)))


def relu_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of `max(t, 0)`."""
    return hinge_lines(lower, upper, 0.0, 1.0, position)


def abs_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of `|t|`."""
    return hinge_lines(lower, upper, -1.0, 1.0, position)


def abs_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Image of `|t|`."""
    return (
        jax.nn.relu(lower) + jax.nn.relu(-upper),
        larger(jnp.abs(lower), jnp.abs(upper)),
    )


def leaky_slope(node: Node) -> Number:
    """The slope of `jax.nn.leaky_relu`, an operand or the default."""
    return number(node) if node.constants else 0.01


def leaky_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of `t` right of 0 and `slope t` left of it, for any slope."""
    return hinge_lines(lower, upper, leaky_slope(node), 1.0, position)


def leaky_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Image of a leaky relu."""
    # With a negative slope the function decreases left of 0, and its least value may be at 0.
    at_lower, at_upper = node.apply(lower), node.apply(upper)
    around = (lower < 0) & (upper > 0)
    low = smaller(at_lower, at_upper)
    low = jnp.where(around, signed_parts(low)[0], low)
    return low, larger(at_lower, at_upper)


def leaky_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """The slope of the steeper piece."""
    return jnp.broadcast_to(
        jnp.maximum(jnp.abs(jnp.asarray(leaky_slope(node), lower.dtype)), 1.0), lower.shape
    )


def max_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of `max(t, c)`."""
    c = number(node)
    if isinstance(c, float) and c == 0.0:
        return hinge_lines(lower, upper, 0.0, 1.0, position)
    return shifted(hinge_lines(lower - c, upper - c, 0.0, 1.0, position), c, c)


def min_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of `min(t, c)`."""
    c = number(node)

    def mirrored(low: Array, high: Array) -> Array:
        # min(t, 0) = -relu(-t): the policy sees the relu's interval and answers its slope.
        return 1.0 - position(-high, -low)

    return shifted(hinge_lines(lower - c, upper - c, 1.0, 0.0, mirrored), c, c)


# --- ramps: min(max(t, low), high) ----------------------------------------------------------------


def ramp_lines(lower: Array, upper: Array, low: Number, high: Number, position: Position) -> Lines:
    """Lines of `min(max(t, low), high)` with `low <= high` on `[lower, upper]`.

    If the interval reaches past `high`, the upper line passes through `(high, high)` with a free
    slope between 0 and that of the line to the function's value at the left end; otherwise it is
    the chord of the hinge at `low`. The lower line is symmetric. The policy sees the interval
    relative to the kink that a line passes through.
    """
    image_lower, image_upper = jnp.clip(lower, low, high), jnp.clip(upper, low, high)
    # On an interval within one piece the function is linear, and the lines coincide.
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
    """The rule for the lines of a ramp between two Python numbers."""
    return lambda node, lower, upper, position: ramp_lines(lower, upper, low, high, position)


def clip_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of a clip or clamp with constant ends."""
    # Both jnp.clip(x, low, high) and the primitive clamp(low, x, high) have them in this order.
    low, high = (jnp.asarray(c, node.dtype) for c in node.constants)
    low, high = jnp.broadcast_to(low, lower.shape), jnp.broadcast_to(high, lower.shape)
    # jnp.clip gives `high` wherever low > high.
    return ramp_lines(lower, upper, jnp.minimum(low, high), high, position)


# --- steps ----------------------------------------------------------------------------------------


def rounding_lines(below: float, above: float) -> Callable[[Node, Array, Array, Position], Lines]:
    """The rule for the lines of floor, ceil and round, where `x + below <= f(x) <= x + above`.

    Each line is that bound or the constant end of the image, whichever is tighter at the middle.
    """
    return lambda node, lower, upper, position: step_lines(node, lower, upper, below, above)


def step_lines(
    node: Node, lower: Array, upper: Array, below: Array | float, above: Array | float
) -> Lines:
    """Lines of a step function between `x + below` and `x + above`, see `rounding_lines`."""
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


def sign_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """Lines of the sign: constant, or through `(0, 1)` and `(lower, -1)`.

    The upper line must be at least 1 at 0+ and at least -1 at the lower end. It is lowest at the
    middle with slope `-2 / lower` if the middle is negative, else with slope 0. The lower line
    follows by rotation through half a turn.
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
    """Lines of a predicate as a number: the constant ends of its image, 0 or 1."""
    return Lines(None, node.apply(lower), None, node.apply(upper))


def step_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """The Lipschitz constant: 0 where the function is constant on the interval, else infinite."""
    flat = node.apply(lower) == node.apply(upper)
    return jnp.where(flat, 0.0, jnp.inf).astype(node.dtype)

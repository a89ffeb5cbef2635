"""Elementwise ops: the image of an interval and two lines, each activation's facts stated once.

Three shapes cover the table:

* *hinges* (relu, leaky relu, abs, max and min with a constant): two straight pieces;
* *ramps* (clip, relu6, hard tanh): flat, straight, flat;
* *smooth* functions: convex (softplus) or S-shaped (tanh, sigmoid), by tangents and chords.

Lines follow Zhang et al. 2018 (CROWN). Where a line may be chosen, tangents are placed to be
area-optimal (the least value at the middle of the interval), and the free slope of a piecewise
linear op is left to a slope policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from chex import Array, Numeric

from boundjax.ops.registry import Lines, Position, Scalar, register

if TYPE_CHECKING:
    from boundjax.graph import Node

# Rounding of XLA's transcendental functions: up to 4.3 ulp seen for tanh, and not monotone. Images
# and lines of smooth functions are moved outward by this many ulp.
_ULPS = 8.0


# --- hinges: left * t for t < 0, right * t for t >= 0 ---------------------------------------------


def hinge_lines(
    lower: Array, upper: Array, left: Numeric, right: Numeric, position: Position
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
    chord_intercept = jnp.where(stable, 0.0, (left - right) * lower * fraction)
    free_slope = jnp.where(stable, stable_slope, left + (right - left) * position(lower, upper))
    if isinstance(left, float) and isinstance(right, float):
        if right >= left:
            return Lines(free_slope, None, chord_slope, chord_intercept)
        return Lines(chord_slope, chord_intercept, free_slope, None)
    convex = right >= left
    zero = jnp.zeros_like(chord_intercept)
    return Lines(
        jnp.where(convex, free_slope, chord_slope),
        jnp.where(convex, zero, chord_intercept),
        jnp.where(convex, chord_slope, free_slope),
        jnp.where(convex, chord_intercept, zero),
    )


def shifted(lines: Lines, x: Numeric, y: Numeric) -> Lines:
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


def _number(node: Node, index: int = 0) -> Numeric:
    """A constant operand, as a Python float where it is one known number."""
    constant = node.constants[index]
    if isinstance(constant, jax.core.Tracer) or np.ndim(constant):
        return jnp.asarray(constant, node.dtype)
    return float(constant)


def _monotone_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    return node.apply(lower), node.apply(upper)


def _constant_slope(slope: float) -> Callable[[Node, Array, Array], Array]:
    return lambda node, lower, upper: jnp.full_like(lower, slope)


def _relu_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    return hinge_lines(lower, upper, 0.0, 1.0, position)


def _abs_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    return hinge_lines(lower, upper, -1.0, 1.0, position)


def _abs_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    return (
        jax.nn.relu(lower) + jax.nn.relu(-upper),
        jnp.maximum(jnp.abs(lower), jnp.abs(upper)),
    )


def _leaky_slope(node: Node) -> Numeric:
    """jax.nn.leaky_relu's slope, an operand or its default."""
    return _number(node) if node.constants else 0.01


def _leaky_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    return hinge_lines(lower, upper, _leaky_slope(node), 1.0, position)


def _leaky_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    # A negative slope makes the function fall left of 0: its least value is then at 0 or at an end.
    at_lower, at_upper = node.apply(lower), node.apply(upper)
    around = (lower < 0) & (upper > 0)
    low = jnp.minimum(at_lower, at_upper)
    return jnp.where(around, jnp.minimum(low, 0.0), low), jnp.maximum(at_lower, at_upper)


def _leaky_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    return jnp.broadcast_to(
        jnp.maximum(jnp.abs(jnp.asarray(_leaky_slope(node), lower.dtype)), 1.0), lower.shape
    )


def _max_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    c = _number(node)
    if isinstance(c, float) and c == 0.0:
        return hinge_lines(lower, upper, 0.0, 1.0, position)
    return shifted(hinge_lines(lower - c, upper - c, 0.0, 1.0, position), c, c)


def _min_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    c = _number(node)

    def mirrored(low: Array, high: Array) -> Array:
        # min(t, 0) = -relu(-t): the policy sees the relu's interval, and its slope left of 0 is 1.
        return 1.0 - position(-high, -low)

    return shifted(hinge_lines(lower - c, upper - c, 1.0, 0.0, mirrored), c, c)


# --- ramps: min(max(t, low), high) ----------------------------------------------------------------


def ramp_lines(
    lower: Array, upper: Array, low: Numeric, high: Numeric, position: Position
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

    to_high = jnp.where(single | ~past_high, 1.0, high - lower)
    steepest_upper = (high - image_lower) / to_high
    upper_free = steepest_upper * position(high - upper, high - lower)
    upper_slope = jnp.where(past_high, upper_free, chord)
    upper_intercept = jnp.where(past_high, high - upper_free * high, image_lower - chord * lower)

    from_low = jnp.where(single | ~past_low, 1.0, upper - low)
    steepest_lower = (image_upper - low) / from_low
    lower_free = steepest_lower * position(lower - low, upper - low)
    lower_slope = jnp.where(past_low, lower_free, chord)
    lower_intercept = jnp.where(past_low, low - lower_free * low, image_upper - chord * upper)

    return Lines(
        jnp.where(single, slope_single, lower_slope),
        jnp.where(single, intercept_single, lower_intercept),
        jnp.where(single, slope_single, upper_slope),
        jnp.where(single, intercept_single, upper_intercept),
    )


def _ramp(low: float, high: float) -> Callable[[Node, Array, Array, Position], Lines]:
    return lambda node, lower, upper, position: ramp_lines(lower, upper, low, high, position)


def _clip_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    low, high = (jnp.asarray(c, node.dtype) for c in _clip_ends(node))
    low, high = jnp.broadcast_to(low, lower.shape), jnp.broadcast_to(high, lower.shape)
    # jnp.clip gives `high` wherever low > high.
    return ramp_lines(lower, upper, jnp.minimum(low, high), high, position)


def _clip_ends(node: Node) -> tuple[Array, Array]:
    # jnp.clip(x, low, high); the primitive is clamp(low, x, high).
    return node.constants[0], node.constants[1]


# --- smooth functions -----------------------------------------------------------------------------

Function = Callable[[Array], Array]


def _outward(lines: Lines, size: Array) -> Lines:
    """Moves lines outward by the rounding of values of magnitude ``size``."""
    slack = _ULPS * jnp.finfo(size.dtype).eps * jax.lax.stop_gradient(size)
    return Lines(
        lines.lower_slope,
        lines.lower_intercept - slack,
        lines.upper_slope,
        lines.upper_intercept + slack,
    )


def _derivative(function: Function, x: Array) -> Array:
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


def _tangent(function: Function, x: Array) -> tuple[Array, Array]:
    value, slope = jax.jvp(function, (x,), (jnp.ones_like(x),))
    return slope, value - slope * x


def _chord(function: Function, lower: Array, upper: Array) -> tuple[Array, Array]:
    """A line above a function that is convex on ``[lower, upper]``, close to its chord.

    Any slope serves with the larger of the two ends' intercepts; so rounding of a difference
    quotient on a narrow interval can loosen the line, never make it wrong.
    """
    at_lower, at_upper = function(lower), function(upper)
    width = upper - lower
    narrow = width <= 1e-4 * (1.0 + jnp.abs(lower))
    quotient = (at_upper - at_lower) / jnp.where(narrow, 1.0, width)
    slope = jnp.where(narrow, _derivative(function, 0.5 * (lower + upper)), quotient)
    return slope, jnp.maximum(at_lower - slope * lower, at_upper - slope * upper)


def convex_lines(function: Function, lower: Array, upper: Array) -> Lines:
    """Chord above, tangent at the middle (area-optimal) below, for a convex smooth function."""
    upper_slope, upper_intercept = _chord(function, lower, upper)
    lower_slope, lower_intercept = _tangent(function, 0.5 * (lower + upper))
    size = jnp.abs(function(upper)) + jnp.abs(function(lower))
    size = size + (jnp.abs(lower_slope) + jnp.abs(upper_slope)) * (jnp.abs(lower) + jnp.abs(upper))
    return _outward(Lines(lower_slope, lower_intercept, upper_slope, upper_intercept), size)


def _touching_point(function: Function, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Where the tangent of an S-shaped function passes through ``(lower, f(lower))``.

    For ``lower < 0 < upper``, convex left of 0 and concave right of it: the least ``d`` in
    ``(0, upper]`` whose tangent lies above the function at ``lower``, by bisection, and whether
    there is one. The bracket's upper end is returned, where the condition holds. The derivative of
    ``d`` in ``lower`` comes from one Newton step whose value is cancelled (implicit
    differentiation).
    """

    def excess(d: Array, low: Array) -> Array:
        value, slope = jax.jvp(function, (d,), (jnp.ones_like(d),))
        return value + slope * (low - d) - function(low)

    fixed_lower, fixed_upper = jax.lax.stop_gradient((lower, upper))

    def step(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        valid = excess(middle, fixed_lower) >= 0
        return jnp.where(valid, below, middle), jnp.where(valid, middle, above)

    start = (jnp.zeros_like(fixed_upper), jnp.maximum(fixed_upper, 0.0))
    # 40 halvings reach the last digit of float32 on any interval that is not astronomically wide.
    _, point = jax.lax.fori_loop(0, 40, step, start)
    value = excess(point, lower)
    slope = jax.lax.stop_gradient(_derivative(lambda d: excess(d, lower), point))
    newton = -value / jnp.where(jnp.abs(slope) > 1e-12, slope, jnp.inf)
    inside = (fixed_lower < 0) & (fixed_upper > 0) & (point < fixed_upper)
    exists = excess(fixed_upper, fixed_lower) >= 0
    return point + jnp.where(inside, newton - jax.lax.stop_gradient(newton), 0.0), exists


def _s_shaped_upper(function: Function, lower: Array, upper: Array) -> tuple[Array, Array]:
    middle = 0.5 * (lower + upper)
    mixed = (lower < 0) & (upper > 0)
    touching, exists = _touching_point(function, lower, upper)
    # On the concave side, and past the touching point, the tangent nearest the middle is the best.
    slope, intercept = _tangent(function, jnp.where(mixed, jnp.maximum(touching, middle), middle))
    # The chord is above on the convex side, and where no tangent reaches over the left end.
    by_chord = (upper <= 0) | (mixed & ~exists)
    chord_slope, chord_intercept = _chord(function, lower, upper)
    return jnp.where(by_chord, chord_slope, slope), jnp.where(by_chord, chord_intercept, intercept)


def s_shaped_lines(function: Function, lower: Array, upper: Array) -> Lines:
    """Lines of a smooth function that is convex left of 0, concave right of it, and increasing."""
    upper_slope, upper_intercept = _s_shaped_upper(function, lower, upper)
    # Below: turn the function by half a turn about the origin, x -> -f(-x), which is S-shaped too.
    turned_slope, turned_intercept = _s_shaped_upper(lambda x: -function(-x), -upper, -lower)
    lines = Lines(turned_slope, -turned_intercept, upper_slope, upper_intercept)
    size = jnp.abs(function(lower)) + jnp.abs(function(upper))
    size = size + (jnp.abs(turned_slope) + jnp.abs(upper_slope)) * (jnp.abs(lower) + jnp.abs(upper))
    return _outward(lines, size)


def _smooth_image(low: float, high: float) -> Callable[[Node, Array, Array], tuple[Array, Array]]:
    """Image of an increasing smooth function with values in ``[low, high]``, moved outward."""

    def image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        at_lower, at_upper = node.apply(lower), node.apply(upper)
        step = _ULPS * jnp.finfo(lower.dtype).eps
        return (
            jnp.clip(at_lower - step * jnp.abs(at_lower), low, high),
            jnp.clip(at_upper + step * jnp.abs(at_upper), low, high),
        )

    return image


def _smooth_lines(shape: Callable[..., Lines]) -> Callable[[Node, Array, Array, Position], Lines]:
    return lambda node, lower, upper, position: shape(node.apply, lower, upper)


def _bell_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    """The derivative of an S-shaped function is largest at the point nearest 0."""
    return _derivative(node.apply, jnp.clip(jnp.zeros_like(lower), lower, upper))


def _convex_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    return jnp.maximum(
        jnp.abs(_derivative(node.apply, lower)), jnp.abs(_derivative(node.apply, upper))
    )


# --- the table ------------------------------------------------------------------------------------


def _one_constant(node: Node) -> bool:
    return len(node.inputs) == 1


def _constant_slope_operand(node: Node) -> bool:
    return len(node.inputs) == 1 and node.perturbed[0]


_increasing = functools.partial(Scalar, image=_monotone_image, lipschitz=_constant_slope(1.0))

register(_increasing(name="relu", note="gradient 0 at 0", lines=_relu_lines))
register(
    Scalar(
        name="leaky_relu",
        note="any slope, also above 1 and negative",
        accepts=_constant_slope_operand,
        image=_leaky_image,
        lines=_leaky_lines,
        lipschitz=_leaky_lipschitz,
    )
)
register(Scalar(name="abs", image=_abs_image, lines=_abs_lines, lipschitz=_constant_slope(1.0)))
register(_increasing(name="max", note="with a constant", accepts=_one_constant, lines=_max_lines))
register(_increasing(name="min", note="with a constant", accepts=_one_constant, lines=_min_lines))
register(_increasing(name="relu6", lines=_ramp(0.0, 6.0)))
register(_increasing(name="hard_tanh", lines=_ramp(-1.0, 1.0)))
register(
    _increasing(
        name="clip",
        note="jnp.clip with constant ends",
        accepts=lambda node: len(node.constants) == 2 and node.perturbed[0],
        lines=_clip_lines,
    )
)
register(
    _increasing(
        name="clamp",
        note="lax.clamp with constant ends",
        accepts=lambda node: len(node.constants) == 2 and node.perturbed[1],
        lines=_clip_lines,
    )
)
for _name, _low in (("tanh", -1.0), ("logistic", 0.0)):
    register(
        Scalar(
            name=_name,
            note="sigmoid" if _name == "logistic" else "",
            image=_smooth_image(_low, 1.0),
            lines=_smooth_lines(s_shaped_lines),
            lipschitz=_bell_lipschitz,
        )
    )
register(
    Scalar(
        name="softplus",
        image=_smooth_image(0.0, float("inf")),
        lines=_smooth_lines(convex_lines),
        lipschitz=_convex_lipschitz,
    )
)

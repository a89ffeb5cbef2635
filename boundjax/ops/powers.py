"""Powers, sine and cosine, whose bends depend on an exponent or on the interval."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ops import domain, piecewise, smooth
from boundjax.ops.smooth import Curve

_INFINITY = float("inf")


def integer_curve(node: Node) -> Curve:
    """`x ** y` for a positive integer `y`: convex, or concave and convex around 0."""
    y = node.params["y"]
    rounding = functools.partial(_product_rounding, node)
    if y == 1:
        return Curve(curvatures=(1,))
    if y % 2 == 0:
        return Curve(curvatures=(1,), stationary=(0.0,), monotone=0, low=0.0, rounding=rounding)
    return Curve(breakpoints=(0.0,), curvatures=(-1, 1), rounding=rounding)


def _product_rounding(node: Node, x: Array) -> Array:
    """A product of `|y|` factors rounds `|y| - 1` times, by half an ulp each."""
    return max(0.0, abs(node.params["y"]) / 16.0 - 1.0) * jnp.abs(node.apply(x))


def real_curve(node: Node) -> Curve:
    """`x ** y` on `x >= 0` for any constant `y`."""
    y = piecewise.number(node)

    def rounding(x: Array) -> Array:
        # XLA computes x ** y as exp(y log x), whose exponent is rounded.
        positive = jnp.where(x > 0, x, 1.0)
        return jnp.abs(node.apply(positive) * y * jnp.log(positive)) / 8.0

    if isinstance(y, float):
        bend = 1 if y >= 1 or y <= 0 else -1
        return Curve(
            curvatures=(bend,),
            monotone=1 if y >= 0 else -1,
            low=0.0,
            rounding=rounding,
            least=0.0,
            at_least=0.0 if y > 0 else _INFINITY if y < 0 else 1.0,
        )
    at_least = jnp.where(y > 0, 0.0, jnp.where(y < 0, _INFINITY, 1.0))
    return Curve(
        curvatures=(jnp.sign(y * (y - 1.0)),),
        monotone=0,
        low=0.0,
        rounding=rounding,
        least=0.0,
        at_least=at_least,
    )


# --- negative integer powers: defined on both sides of 0 ------------------------------------------


def _around_zero(lower: Array, upper: Array) -> Array:
    return (lower <= 0) & (upper >= 0)


def _negative_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    y = node.params["y"]
    around = _around_zero(lower, upper)
    curve = Curve(
        curvatures=(1,),
        monotone=0,
        low=0.0 if y % 2 == 0 else -_INFINITY,
        rounding=functools.partial(_product_rounding, node),
    )
    ends = (jnp.where(around, 1.0, lower), jnp.where(around, 1.0, upper))
    low, high = smooth.image(node.apply, curve, *ends)
    return jnp.where(around, -_INFINITY, low), jnp.where(around, _INFINITY, high)


def _warned_negative_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    domain.warn(node, _around_zero(lower, upper), "contain 0, where it divides by 0")
    return _negative_image(node, lower, upper)


def _negative_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """The lines on the positive side, where the function is convex, mirrored for the other side."""
    odd = node.params["y"] % 2 == 1
    negative = upper < 0
    low, high = _negative_image(node, lower, upper)
    if odd:
        ends = (jnp.where(negative, -high, low), jnp.where(negative, -low, high))
    else:
        ends = (low, high)
    curve = Curve(curvatures=(1,), monotone=-1, rounding=functools.partial(_product_rounding, node))
    detached = functools.partial(node.apply, constants=jax.lax.stop_gradient)

    def position_in_interval(_: Array, __: Array, default: Array | None = None) -> Array:
        # Pass the node's interval, although the line belongs to the mirrored one.
        return position(lower, upper, default=default)

    below, above = smooth.both_lines(
        node.apply,
        curve,
        jnp.where(negative, -upper, lower),
        jnp.where(negative, -lower, upper),
        position_in_interval,
        ends,
        detached,
    )
    (lower_slope, lower_intercept), (upper_slope, upper_intercept) = below, above
    if not odd:
        # f(x) = f(-x): only the slopes change sign.
        return Lines(
            jnp.where(negative, -lower_slope, lower_slope),
            lower_intercept,
            jnp.where(negative, -upper_slope, upper_slope),
            upper_intercept,
        )
    # f(x) = -f(-x): the lines change places.
    return Lines(
        jnp.where(negative, upper_slope, lower_slope),
        jnp.where(negative, -upper_intercept, lower_intercept),
        jnp.where(negative, lower_slope, upper_slope),
        jnp.where(negative, -lower_intercept, upper_intercept),
    )


def _negative_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    constant = smooth.lipschitz(node.apply, Curve(curvatures=(1,)), lower, upper)
    return jnp.where(_around_zero(lower, upper), _INFINITY, constant)


RECIPROCAL = Scalar(
    name="integer_pow",
    note="negative exponents, of values that are never 0",
    accepts=lambda node: node.params["y"] < 0,
    image=_warned_negative_image,
    lines=_negative_lines,
    lipschitz=_negative_lipschitz,
    partial=True,
)


# --- sine and cosine ------------------------------------------------------------------------------

_PERIOD = 2.0 * math.pi
# Farther from 0, neighbouring float32 numbers are too far apart to locate the bends.
_LARGEST = 1e4


def sinusoid(name: str, rise: float) -> Scalar:
    """The entry of sine or cosine.

    The lines need only the bends within two periods of the interval's lower end: on longer
    intervals the envelopes are 1 and -1 at the middle. Far from 0, where floating-point numbers are
    too far apart to locate the bends, the lines and the image are constant as well.

    Args:
      name: the primitive's.
      rise: a zero at which the function increases; it is concave for half a period to the right.
    """

    def near_ends(lower: Array, upper: Array) -> tuple[Array, Array, Array]:
        """Where the bends of an interval count, and its ends there, else zeros."""
        near = (jnp.abs(lower) < _LARGEST) & (jnp.abs(upper) < _LARGEST)
        near = near & (upper - lower < 2.0 * _PERIOD)
        return near, jnp.where(near, lower, 0.0), jnp.where(near, upper, 0.0)

    def contains(point: float, lower: Array, upper: Array) -> Array:
        """Whether a point of this phase lies in the interval, or outside it by rounding only."""
        tolerance = 1e-3 if lower.dtype == jnp.float32 else 1e-8
        turns = jnp.ceil((lower - (point + tolerance)) / _PERIOD)
        return point + _PERIOD * turns <= upper + tolerance

    def image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        near, safe_lower, safe_upper = near_ends(lower, upper)
        curve = Curve(curvatures=(1,), monotone=0, low=-1.0, high=1.0, rounding=jnp.ones_like)
        low, high = smooth.image(node.apply, curve, safe_lower, safe_upper)
        peak = contains(rise + 0.25 * _PERIOD, safe_lower, safe_upper)
        trough = contains(rise - 0.25 * _PERIOD, safe_lower, safe_upper)
        unknown = jnp.isnan(lower) | jnp.isnan(upper)
        low = jnp.where(near & ~trough, low, -1.0)
        high = jnp.where(near & ~peak, high, 1.0)
        return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)

    def bends(lower: Array) -> Curve:
        first = rise + _PERIOD * jnp.floor((jax.lax.stop_gradient(lower) - rise) / _PERIOD)
        points = tuple(first + 0.5 * _PERIOD * k for k in range(6))
        # The interval begins right of the first piece.
        return Curve(
            breakpoints=points,
            curvatures=(0, -1, 1, -1, 1, -1, 1),
            rounding=jnp.ones_like,
        )

    def lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
        near, safe_lower, safe_upper = near_ends(lower, upper)
        low, high = image(node, lower, upper)
        (lower_slope, lower_intercept), (upper_slope, upper_intercept) = smooth.both_lines(
            node.apply, bends(safe_lower), safe_lower, safe_upper, position, (low, high)
        )
        return Lines(
            jnp.where(near, lower_slope, 0.0),
            jnp.where(near, lower_intercept, low),
            jnp.where(near, upper_slope, 0.0),
            jnp.where(near, upper_intercept, high),
        )

    def lipschitz(node: Node, lower: Array, upper: Array) -> Array:
        near, safe_lower, safe_upper = near_ends(lower, upper)
        constant = smooth.lipschitz(node.apply, bends(safe_lower), safe_lower, safe_upper)
        constant = jnp.where(near, constant, 1.0)
        return jnp.where(jnp.isnan(lower) | jnp.isnan(upper), jnp.nan, constant)

    return Scalar(name=name, image=image, lines=lines, lipschitz=lipschitz)

"""Tangent, inverse functions with a bounded domain, sinc, and `x log x`."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.families import Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, smaller
from boundjax.ops import domain, smooth
from boundjax.ops.smooth import Curve

_INFINITY = float("inf")

# --- inverse functions ----------------------------------------------------------------------------

_HALF_TURN = 0.5 * math.pi
# Around 0 the quotient in `acos` cancels, so its error is relative to 1.
_CURVES: dict[str, Curve] = {
    "asin": Curve(
        breakpoints=(0.0,),
        curvatures=(-1, 1),
        least=-1.0,
        at_least=-_HALF_TURN,
        most=1.0,
        at_most=_HALF_TURN,
    ),
    "acos": Curve(
        breakpoints=(0.0,),
        curvatures=(1, -1),
        monotone=-1,
        rounding=jnp.ones_like,
        least=-1.0,
        at_least=math.pi,
        most=1.0,
        at_most=0.0,
    ),
    "atanh": Curve(
        breakpoints=(0.0,),
        curvatures=(-1, 1),
        least=-1.0,
        at_least=-_INFINITY,
        most=1.0,
        at_most=_INFINITY,
    ),
    "acosh": Curve(curvatures=(-1,), low=0.0, least=1.0, at_least=0.0, rounding=jnp.ones_like),
}

for _name, _curve in _CURVES.items():
    register(smooth.entry(_name, _curve, note=f"of values {_curve.domain}"))


# --- tangent --------------------------------------------------------------------------------------

# Farther from 0, neighbouring float32 numbers are too far apart to locate the poles.
_LARGEST = 1e3


def _tan_parts(lower: Array, upper: Array) -> tuple[Array, Array, Array]:
    """Where an interval may hold a pole; elsewhere its ends, and 0 where it does."""
    with_pole = ~(jnp.maximum(jnp.abs(lower), jnp.abs(upper)) < _LARGEST)
    tolerance = 8.0 * float(jnp.finfo(lower.dtype).eps) * (2.0 + jnp.abs(lower) + jnp.abs(upper))
    first = math.pi * jnp.ceil((lower - tolerance) / math.pi - 0.5) + 0.5 * math.pi
    with_pole = with_pole | (first <= upper + tolerance)
    return with_pole, jnp.where(with_pole, 0.0, lower), jnp.where(with_pole, 0.0, upper)


_TAN = Curve(breakpoints=(0.0,), curvatures=(-1, 1))


def _tan_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    with_pole, safe_lower, safe_upper = _tan_parts(lower, upper)
    low, high = smooth.image(node.apply, _TAN, safe_lower, safe_upper)
    unknown = jnp.isnan(lower) | jnp.isnan(upper)
    low = jnp.where(with_pole, -_INFINITY, low)
    high = jnp.where(with_pole, _INFINITY, high)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _warned_tan_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    reason = f"may contain a pole, an odd multiple of pi / 2, or reach {_LARGEST:g}"
    domain.warn(node, _tan_parts(lower, upper)[0], reason)
    return _tan_image(node, lower, upper)


def _tan_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    with_pole, safe_lower, safe_upper = _tan_parts(lower, upper)
    safe = safe_lower, safe_upper
    low, high = _tan_image(node, lower, upper)
    bend = math.pi * jnp.round(0.5 * (safe[0] + safe[1]) / math.pi)
    curve = Curve(breakpoints=(jax.lax.stop_gradient(bend),), curvatures=(-1, 1))
    ends = (jnp.where(with_pole, 0.0, low), jnp.where(with_pole, 0.0, high))
    (below, down), (above, up) = smooth.both_lines(node.apply, curve, *safe, position, ends)
    return Lines(
        jnp.where(with_pole, 0.0, below),
        jnp.where(with_pole, low, down),
        jnp.where(with_pole, 0.0, above),
        jnp.where(with_pole, high, up),
    )


def _tan_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    with_pole, safe_lower, safe_upper = _tan_parts(lower, upper)
    constant = smooth.lipschitz(node.apply, _TAN, safe_lower, safe_upper)
    return jnp.where(with_pole, _INFINITY, constant)


register(
    Scalar(
        name="tan",
        note="between two poles",
        image=_warned_tan_image,
        lines=_tan_lines,
        lipschitz=_tan_lipschitz,
        partial=True,
    )
)


# --- sinc -----------------------------------------------------------------------------------------


class _Bends(NamedTuple):
    """The extrema and inflection points of `sin(pi x) / (pi x)` up to `_FAR`, ascending."""

    extrema: np.ndarray
    values: np.ndarray
    inflections: np.ndarray


# Beyond this distance from 0 the function is bounded by `1 / (pi |x|)` alone.
_FAR = 32
# The lines know this many bends from the lower end on; longer intervals have constant lines.
_NEAREST = 6


def _roots(count: int, second: bool) -> np.ndarray:
    """Positive zeros of the first (or second) derivative of `sin(u) / u`, by bisection."""

    def derivative(u: np.ndarray) -> np.ndarray:
        if second:
            return (2.0 - u * u) * np.sin(u) - 2.0 * u * np.cos(u)
        return u * np.cos(u) - np.sin(u)

    # There is one zero in each of the intervals between multiples of pi, but none in the first of
    # them for the first derivative.
    low = math.pi * np.arange(0 if second else 1, count) + 1e-3
    high = low + math.pi - 2e-3
    rises = derivative(low) < 0
    for _ in range(100):
        middle = 0.5 * (low + high)
        right = (derivative(middle) < 0) == rises
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    return 0.5 * (low + high)


@functools.cache
def _sinc_bends() -> _Bends:
    first, second = _roots(_FAR, False), _roots(_FAR, True)
    extrema = np.concatenate([-first[::-1], [0.0], first])
    return _Bends(
        extrema / math.pi,
        np.sinc(extrema / math.pi),
        np.concatenate([-second[::-1], second]) / math.pi,
    )


def _sinc_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    bends = _sinc_bends()
    curve = Curve(curvatures=(1,), monotone=0, low=-0.25, high=1.0, rounding=jnp.ones_like)
    low, high = smooth.image(node.apply, curve, lower, upper)
    # The largest extremum is the nearest to 0. To be outside needs more than a rounding.
    slack = 1e-5 if lower.dtype == jnp.float32 else 1e-12
    for sign in (1.0, -1.0):
        of_sign = sign * bends.values > 0
        shape = (*[1] * lower.ndim, -1)
        points = jnp.asarray(bends.extrema[of_sign], lower.dtype).reshape(shape)
        values = jnp.asarray(bends.values[of_sign] * (1.0 + 1e-6), lower.dtype).reshape(shape)
        at = (points >= lower[..., None] - slack) & (points <= upper[..., None] + slack)
        best = jnp.max(jnp.where(at, sign * values, -1.0), axis=-1)
        if sign > 0:
            high = jnp.minimum(larger(high, best), 1.0)
        else:
            low = smaller(low, -best)
    # Infinite ends, at which the computed value is NaN, and everything beyond the table.
    distance = jnp.maximum(jnp.maximum(lower, -upper), 0.0)
    beyond = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) >= _FAR - 1.0
    rest = 1.01 / (math.pi * jnp.maximum(distance, 0.25))
    rest_low = jnp.minimum(rest, jnp.where(distance < 1.0, 0.2173, rest))
    low = jnp.where(beyond, -rest_low, low)
    high = jnp.where(beyond, jnp.minimum(rest, 1.0), high)
    unknown = jnp.isnan(lower) | jnp.isnan(upper)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _sinc_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    points = _sinc_bends().inflections
    low, high = _sinc_image(node, lower, upper)
    near = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) < _FAR - 2.0
    near = near & (upper - lower < _NEAREST - 2.0)
    safe = (jnp.where(near, lower, 0.0), jnp.where(near, upper, 0.0))
    first = jnp.searchsorted(jnp.asarray(points, lower.dtype), jax.lax.stop_gradient(safe[0]))
    first = jnp.maximum(first - 1, 0)
    table = jnp.asarray(points, lower.dtype)
    bends = tuple(table[first + k] for k in range(_NEAREST))
    # Right of the last inflection point below 0, around the peak, the function is concave.
    peak = int(np.searchsorted(points, 0.0))
    sign = jnp.where((first - peak) % 2 == 0, -1, 1)
    curve = Curve(
        breakpoints=bends,
        curvatures=tuple(sign if k % 2 == 0 else -sign for k in range(_NEAREST + 1)),
        rounding=jnp.ones_like,
    )
    (below, down), (above, up) = smooth.both_lines(node.apply, curve, *safe, position, (low, high))
    return Lines(
        jnp.where(near, below, 0.0),
        jnp.where(near, down, low),
        jnp.where(near, above, 0.0),
        jnp.where(near, up, high),
    )


def _sinc_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    # The largest slope, at the first inflection point, is 1.3705.
    unknown = jnp.isnan(lower) | jnp.isnan(upper)
    return jnp.where(unknown, jnp.nan, jnp.full_like(lower, 1.371))


register(
    Scalar(
        name="sinc",
        note="jnp.sinc",
        traced_as=jnp.sinc,
        image=_sinc_image,
        lines=_sinc_lines,
        lipschitz=_sinc_lipschitz,
        monotone=False,
    )
)


# --- entropy --------------------------------------------------------------------------------------


def x_log_x(x: Array) -> Array:
    """`x log x`, and 0 at 0."""
    positive = x > 0
    value = x * jnp.log(jnp.where(positive, x, 1.0))
    return jnp.where(positive | (x == 0), value, jnp.nan)


register(
    smooth.entry(
        "x_log_x",
        Curve(
            curvatures=(1,),
            stationary=(math.exp(-1.0),),
            monotone=0,
            low=-math.exp(-1.0) * (1.0 + 1e-6),
            rounding=jnp.abs,
            kinks=((0.0, _INFINITY),),
            least=0.0,
            at_least=0.0,
        ),
        note="xlogy(x, x), entr; 0 at 0",
    )
)

"""The line above an elementwise function that touches its concave envelope at a given point.

1. *Slope.* The envelope touches ``f`` at ``at`` (the line is the tangent) or is a chord from
   ``p <= at`` to ``q >= at``, each an end of the interval, a kink or a point of tangency. ``p`` and
   ``q`` are found in turn, each as the point where the line through the other is steepest, by
   bisection in every concave piece.
2. *Intercept.* For whatever slope ``s`` comes out: a proven upper bound on ``f(x) - s x``, from its
   values at the ends and bends and, in a concave piece, from two tangents next to its maximum. So
   a bad slope can loosen a line and never falsify it.
3. The intercept is moved outward by the rounding of what it was computed from.

The search is not differentiated: at a point of tangency the slope does not change with that point
to first order (envelope theorem), so that the derivative of the final expressions is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from boundjax.numerics import with_derivative_of

Function = Callable[[Array], Array]

# Rounding of XLA's transcendental functions: up to 4.3 ulp seen for tanh, and not monotone. Images
# and lines of smooth functions are moved outward by this many ulp.
ULPS = 8.0
# What is left of a bracket after that many halvings changes a line to second order only: by about
# the rounding of a float64.
_HALVINGS = 24


class Pieces(NamedTuple):
    """The concave pieces of a function, and its bends.

    Attributes:
      start, end: ``[P, *shape]`` of the concave pieces, possibly infinite.
      concave: ``[P, *shape]``, False where a piece turns out not to be concave.
      bends: ``[B, *shape]``.
      shape: ``"convex"``, ``"concave"``, ``"left"`` or ``"right"`` (of two pieces the one that is
        concave), ``"mixed"``.
      rounds: how often the two ends of a chord are found in turn: twice where one of them is an
        end of the interval for certain; else the error is squared every time.
    """

    start: Array
    end: Array
    concave: Array
    bends: Array
    shape: str
    rounds: int

    @property
    def convex(self) -> bool:
        """Whether there is no concave piece, and no kink to look for one at."""
        return self.shape == "convex"

    @classmethod
    def of(
        cls,
        breakpoints: tuple[ArrayLike, ...],
        curvatures: tuple[int | Array, ...],
        like: Array,
    ) -> Pieces:
        """From the bends and the pieces' curvatures, see ``smooth.Curve``."""
        signs = curvatures
        known = all(isinstance(c, int) for c in signs)
        chosen = [k for k, c in enumerate(signs) if not isinstance(c, int) or c < 0]
        shape = "mixed"
        if known and len(signs) == 1:
            shape = "concave" if chosen else "convex"
        elif known and sorted(signs) == [-1, 1]:
            shape = "left" if signs[0] < 0 else "right"

        def stack(values: list[ArrayLike]) -> Array:
            full = [jnp.broadcast_to(jnp.asarray(v, like.dtype), like.shape) for v in values]
            stacked = jnp.stack(full) if full else jnp.zeros((0, *like.shape), like.dtype)
            return jax.lax.stop_gradient(stacked)

        points = (-jnp.inf, *breakpoints, jnp.inf)
        concave = [signs[k] < 0 if not isinstance(signs[k], int) else True for k in chosen]
        masks = [jnp.broadcast_to(jnp.asarray(c), like.shape) for c in concave]
        # A bend that no concave piece ends at may be a kink, and then the end of a chord.
        kinks = [k for k in range(1, len(signs)) if k not in chosen and k - 1 not in chosen]
        return cls(
            stack([points[k] for k in chosen]),
            stack([points[k + 1] for k in chosen]),
            jnp.stack(masks) if masks else jnp.zeros((0, *like.shape), bool),
            stack(list(breakpoints)),
            shape,
            2 if len(chosen) + len(kinks) <= 1 else 3,
        )

    def interior(self) -> tuple[Array, Array]:
        """The concave pieces without the last digits beside their ends.

        At a kink the derivative would be that of the other side.
        """
        tiny = 4.0 * float(jnp.finfo(self.start.dtype).eps)

        def margin(point: Array) -> Array:
            return jnp.where(jnp.isinf(point), 0.0, tiny * jnp.maximum(jnp.abs(point), 1e-3))

        return self.start + margin(self.start), self.end - margin(self.end)


def value_and_slope(function: Function, x: Array) -> tuple[Array, Array]:
    """``f(x)`` and ``f'(x)``, elementwise."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def slope_of(function: Function, x: Array) -> Array:
    """``f'(x)``, elementwise."""
    return value_and_slope(function, x)[1]


def _bisect(
    moves_up: Callable[[Array], Array], low: Array, high: Array, halvings: int | Array
) -> tuple[Array, Array]:
    """A bracket of the point up to which ``moves_up`` holds."""

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        up = moves_up(middle)
        return jnp.where(up, middle, below), jnp.where(up, above, middle)

    return jax.lax.fori_loop(0, halvings, halve, (low, high))


def line_above(
    function: Function,
    detached: Function,
    pieces: Pieces,
    lower: Array,
    upper: Array,
    at: Array | None,
    rounding: Array,
) -> tuple[Array, Array]:
    """Slope and intercept of the line above a function, optimal at ``at`` (None: a chord)."""
    ends = jax.lax.stop_gradient((lower, upper))
    at_ends = [detached(end) for end in ends]
    largest = jnp.maximum(*(jnp.abs(value) for value in at_ends))
    if pieces.shape == "concave":
        value, slope = value_and_slope(function, at)
        intercept, largest = value - slope * at, jnp.abs(value)
    else:
        p, q, middle = lower, upper, 0.5 * (lower + upper)
        if not pieces.convex:
            fixed, middle = jnp.clip(jax.lax.stop_gradient(at), *ends), at
            left, right, touching = _supports(detached, pieces, *ends, fixed)
            # The ends of the interval move, points of tangency and kinks do not.
            p, q = (
                jnp.where(left == ends[0], lower, left),
                jnp.where(right == ends[1], upper, right),
            )
        slope = _secant(function, p, q, middle, lower, upper, largest)
        fixed = jax.lax.stop_gradient(slope)
        bounds = [value - fixed * end for value, end in zip(at_ends, ends, strict=True)]
        if not pieces.convex:
            inside, sizes = _above_inside(detached, pieces, *ends, fixed, touching)
            bounds, largest = bounds + inside, functools.reduce(jnp.maximum, sizes, largest)
        # The line touches at p, at q and between them: which of these values is the largest is a
        # matter of rounding, their derivatives are the same.
        intercept = functools.reduce(jnp.maximum, bounds)
        intercept = with_derivative_of(intercept, function(p) - slope * p)
    info, distance = jnp.finfo(lower.dtype), jnp.abs(lower) + jnp.abs(upper)
    size = largest + jnp.abs(slope) * distance + rounding
    # Values and slopes below the smallest normal number may come out as 0.
    slack = ULPS * (float(info.eps) * size + float(info.tiny) * (1.0 + distance))
    return slope, intercept + jax.lax.stop_gradient(slack)


def _secant(
    function: Function, p: Array, q: Array, at: Array, lower: Array, upper: Array, largest: Array
) -> Array:
    """The slope of the chord from ``p`` to ``q``, or of the tangent at ``at`` if they are close.

    Close means that rounding would spoil the quotient's derivative, or that the search may have
    meant one point.
    """
    scale = jnp.abs(lower) + jnp.abs(upper) + jnp.minimum(1.0, jnp.sqrt(largest))
    share = max(float(jnp.finfo(p.dtype).eps) ** 0.5, 2.0 ** (4 - _HALVINGS))
    least = share * jax.lax.stop_gradient(scale)
    close = ~(q - p > least)
    quotient = (function(q) - function(p)) / jnp.where(close, 1.0, q - p)
    tangent = slope_of(function, jnp.where(close, at, jax.lax.stop_gradient(q)))
    return jnp.where(close, tangent, quotient)


def _supports(
    function: Function, pieces: Pieces, lower: Array, upper: Array, at: Array
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """The points ``p <= at <= q`` where the envelope's line at ``at`` touches the function.

    With them a bracket ``[P, *shape]`` of the point of tangency, where there can be only one.
    """
    if pieces.shape in ("left", "right"):
        # With one concave piece the other point is an end, unless both are `at` itself.
        if pieces.shape == "right":
            far, bracket = _steepest(function, pieces, lower, at, upper, 1)
            touches = (at > pieces.start[0]) & _tangent_above(function, at, lower)
            p, q = lower, far
        else:
            far, bracket = _steepest(function, pieces, upper, lower, at, -1)
            touches = (at < pieces.end[0]) & _tangent_above(function, at, upper)
            p, q = far, upper
        below, above = (jnp.where(touches[None], at[None], end) for end in bracket)
        return jnp.where(touches, at, p), jnp.where(touches, at, q), (below, above)

    def turn(k: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        # Each turn starts from the error of the one before; early ones need not be exact.
        halvings = _HALVINGS // pieces.rounds * (k + 1)
        q, _ = _steepest(function, pieces, pair[0], at, upper, 1, halvings)
        p, _ = _steepest(function, pieces, q, lower, at, -1, halvings)
        return p, q

    return *jax.lax.fori_loop(0, pieces.rounds, turn, (lower, upper)), None


def _tangent_above(function: Function, at: Array, end: Array) -> Array:
    """Whether the tangent at ``at`` lies above the function at the end of its convex piece."""
    value, slope = value_and_slope(function, at)
    return value + slope * (end - at) >= function(end)


def _steepest(
    function: Function,
    pieces: Pieces,
    anchor: Array,
    low: Array,
    high: Array,
    side: int,
    halvings: int | Array = _HALVINGS,
) -> tuple[Array, tuple[Array, Array]]:
    """Where on ``[low, high]`` the line through the anchor must touch to lie above the function.

    Right of the anchor (``side`` = 1) that is the largest quotient of differences, left of it (-1)
    the least. In a concave piece the quotient has one extremum, where it equals the derivative; the
    brackets ``[P, *shape]`` of these extrema are returned as well.
    """
    from_anchor = jax.vmap(lambda x: value_and_slope(function, x))
    value = function(anchor)

    def moves_up(x: Array) -> Array:
        there, slope = from_anchor(x)
        return side * (slope * (x - anchor[None]) - (there - value[None])) > 0

    start, end = pieces.interior()
    lows, highs = jnp.clip(low[None], start, end), jnp.clip(high[None], start, end)
    points = [low[None], high[None], jnp.clip(pieces.bends, low[None], high[None])]
    bracket = (lows, highs)
    if len(start):
        bracket = _bisect(moves_up, lows, highs, halvings)
        roots = jnp.clip(0.5 * (bracket[0] + bracket[1]), low[None], high[None])
        points.append(jnp.where(pieces.concave, roots, low[None]))
    points = jnp.concatenate(points)
    there, slope = from_anchor(points)
    distance = points - anchor[None]
    close = jnp.abs(distance) <= float(jnp.finfo(low.dtype).eps) ** 0.5 * (high - low)[None]
    quotient = jnp.where(close, slope, (there - value[None]) / jnp.where(close, 1.0, distance))
    best = jnp.argmax(side * quotient, axis=0)
    return jnp.take_along_axis(points, best[None], axis=0)[0], bracket


def _above_inside(
    function: Function,
    pieces: Pieces,
    lower: Array,
    upper: Array,
    slope: Array,
    touching: tuple[Array, Array] | None,
) -> tuple[list[Array], list[Array]]:
    """Bounds on ``f(x) - slope x`` between the ends, and the values ``|f|`` they come from.

    At every bend inside the value itself; in a concave piece ``[c, d]`` with tangents at ``a`` and
    ``b >= a`` beside the maximum: the first bounds ``[c, b]``, the second ``[b, d]``, each by its
    values at the ends. That holds wherever ``a`` and ``b`` lie. ``touching`` is the bracket of the
    maximum, where it is known.
    """
    each = jax.vmap(lambda x: value_and_slope(function, x))
    found, sizes = [], []

    if len(pieces.bends):
        values = jax.vmap(function)(pieces.bends)
        inside = (pieces.bends > lower[None]) & (pieces.bends < upper[None])
        found.append(jnp.where(inside, values - slope[None] * pieces.bends, -jnp.inf))
        sizes.append(jnp.where(inside, jnp.abs(values), 0.0))
    if len(pieces.start):
        start, end = pieces.interior()
        c, d = jnp.maximum(pieces.start, lower[None]), jnp.minimum(pieces.end, upper[None])
        exists = pieces.concave & (c <= d)
        c, d = jnp.where(exists, c, lower[None]), jnp.where(exists, d, upper[None])
        if touching is None:
            lows, highs = jnp.clip(lower[None], start, end), jnp.clip(upper[None], start, end)
            a, b = _bisect(lambda x: each(x)[1] > slope[None], lows, highs, _HALVINGS)
        else:
            a, b = (jnp.clip(point, start, end) for point in touching)

        def tangent(x: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
            value, rise = each(x)
            at_x, rise = value - slope[None] * x, rise - slope[None]
            return jnp.abs(value), at_x, lambda y: at_x + rise * (y - x)

        size_at_a, at_a, from_a = tangent(a)
        size_at_b, at_b, from_b = tangent(b)
        values = (from_a(c), at_a, from_a(b), at_b, from_b(d))
        found.append(jnp.where(exists, functools.reduce(jnp.maximum, values), -jnp.inf))
        sizes.append(jnp.where(exists, jnp.maximum(size_at_a, size_at_b), 0.0))
    return [row for part in found for row in part], [row for part in sizes for row in part]

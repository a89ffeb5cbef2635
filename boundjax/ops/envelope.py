"""The line above an elementwise function that touches its concave envelope at a given point.

1. *Slope.* At `at` the envelope touches `f` (the line is the tangent) or is a chord from `p <= at`
   to `q >= at`, each an end of the interval, a kink or a point of tangency. The search alternates
   between them: each is the point where the line through the other is steepest, found by bisection
   in every concave piece.
2. *Intercept.* Whatever the slope `s`, the intercept is a proven upper bound on `f(x) - s x`, from
   its values at the ends and bends and, in a concave piece, from two tangents next to its maximum.
   A bad slope can loosen the line but never make it wrong.
3. *Rounding.* The intercept moves outward by the rounding of the values it is computed from.

The search is not differentiated: the slope does not change to first order with a point of tangency
(envelope theorem), so the derivative of the final expressions is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from boundjax.numerics import with_derivative_of

Function = Callable[[Array], Array]

# Images and lines of smooth functions move outward by this many ulp. XLA's transcendental functions
# are off by up to 4.3 ulp (seen for tanh), and not monotone.
ULPS = 8.0
# Halvings of a bracket. What remains of it changes a line to second order only, by about the
# rounding of a float64.
_HALVINGS = 24


class Pieces(NamedTuple):
    """The concave pieces of a function, and its bends.

    Attributes:
      start, end: ends of the concave pieces, `[P, *shape]`, possibly infinite.
      concave: `[P, *shape]`, False where a piece turns out not to be concave.
      bends: all breakpoints, `[B, *shape]`.
      shape: `"convex"` or `"concave"` if there is one piece, `"left"` or `"right"` if that one of
        two is concave and the other convex, else `"mixed"`.
      rounds: how often the search alternates between the ends of a chord: twice if one of them is
        certainly an end of the interval, else three times, each of which squares the error.
    """

    start: Array
    end: Array
    concave: Array
    bends: Array
    shape: Literal["convex", "concave", "left", "right", "mixed"]
    rounds: int

    @property
    def convex(self) -> bool:
        """Whether the function is one convex piece, so that the line above is the chord."""
        return self.shape == "convex"

    @classmethod
    def of(
        cls,
        breakpoints: tuple[ArrayLike, ...],
        curvatures: tuple[int | Array, ...],
        like: Array,
    ) -> Pieces:
        """Makes the pieces from breakpoints and curvatures; see `smooth.Curve`."""
        # A piece whose sign depends on an operand may be concave.
        indices = [k for k, c in enumerate(curvatures) if not isinstance(c, int) or c < 0]
        shape = "mixed"
        if all(isinstance(c, int) for c in curvatures):
            if len(curvatures) == 1:
                shape = "concave" if indices else "convex"
            elif sorted(curvatures) == [-1, 1]:
                shape = "left" if curvatures[0] < 0 else "right"

        def stack(values: list[ArrayLike]) -> Array:
            full = [jnp.broadcast_to(jnp.asarray(v, like.dtype), like.shape) for v in values]
            stacked = jnp.stack(full) if full else jnp.zeros((0, *like.shape), like.dtype)
            return jax.lax.stop_gradient(stacked)

        points = (-jnp.inf, *breakpoints, jnp.inf)
        concave = [jnp.broadcast_to(jnp.asarray(curvatures[k] < 0), like.shape) for k in indices]
        # A bend beside no concave piece may be a kink, at which a chord can end.
        pieces = range(1, len(curvatures))
        kinks = [k for k in pieces if k not in indices and k - 1 not in indices]
        return cls(
            stack([points[k] for k in indices]),
            stack([points[k + 1] for k in indices]),
            jnp.stack(concave) if concave else jnp.zeros((0, *like.shape), bool),
            stack(list(breakpoints)),
            shape,
            2 if len(indices) + len(kinks) <= 1 else 3,
        )

    def interior(self) -> tuple[Array, Array]:
        """The concave pieces, shortened by a few roundings at both ends.

        At a kink itself the derivative could be that of the other side.
        """
        tiny = 4.0 * float(jnp.finfo(self.start.dtype).eps)

        def margin(point: Array) -> Array:
            return jnp.where(jnp.isinf(point), 0.0, tiny * jnp.maximum(jnp.abs(point), 1e-3))

        return self.start + margin(self.start), self.end - margin(self.end)


def value_and_slope(function: Function, x: Array) -> tuple[Array, Array]:
    """`f(x)` and `f'(x)`, elementwise."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def slope_of(function: Function, x: Array) -> Array:
    """`f'(x)`, elementwise."""
    return value_and_slope(function, x)[1]


def _bisect(
    moves_up: Callable[[Array], Array], low: Array, high: Array, halvings: int | Array
) -> tuple[Array, Array]:
    """Brackets the point up to which `moves_up` holds."""

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
    """Slope and intercept of the line above a function that is lowest at `at`.

    `at` is None if the function is convex: the line is then the chord.
    """
    ends = jax.lax.stop_gradient((lower, upper))
    at_ends = [detached(end) for end in ends]
    largest = jnp.maximum(*(jnp.abs(value) for value in at_ends))
    if pieces.shape == "concave":
        assert at is not None
        value, slope = value_and_slope(function, at)
        intercept, largest = value - slope * at, jnp.abs(value)
    else:
        p, q, middle = lower, upper, 0.5 * (lower + upper)
        if not pieces.convex:
            assert at is not None
            fixed, middle = jnp.clip(jax.lax.stop_gradient(at), *ends), at
            left, right, touching = _supports(detached, pieces, *ends, fixed)
            # Only the ends of the interval are differentiated, not points of tangency or kinks.
            p = jnp.where(left == ends[0], lower, left)
            q = jnp.where(right == ends[1], upper, right)
        slope = _secant(function, p, q, middle, lower, upper, largest)
        fixed = jax.lax.stop_gradient(slope)
        bounds = [value - fixed * end for value, end in zip(at_ends, ends, strict=True)]
        if not pieces.convex:
            inside, sizes = _above_inside(detached, pieces, *ends, fixed, touching)
            bounds, largest = bounds + inside, functools.reduce(jnp.maximum, sizes, largest)
        # The line touches at p, at q and between them. Only rounding decides which of these values
        # is the largest; their derivatives are equal.
        intercept = functools.reduce(jnp.maximum, bounds)
        intercept = with_derivative_of(intercept, function(p) - slope * p)
    info, distance = jnp.finfo(lower.dtype), jnp.abs(lower) + jnp.abs(upper)
    size = largest + jnp.abs(slope) * distance + rounding
    # Values and slopes below the smallest normal number may be flushed to 0.
    slack = ULPS * (float(info.eps) * size + float(info.tiny) * (1.0 + distance))
    return slope, intercept + jax.lax.stop_gradient(slack)


def _secant(
    function: Function, p: Array, q: Array, at: Array, lower: Array, upper: Array, largest: Array
) -> Array:
    """The slope of the chord from `p` to `q`, or of the tangent at `at` if they are close.

    Close means that rounding would spoil the quotient's derivative, or that both may approximate
    one point.
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
    """The points `p <= at <= q` where the envelope's line at `at` touches the function.

    Also returns a bracket `[P, *shape]` of the point of tangency if there can be only one.
    """
    if pieces.shape in ("left", "right"):
        # With one concave piece, one point is an end of the interval, unless both are `at`.
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
        # Each turn reduces the error of the one before, so early turns need not be exact.
        halvings = _HALVINGS // pieces.rounds * (k + 1)
        q, _ = _steepest(function, pieces, pair[0], at, upper, 1, halvings)
        p, _ = _steepest(function, pieces, q, lower, at, -1, halvings)
        return p, q

    return *jax.lax.fori_loop(0, pieces.rounds, turn, (lower, upper)), None


def _tangent_above(function: Function, at: Array, end: Array) -> Array:
    """Whether the tangent at `at` lies above the function at the end of its convex piece."""
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
    """The point on `[low, high]` at which the line above f through the anchor touches f.

    Right of the anchor (`side` = 1) it maximises the difference quotient, left of it (-1) it
    minimises it. In a concave piece the quotient has one extremum, where it equals the derivative.
    Also returns the brackets `[P, *shape]` of these extrema.
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
    """Upper bounds on `f(x) - slope x` between the ends, and the values `|f|` they come from.

    At a bend the bound is the value itself. In a concave piece `[c, d]` it comes from the tangents
    at `a` and `b >= a` beside the maximum: the first bounds `[c, b]`, the second `[b, d]`, each by
    its values at the ends. This holds wherever `a` and `b` lie. `touching` brackets the maximum;
    None searches for it.
    """
    each = jax.vmap(lambda x: value_and_slope(function, x))
    bounds, sizes = [], []

    if len(pieces.bends):
        values = jax.vmap(function)(pieces.bends)
        inside = (pieces.bends > lower[None]) & (pieces.bends < upper[None])
        bounds.append(jnp.where(inside, values - slope[None] * pieces.bends, -jnp.inf))
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
        bounds.append(jnp.where(exists, functools.reduce(jnp.maximum, values), -jnp.inf))
        sizes.append(jnp.where(exists, jnp.maximum(size_at_a, size_at_b), 0.0))
    return [row for part in bounds for row in part], [row for part in sizes for row in part]

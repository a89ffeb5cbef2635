"""The two lines of any elementwise function that is convex or concave piece by piece.

A function states where it bends (`Curve`); everything else follows. The upper line touches the
concave envelope of the function on `[lower, upper]` at a point `at`, where no other line above the
function is lower. By default that is the middle, which also gives the least area: the area under a
line over an interval is its value at the middle times the width. The lower line is minus the upper
line of `-f`.

`envelope` finds one line above. Images, like lines, move outward by their rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from boundjax.ir.families import Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.numerics import larger, smaller, squarable
from boundjax.ops import domain
from boundjax.ops.domain import Domain
from boundjax.ops.envelope import ULPS, Function, Pieces, line_above, slope_of

# A slope and an intercept.
Line = tuple[Array, Array]

# The inner end of an infinite value, as a share of the largest number; see `outward`.
_SHARE_OF_A_SUM = 2.0**-20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Where an elementwise function bends, rises and ends. Numbers may also be arrays.

    Attributes:
      curvatures: of every piece, from left to right: 1 convex, -1 concave, 0 straight; an array
        if the sign depends on an operand.
      breakpoints: the points between the pieces, ascending: inflection points and kinks. A function
        that is convex or concave as a whole needs none, even if it has kinks.
      stationary: the extrema of a function that is not monotone.
      monotone: 1 increasing, -1 decreasing, 0 neither.
      low, high: the range of the function on its whole domain.
      rounding: `x -> size`. The computed value at `x` is off by at most 8 ulp of itself plus 8 ulp
        of this size: `|x|` for `x (1 + tanh x)`, where that much cancels; infinite where the
        computed value says nothing.
      kinks: pairs of a kink and the largest absolute slope beside it.
      least, most: the ends of the domain.
      at_least, at_most: the values there, possibly infinite.
    """

    curvatures: tuple[int | Array, ...]
    breakpoints: tuple[ArrayLike, ...] = ()
    stationary: tuple[ArrayLike, ...] = ()
    monotone: int = 1
    low: float = -float("inf")
    high: float = float("inf")
    rounding: Callable[[Array], Array] = jnp.zeros_like
    kinks: tuple[tuple[ArrayLike, ArrayLike], ...] = ()
    least: float = -float("inf")
    at_least: ArrayLike = -float("inf")
    most: float = float("inf")
    at_most: ArrayLike = float("inf")

    @property
    def domain(self) -> Domain:
        """Where the function is defined."""
        return Domain(self.least, self.at_least, self.most, self.at_most)

    def __post_init__(self) -> None:
        if len(self.curvatures) != len(self.breakpoints) + 1:
            raise ValueError(
                f"{len(self.breakpoints)} breakpoints separate {len(self.breakpoints) + 1} pieces, "
                f"got {len(self.curvatures)} curvatures"
            )


def image(function: Function, curve: Curve, lower: Array, upper: Array) -> tuple[Array, Array]:
    """The range of a function on `[lower, upper]`, moved outward by its rounding.

    Args:
      function: elementwise.
      curve: its facts.
      lower, upper: the interval's ends; NaN gives NaN.

    Returns:
      The range's ends, of the shape and dtype of `lower`.
    """

    def moved(x: Array) -> tuple[Array, Array]:
        return outward(function(x), curve.rounding(x))

    (low, up), (low_at_upper, up_at_upper) = moved(lower), moved(upper)
    if curve.monotone > 0:
        up = up_at_upper
    elif curve.monotone < 0:
        low = low_at_upper
    else:
        low, up = smaller(low, low_at_upper), larger(up, up_at_upper)
        for point in curve.stationary:
            point = jnp.full_like(lower, point)
            inside = (lower < point) & (point < upper)
            below, above = moved(point)
            low = jnp.where(inside, smaller(low, below), low)
            up = jnp.where(inside, larger(up, above), up)
    # The derivative of jnp.clip at the ends would be one half.
    low = jnp.where(low < curve.low, curve.low, low)
    up = jnp.where(up > curve.high, curve.high, up)
    # A function that is NaN at one end of the interval has no bound on either side.
    unknown = jnp.isnan(low) | jnp.isnan(up)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, up)


def outward(value: Array, rounding: Array) -> tuple[Array, Array]:
    """The least and the greatest true value that a computed value allows."""
    size = jax.lax.stop_gradient(jnp.abs(value) + rounding)
    info = jnp.finfo(value.dtype)
    # Results below the smallest normal number may be flushed to 0.
    slack = ULPS * (float(info.eps) * size + float(info.tiny))
    # An infinite value may stand for a finite one that overflows, so its inner end is finite, and
    # small enough that a sum of many such ends is finite, too.
    most = float(info.max) * _SHARE_OF_A_SUM
    finite = jnp.isfinite(value) | jnp.isnan(value)
    low = jnp.where(finite, value - jnp.where(finite, slack, 0.0), jnp.minimum(value, most))
    up = jnp.where(finite, value + jnp.where(finite, slack, 0.0), jnp.maximum(value, -most))
    unknown = jnp.isinf(rounding)
    return jnp.where(unknown, -jnp.inf, low), jnp.where(unknown, jnp.inf, up)


def lipschitz(function: Function, curve: Curve, lower: Array, upper: Array) -> Array:
    """The largest absolute slope on the interval: at its ends or at a bend inside."""
    largest = jnp.maximum(jnp.abs(slope_of(function, lower)), jnp.abs(slope_of(function, upper)))
    bends = [(b, jnp.abs(slope_of(function, jnp.full_like(lower, b)))) for b in curve.breakpoints]
    for point, steepness in (*bends, *curve.kinks):
        inside = (lower <= point) & (point <= upper)
        largest = jnp.where(inside, jnp.maximum(largest, steepness), largest)
    return jnp.where(jnp.isnan(largest) & ~jnp.isnan(lower + upper), jnp.inf, largest)


def lines(
    function: Function,
    curve: Curve,
    lower: Array,
    upper: Array,
    position: Position,
    ends: tuple[Array, Array] | None = None,
    detached: Function | None = None,
) -> Lines:
    """The lines of a function on `[lower, upper]`; see `both_lines`."""
    below, above = both_lines(function, curve, lower, upper, position, ends, detached)
    return Lines(*below, *above)


def both_lines(
    function: Function,
    curve: Curve,
    lower: Array,
    upper: Array,
    position: Position,
    ends: tuple[Array, Array] | None = None,
    detached: Function | None = None,
) -> tuple[Line, Line]:
    """The line below and the line above a function, each optimal at a point of the interval.

    Args:
      function: elementwise, differentiable.
      curve: its facts.
      lower, upper: the interval's ends.
      position: where in the interval a line is optimal, from 0 at its lower to 1 at its upper end;
        the middle by default. Called once per line that has a choice, for the upper one first.
      ends: of the image, if the caller has them.
      detached: the same function, without gradients to the values that it closes over.

    Returns:
      Slopes and intercepts of the shape and dtype of `lower`. Where the function overflows or is
      infinite at an end the lines are constant: the ends of the image, possibly infinite. NaN gives
      NaN.
    """
    low, high = image(function, curve, lower, upper) if ends is None else ends
    fits = jnp.isfinite(low) & jnp.isfinite(high) & jnp.isfinite(upper - lower)
    fits = fits & jnp.isfinite(function(lower)) & jnp.isfinite(function(upper))
    # A derivative that is computed from a square is 0 where the square overflows.
    fits = fits & (jnp.maximum(jnp.abs(lower), jnp.abs(upper)) < squarable(lower.dtype))
    # Double where: ends that do not fit must reach neither the values nor their derivatives.
    safe = (jnp.where(fits, lower, 0.5), jnp.where(fits, upper, 0.5))

    def at(pieces: Pieces) -> Array | None:
        if pieces.convex:
            return None
        share = position(lower, upper, default=jnp.full_like(lower, 0.5))
        # At the edge of a domain the slope may be infinite, and there is no tangent.
        share = jnp.where((safe[0] <= curve.least) & (share < 1e-3), 1e-3, share)
        share = jnp.where((safe[1] >= curve.most) & (share > 0.999), 0.999, share)
        return safe[0] + share * (safe[1] - safe[0])

    def constant_unless_fit(slope: Array, intercept: Array, end: Array) -> tuple[Array, Array]:
        usable = fits & jnp.isfinite(slope) & jnp.isfinite(intercept)
        return jnp.where(usable, slope, 0.0), jnp.where(usable, intercept, end)

    detached = detached or function
    rounding = jnp.maximum(curve.rounding(safe[0]), curve.rounding(safe[1]))
    pieces = Pieces.of(curve.breakpoints, curve.curvatures, lower)
    above = line_above(function, detached, pieces, *safe, at(pieces), rounding)
    pieces = Pieces.of(curve.breakpoints, tuple(-c for c in curve.curvatures), lower)
    slope, intercept = line_above(
        lambda x: -function(x), lambda x: -detached(x), pieces, *safe, at(pieces), rounding
    )
    below = constant_unless_fit(-slope, -intercept, low)
    return below, constant_unless_fit(*above, high)


def entry(
    name: str,
    curve: Curve | Callable[[Node], Curve],
    *,
    note: str = "",
    accepts: Callable[[Node], bool] = lambda node: len(node.inputs) == 1,
    partial: bool = False,
    **facts: Any,
) -> Scalar:
    """The entry of a function in the table of ops.

    Args:
      name: the primitive's or composite's.
      curve: the function's facts, or a function of the node if they depend on it.
      note: for the printed table.
      accepts: whether the entry covers an equation of that name.
      partial: whether the function overflows on finite intervals, or is infinite at their ends;
        implied if its domain has an end.
      **facts: other fields of the entry, e.g. `traced_as`.
    """
    infinite = partial or callable(curve) or not curve.domain.everywhere

    def curve_of(node: Node) -> Curve:
        return curve(node) if callable(curve) else curve

    def functions(node: Node, curve: Curve) -> tuple[Function, Function]:
        detached = functools.partial(node.apply, constants=jax.lax.stop_gradient)
        function, detached = (domain.extended(f, curve.domain) for f in (node.apply, detached))
        return domain.overflowing(function) if infinite else function, detached

    def node_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        curve = curve_of(node)
        function, _ = functions(node, curve)
        low, high = image(function, curve, lower, upper)
        if curve.domain.everywhere:
            return low, high
        return domain.restricted(low, high, curve.domain, lower, upper)

    def warned_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        curve = curve_of(node)
        if not curve.domain.everywhere:
            outside = domain.outside(curve.domain, lower, upper)
            domain.warn(node, outside, f"leave its domain, {curve.domain}")
        return node_image(node, lower, upper)

    def node_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
        curve = curve_of(node)
        function, detached = functions(node, curve)
        ends = node_image(node, lower, upper)
        return lines(function, curve, lower, upper, position, ends, detached)

    def node_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
        curve = curve_of(node)
        constant = lipschitz(node.apply, curve, lower, upper)
        return jnp.where(curve.domain.leaves(lower, upper), jnp.inf, constant)

    return Scalar(
        name=name,
        note=note,
        accepts=accepts,
        image=warned_image,
        lines=node_lines,
        lipschitz=node_lipschitz,
        partial=infinite,
        **facts,
    )

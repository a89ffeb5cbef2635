"""The two lines of any elementwise function that is convex or concave piece by piece.

A function states where it bends (``Curve``); everything else follows. The upper line is the one
that touches the concave envelope of the function on ``[lower, upper]`` at a chosen point ``at``:
no other line above the function is lower there. At the middle, the default, it is at once optimal
at the middle and of the least area, because the area under a line over an interval is its value at
the middle times the width. The lower line is the same of ``-f``.

``envelope`` finds one line above; images are moved outward by their rounding as lines are.
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
from boundjax.ops.envelope import ULPS, Function, Pieces, line_above, slope_of

_SHARE_OF_A_SUM = 2.0**-20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Where an elementwise function bends, rises and ends. Numbers may also be arrays.

    Attributes:
      curvatures: of every piece, from left to right: 1 convex, -1 concave, 0 straight; an array
        where the sign depends on an operand.
      breakpoints: between the pieces, ascending: inflection points, and kinks. None are needed
        where the whole function is convex or concave, kinks or not.
      stationary: where a function that is not monotone has its extrema.
      monotone: 1 increasing, -1 decreasing, 0 neither.
      low, high: the range of all values.
      rounding: ``x -> size``: the function's evaluation at ``x`` is wrong by no more than 8 ulp of
        its value and of this: ``|x|`` for ``x (1 + tanh x)``, where that much cancels; infinite
        where the evaluation says nothing.
      kinks: pairs of a kink and the largest absolute slope beside it.
      least: the lower end of the domain.
      at_least: the value there, possibly infinite.
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

    def __post_init__(self) -> None:
        if len(self.curvatures) != len(self.breakpoints) + 1:
            raise ValueError(
                f"{len(self.breakpoints)} breakpoints separate {len(self.breakpoints) + 1} pieces, "
                f"got {len(self.curvatures)} curvatures"
            )


def image(function: Function, curve: Curve, lower: Array, upper: Array) -> tuple[Array, Array]:
    """The range of a function on ``[lower, upper]``, moved outward by its rounding.

    Args:
      function: elementwise.
      curve: what is known of it.
      lower, upper: the interval's ends; NaN gives NaN.

    Returns:
      The range's ends, of the shape and dtype of ``lower``.
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
    # Not jnp.clip, whose derivative at the ends is one half.
    low = jnp.where(low < curve.low, curve.low, low)
    up = jnp.where(up > curve.high, curve.high, up)
    # A function that is not a number at one end has no bound on the other side either.
    unknown = jnp.isnan(low) | jnp.isnan(up)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, up)


def outward(value: Array, rounding: Array) -> tuple[Array, Array]:
    """What a function's true value may be at least and at most, from its evaluation."""
    size = jax.lax.stop_gradient(jnp.abs(value) + rounding)
    info = jnp.finfo(value.dtype)
    # Results below the smallest normal number may come out as 0.
    slack = ULPS * (float(info.eps) * size + float(info.tiny))
    # Past the largest number there is no end to move outward from: an infinite value was one that
    # is too large, or truly infinite. A sum of many such ends must not become infinite either.
    most = float(info.max) * _SHARE_OF_A_SUM
    finite = jnp.isfinite(value) | jnp.isnan(value)
    low = jnp.where(finite, value - jnp.where(finite, slack, 0.0), jnp.minimum(value, most))
    up = jnp.where(finite, value + jnp.where(finite, slack, 0.0), jnp.maximum(value, -most))
    lost = jnp.isinf(rounding)
    return jnp.where(lost, -jnp.inf, low), jnp.where(lost, jnp.inf, up)


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
    """The lines of a function on ``[lower, upper]``, each optimal at a point of the interval.

    Args:
      function: elementwise, differentiable.
      curve: what is known of it.
      lower, upper: the interval's ends.
      position: where in the interval the lines are optimal, 0 its lower end, 1 its upper end; asked
        once for each line that has a choice, the upper one first. By default the middle.
      ends: of the image, if they are known.
      detached: the same function as a constant for differentiation, where it closes over values
        that are being differentiated.

    Returns:
      Lines of the shape and dtype of ``lower``. Where the function overflows or is infinite at an
      end they are constant: the ends of the image, possibly infinite. NaN gives NaN.
    """
    low, high = image(function, curve, lower, upper) if ends is None else ends
    fits = jnp.isfinite(low) & jnp.isfinite(high) & jnp.isfinite(upper - lower)
    fits = fits & jnp.isfinite(function(lower)) & jnp.isfinite(function(upper))
    # Derivatives may be computed with squares; where these overflow they are 0.
    fits = fits & (jnp.maximum(jnp.abs(lower), jnp.abs(upper)) < squarable(lower.dtype))
    # Double where: what does not fit must reach neither the values nor their derivatives.
    safe = (jnp.where(fits, lower, 1.0), jnp.where(fits, upper, 1.0))

    def at(pieces: Pieces) -> Array | None:
        if pieces.convex:
            return None
        share = position(lower, upper, default=jnp.full_like(lower, 0.5))
        # At the edge of a domain the slope may be infinite, and there is no tangent.
        share = jnp.where((safe[0] <= curve.least) & (share < 1e-3), 1e-3, share)
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
    return Lines(*constant_unless_fit(-slope, -intercept, low), *constant_unless_fit(*above, high))


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
      curve: what is known of the function, or a function of the node where that depends on it.
      note: for the printed table.
      accepts: which equations of that name are covered.
      partial: whether it overflows on finite intervals, or is infinite at their ends; implied where
        the curve has a least argument.
      **facts: other fields of the entry, say ``traced_as``.
    """
    infinite = partial or callable(curve) or curve.least > -float("inf")

    def functions(node: Node) -> tuple[Curve, Function, Function]:
        own = curve(node) if callable(curve) else curve
        detached = functools.partial(node.apply, constants=jax.lax.stop_gradient)
        function, detached = (
            domain.extended(f, own.least, own.at_least) for f in (node.apply, detached)
        )
        return own, domain.overflowing(function) if infinite else function, detached

    def node_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        own, function, _ = functions(node)
        low, high = image(function, own, lower, upper)
        if own.least > -float("inf"):
            return domain.restricted(low, high, own.least, own.at_least, lower, upper)
        return low, high

    def warned_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        own, *_ = functions(node)
        if own.least > -float("inf"):
            outside = domain.outside(own.least, own.at_least, lower)
            domain.warn(node, outside, f"leave its domain, from {own.least:g} upward")
        return node_image(node, lower, upper)

    def node_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
        own, function, detached = functions(node)
        ends = node_image(node, lower, upper)
        return lines(function, own, lower, upper, position, ends, detached)

    def node_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
        own, *_ = functions(node)
        constant = lipschitz(node.apply, own, lower, upper)
        return jnp.where(lower < own.least, jnp.inf, constant)

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

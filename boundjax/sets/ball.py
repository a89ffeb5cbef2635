"""Balls of an lp norm, optionally cut to the range of valid inputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from boundjax.numerics import length, smaller, with_derivative_of
from boundjax.sets import ball_box, rounding
from boundjax.sets.checks import (
    as_float,
    require_array,
    require_clip,
    require_finite,
    require_norm,
    require_radius,
)
from boundjax.sets.interval import Interval


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "eps", "clip"],
    meta_fields=["p", "outward"],
)
@dataclasses.dataclass(frozen=True)
class LpBall:
    """All `x` with `||(x - center) / eps||_p <= 1`, cut to `clip[0] <= x <= clip[1]`.

    Attributes:
      center: the unperturbed input, any shape.
      eps: radius in the units of the input (for pixels in [0, 1]: 8 / 255, say), `>= 0`; a
        scalar, or an array that broadcasts to the input's shape (one radius per feature; 0 keeps it
        fixed).
      p: order of the norm, 1, 2 or `inf` (any `p >= 1` works through its dual norm).
      clip: `None` or `(low, high)`, the range of valid inputs, scalars or arrays.
      outward: whether the ends of `interval()` are rounded outwards where they are inexact, as
        certificates need. Rounding to nearest loses an `eps` below half a spacing of the center.

    `support` is exact for every ball without clip, and for a clipped one with `p = inf` or `p = 2`
    whose center lies in the clip range. Otherwise it is an upper bound, no larger than the supports
    of the ball and of the clipped box.

    Raises:
      ValueError: for `p < 1`, a radius that is negative or NaN, a center that is not finite, or an
        empty clip range.
    """

    center: Array
    eps: ArrayLike
    p: float = jnp.inf
    clip: tuple[ArrayLike, ArrayLike] | None = None
    outward: bool = False

    def __post_init__(self) -> None:
        require_norm("p", self.p)
        require_array("LpBall.center", self.center)
        require_finite("LpBall.center", self.center)
        require_radius(self.eps)
        require_clip(self.clip)

    @property
    def is_box(self) -> bool:
        """True for `p = inf`, with or without clip."""
        return self.p == jnp.inf

    def outwards(self) -> LpBall:
        """The same set, whose answers are rounded outwards."""
        return dataclasses.replace(self, outward=True)

    def _radius(self) -> Array:
        center, eps = as_float(self.center), jnp.asarray(self.eps)
        # `__post_init__` cannot check this: a batch of balls that `vmap` returns has a scalar eps
        # for each.
        if eps.ndim > center.ndim or any(
            e not in (1, n) for e, n in zip(eps.shape[::-1], center.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"eps must be a scalar or broadcast to the input's shape {center.shape}, "
                f"got shape {eps.shape}"
            )
        eps = jnp.broadcast_to(as_float(eps, center), center.shape)
        # Under `jit` a negative radius cannot raise; NaN bounds never certify.
        return jnp.where(eps >= 0, eps, jnp.nan)

    def _clip(self, clip: tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
        center = as_float(self.center)
        low, high = (jnp.broadcast_to(as_float(end, center), center.shape) for end in clip)
        return low, high

    def interval(self) -> Interval:
        """`[center - eps, center + eps]`, cut to the clip range."""
        center, radius = as_float(self.center), self._radius()
        nearest = self._cut(center - radius, center + radius)
        if not self.outward:
            return nearest
        ends = rounding.with_exact_middle(*self._cut(*rounding.outward_ends(center, radius)))
        # Rounding has no derivative, so the derivative is that of the rounded sums.
        return Interval(*map(with_derivative_of, jax.lax.stop_gradient(ends), nearest))

    def _cut(self, lower: Array, upper: Array) -> Interval:
        if self.clip is not None:
            low, high = self._clip(self.clip)
            lower, upper = jnp.clip(lower, low, high), jnp.clip(upper, low, high)
        return Interval(lower, upper)

    def ball(self) -> tuple[Array, Array]:
        """`center` and the radius of an l2 ball around it that contains the set.

        With one eps for `n` features it is `n ** (1 / 2 - 1 / max(p, 2)) eps`, or less where the
        clip range ends earlier.
        """
        center, radius, interval = as_float(self.center), self._radius(), self.interval()
        if self.p <= 2:
            size = jnp.max(radius, initial=0.0)
        else:  # Hoelder: ||eps u||_2 <= ||eps||_r ||u||_p with 1 / r = 1 / 2 - 1 / p
            size = dual_norm(radius, 2.0 if self.p == jnp.inf else 2 * self.p / (self.p + 2))
        corner = jnp.maximum(jnp.abs(interval.upper - center), jnp.abs(center - interval.lower))
        return center, jnp.minimum(size, length(corner))

    def support(self, coefficients: Array) -> Array:
        """`max <c, x> = <c, center> + ||eps * c||_q` with `1 / p + 1 / q = 1`."""
        return jnp.sum(coefficients * self.interval().middle) + self.spread(coefficients)

    def spread(self, coefficients: Array) -> Array:
        """`max <c, x - middle>`; clipping and outward rounding move the middle off the center."""
        interval = self.interval()
        box = jnp.sum(jnp.abs(coefficients) * interval.radius)
        if self.is_box:
            return box
        center, radius = as_float(self.center), self._radius()
        if self.clip is None and not self.outward:
            return dual_norm(radius * coefficients, self.p)
        shift = jnp.sum(coefficients * (center - interval.middle))
        if self.clip is None:
            return dual_norm(radius * coefficients, self.p) + shift
        if self.p != 2:
            return smaller(dual_norm(radius * coefficients, self.p) + shift, box)
        # Scaled by eps the ball is round; features with eps = 0 have slope 0 there.
        low, high = self._clip(self.clip)
        unit = jnp.where(radius > 0, radius, 1.0)
        below, above = (center - low) / unit, (high - center) / unit
        largest = ball_box.spread(radius * coefficients, 1.0, below, above) + shift
        # With the center inside, `largest` is exact; taking the minimum with an equal `box` would
        # average their derivatives.
        inside = jnp.all((below >= 0) & (above >= 0))
        return jnp.where(inside, largest, smaller(largest, box))


def dual_norm(values: Array, p: float) -> Array:
    """`||values||_q` with `1 / p + 1 / q = 1`, over all axes; its gradient at 0 is 0."""
    if p == 1:
        return jnp.max(jnp.abs(values))
    if p == jnp.inf:
        return jnp.sum(jnp.abs(values))
    q = p / (p - 1)
    # Scaling by the largest entry keeps squares of small coefficients from underflowing to 0 (XLA
    # flushes subnormals), which would make the support too small. The second `where` keeps the
    # gradient at 0 from being NaN.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(values)))
    positive = scale > 0
    safe = jnp.where(positive, values / jnp.where(positive, scale, 1.0), 1.0)
    norm = jnp.sum(jnp.abs(safe) ** jnp.asarray(q, safe.dtype)) ** jnp.asarray(1 / q, safe.dtype)
    return jnp.where(scale == 0, jnp.zeros_like(scale), scale * norm)

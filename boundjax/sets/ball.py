"""Balls of an lp norm, optionally cut to the range of valid inputs."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from boundjax.numerics import length, smaller
from boundjax.sets import ball_box, rounding, trees, upward
from boundjax.sets.checks import (
    as_float,
    require_clip,
    require_finite,
    require_norm,
    require_radius,
)
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.sets.product import product_of
from boundjax.typing import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "eps", "clip"],
    meta_fields=["p", "outward"],
)
@dataclasses.dataclass(frozen=True)
class LpBall:
    """All `x` with `||(x - center) / eps||_p <= 1`, cut to `clip[0] <= x <= clip[1]`.

    Attributes:
      center: the unperturbed input, any shape, or a pytree of arrays of one floating dtype. The
        norm is then that of all leaves together, one ball; what the methods take and return is a
        pytree.
      eps: radius in the units of the input (for pixels in [0, 1]: 8 / 255, say), `>= 0`; a
        scalar, or an array that broadcasts to the input's shape (one radius per feature; 0 keeps it
        fixed). For a pytree: a number, or a pytree of such radii.
      p: order of the norm, 1, 2 or `inf` (any `p >= 1` works through its dual norm).
      clip: `None` or `(low, high)`, the range of valid inputs, scalars or arrays, or
        pytrees of them.
      outward: whether every answer holds for the exact set, as certificates need, instead of up to
        rounding. Rounding to nearest loses an `eps` below half a spacing of the center. Radii and
        clip ranges that are numbers or numpy arrays are then rounded outwards to the dtype of the
        center: 0.01 lies above the nearest float32. Center and JAX arrays are exact as they are.

    `support` is exact for every ball without clip, and for a clipped one with `p = inf` or `p = 2`
    whose center lies in the clip range. Otherwise it is an upper bound, no larger than the supports
    of the ball and of the clipped box.

    Raises:
      ValueError: for `p < 1`, a radius that is negative or NaN, a center that is not finite, or an
        empty clip range.
    """

    center: Num[Array, "*shape"] | PyTree
    eps: ArrayLike | PyTree
    p: float = jnp.inf
    clip: tuple[ArrayLike | PyTree, ArrayLike | PyTree] | None = None
    outward: bool = False

    def __post_init__(self) -> None:
        require_norm("p", self.p)
        for field in ("center", "eps"):
            object.__setattr__(self, field, trees.numbers_as_array(getattr(self, field)))
        for name, center in trees.named_leaves("LpBall.center", self.center):
            require_finite(name, center)
        for name, eps in trees.named_leaves("eps", self.eps):
            require_radius(eps, name)
        require_clip(self.clip)
        if self.outward:
            _, eps = rounding.outward_numbers(None, self.eps, self.center)
            object.__setattr__(self, "eps", eps)
            if self.clip is not None:
                low, high = map(trees.numbers_as_array, self.clip)
                object.__setattr__(self, "clip", rounding.outward_numbers(low, high, self.center))

    @property
    def is_box(self) -> bool:
        """True for `p = inf`, with or without clip."""
        return self.p == jnp.inf

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
        cast = rounding.float_above(eps, center.dtype) if self.outward else as_float(eps, center)
        eps = jnp.broadcast_to(cast, center.shape)
        # Under `jit` a negative radius cannot raise; NaN bounds never certify.
        return jnp.where(eps >= 0, eps, jnp.nan)

    def _clip(self, clip: tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
        center = as_float(self.center)
        low, high = clip
        if self.outward:
            ends = (
                rounding.float_below(low, center.dtype),
                rounding.float_above(high, center.dtype),
            )
        else:
            ends = as_float(low, center), as_float(high, center)
        low, high = (jnp.broadcast_to(end, center.shape) for end in ends)
        return low, high

    def flattened(self) -> tuple[InputSet, trees.Layout | None]:
        """The ball of a pytree in one flat array; itself for a ball of one array.

        With `p = inf` its leaves are independent.

        Raises:
          ValueError: for a radius or a clip range that is neither one number nor a pytree of the
            center's structure.
          TypeError: for leaves of different floating dtypes.
        """
        if not trees.is_tree(self.center):
            return self, None
        layout = trees.Layout.of(self.center)
        parts = self._of_leaves()
        if self.is_box or len(parts) == 1:
            return product_of(parts, self.center), layout
        trees.require_one_dtype([p.interval().lower.dtype for p in parts], self.center)
        clip = None
        if self.clip is not None:
            ends = [part._clip(part.clip) for part in parts if part.clip is not None]
            low, high = map(trees.concatenated, zip(*ends, strict=True))
            clip = low, high
        center = trees.concatenated([as_float(part.center) for part in parts])
        eps = trees.concatenated([part._radius() for part in parts])
        return LpBall(center, eps, self.p, clip, self.outward), layout

    def _of_leaves(self) -> list[LpBall]:
        """The ball in each leaf of a pytree while the other leaves stay at the center."""
        centers = jax.tree.leaves(self.center)
        radii = trees.like_leaves("eps", self.eps, self.center)
        clips: list[Any] = [None] * len(centers)
        if self.clip is not None:
            ends = [trees.like_leaves("clip", end, self.center) for end in self.clip]
            clips = list(zip(*ends, strict=True))
        leaves = zip(centers, radii, clips, strict=True)
        return [LpBall(center, eps, self.p, clip, self.outward) for center, eps, clip in leaves]

    def outwards(self) -> LpBall:
        """The same set with answers that hold for it exactly."""
        return self if self.outward else dataclasses.replace(self, outward=True)

    @trees.for_trees
    def interval(self) -> Interval:
        """`[center - eps, center + eps]`, cut to the clip range.

        With `outward` middle and half-width, as computed, describe an interval that encloses it.
        """
        center, radius = as_float(self.center), self._radius()
        nearest = self._cut(center - radius, center + radius)
        if not self.outward:
            return nearest
        return rounding.enclosure(self._cut(*rounding.outward_ends(center, radius)), nearest)

    def _cut(self, lower: Array, upper: Array) -> Interval:
        if self.clip is not None:
            low, high = self._clip(self.clip)
            lower, upper = jnp.clip(lower, low, high), jnp.clip(upper, low, high)
        return Interval(lower, upper)

    @trees.for_trees
    def ball(self) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
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
        nearest = jnp.minimum(size, length(corner))
        if not self.outward:
            return center, nearest
        above = upward.with_slack(self._ball_above, nearest, center, radius, *interval)
        return rounding.flushed(center), above

    def _ball_above(self, center: Array, radius: Array, lower: Array, upper: Array) -> Array:
        """An upper bound on the distance to the flushed center, a scalar."""
        if self.p <= 2:
            size = jnp.max(radius, initial=0.0)
        else:
            inverse = Fraction(0) if self.p == jnp.inf else 1 / Fraction(float(self.p))
            size = upward.norm_above(radius, 1 / (Fraction(1, 2) - inverse))
        return upward.enclosing_radius(size, center, lower, upper)

    @trees.for_trees
    def support(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x> = <c, center> + ||eps * c||_q` with `1 / p + 1 / q = 1`."""
        middle, spread = self.interval().middle, self.spread(coefficients)
        nearest = jnp.sum(coefficients * middle) + spread
        if not self.outward:
            return nearest
        return upward.with_slack(upward.support_above, nearest, coefficients, middle, spread)

    @trees.for_trees
    def spread(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x - middle>`; clipping and outward rounding move the middle off the center."""
        nearest = self._nearest_spread(coefficients)
        if not self.outward:
            return nearest
        arguments = coefficients, as_float(self.center), self._radius(), *self.interval()
        return upward.with_slack(self._spread_above, nearest, *arguments)

    def _spread_above(
        self, coefficients: Array, center: Array, radius: Array, lower: Array, upper: Array
    ) -> Array:
        """An upper bound on the exact spread around the middle of `[lower, upper]`, a scalar."""
        interval = Interval(lower, upper)
        box = upward.box_above(coefficients, interval.radius)
        if self.is_box:
            return box
        if self.p == 2 and self.clip is not None:
            low, high = self._clip(self.clip)
            below, above = rounding.sum_above(center, -low), rounding.sum_above(high, -center)
            largest = ball_box.spread_above(coefficients, radius, below, above)
        else:
            values = upward.product_above(radius, jnp.abs(coefficients))
            largest = upward.norm_above(values, conjugate(self.p))
        centered = upward.spread_around(largest, coefficients, center, interval.middle)
        return centered if self.clip is None else jnp.minimum(centered, box)

    def _nearest_spread(self, coefficients: Array) -> Array:
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
    if values.size == 0:  # no maximum to scale by
        return jnp.zeros((), values.dtype)
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


def conjugate(p: float) -> Fraction | None:
    """`q` with `1 / p + 1 / q = 1`, exactly; None for infinity."""
    if p == 1:
        return None
    return Fraction(1) if p == jnp.inf else 1 / (1 - 1 / Fraction(float(p)))

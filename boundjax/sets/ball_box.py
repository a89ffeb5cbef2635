"""The maximum of a linear function over an l2 ball around 0, cut by a box around 0.

The last layer of Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound"
(box constraint propagation), and what a clip range leaves of an l2 ball.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from boundjax.numerics import larger, length, smaller
from boundjax.sets.checks import as_float, concrete, first_index, require_array, require_finite
from boundjax.sets.interval import Interval


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "radius", "lower", "upper"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class BallBox:
    """All ``x`` with ``||x - center||_2 <= radius`` and ``lower <= x <= upper``, elementwise.

    What is known of a hidden layer when both its Lipschitz constant and its interval are.

    Attributes:
      center: the ball's center, any shape.
      radius: scalar, in the units of ``x``, ``>= 0``; infinite where only the box is known.
      lower: of the center's shape; may be ``-inf``.
      upper: of the center's shape; may be ``inf``.

    ``support`` is exact where the center lies in the box. Where it lies outside, the box counts as
    extended to the center: an upper bound, no larger than the support of ``interval()``. A set that
    is unbounded in some feature has no middle; its support is NaN.

    Raises:
      ValueError: for different shapes, a center that is not finite, a radius that is negative or
        NaN, ``lower > upper``.

    Source: Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound".
    """

    center: Array
    radius: ArrayLike
    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        require_array("BallBox.center", self.center)
        require_finite("BallBox.center", self.center)
        radius = concrete(self.radius)
        if radius is not None and not (radius >= 0).all():
            bad = ~(radius >= 0)
            raise ValueError(
                f"BallBox.radius must be >= 0, got {radius[bad].flat[0]}{first_index(bad)}"
            )
        center, lower, upper = map(concrete, (self.center, self.lower, self.upper))
        if center is None or lower is None or upper is None:
            return
        if not center.shape == lower.shape == upper.shape:
            raise ValueError(
                f"BallBox needs arrays of one shape, got center {center.shape}, "
                f"lower {lower.shape} and upper {upper.shape}"
            )
        bad = ~(lower <= upper)
        if bad.any():
            raise ValueError(
                f"BallBox needs lower <= upper, got {lower[bad].flat[0]} > {upper[bad].flat[0]}"
                f"{first_index(bad)}"
            )

    @property
    def is_box(self) -> bool:
        """False: the ball cuts the box's corners."""
        return False

    def _radius(self) -> Array:
        radius = as_float(self.radius, as_float(self.center))
        # __post_init__ cannot check this: vmap returns a batch of sets with one radius for each.
        if radius.ndim:
            raise ValueError(f"BallBox.radius must be a scalar, got shape {radius.shape}")
        return radius

    def interval(self) -> Interval:
        """``[center - radius, center + radius]``, cut to the box; NaN where that is empty."""
        center, radius = as_float(self.center), self._radius()
        lower = larger(as_float(self.lower, center), center - radius)
        upper = smaller(as_float(self.upper, center), center + radius)
        empty = ~(lower <= upper)
        return Interval(jnp.where(empty, jnp.nan, lower), jnp.where(empty, jnp.nan, upper))

    def ball(self) -> tuple[Array, Array]:
        """``center`` and ``radius``, or less where the box does not reach as far."""
        center = as_float(self.center)
        lower, upper = as_float(self.lower, center), as_float(self.upper, center)
        corner = jnp.maximum(jnp.abs(upper - center), jnp.abs(center - lower))
        return center, jnp.minimum(self._radius(), length(corner))

    def support(self, coefficients: Array) -> Array:
        """``max <c, x>``; ``c`` has the input's shape."""
        return jnp.sum(coefficients * self.interval().middle) + self.spread(coefficients)

    def spread(self, coefficients: Array) -> Array:
        """``max <c, x - middle>``, see ``ball_box.spread``."""
        center, interval = as_float(self.center), self.interval()
        below = center - as_float(self.lower, center)
        above = as_float(self.upper, center) - center
        shift = jnp.sum(coefficients * (center - interval.middle))
        largest = spread(coefficients, self._radius(), below, above) + shift
        # With the center inside it is exact; a tie with the box would only blur its derivative.
        inside = jnp.all((below >= 0) & (above >= 0))
        box = jnp.sum(jnp.abs(coefficients) * interval.radius)
        return jnp.where(inside, largest, smaller(largest, box))


# Every round is sound; random problems need fewer than ten.
_MOST_ROUNDS = 64


def spread(coefficients: Array, radius: ArrayLike, below: Array, above: Array) -> Array:
    """``max <c, d>`` over ``||d||_2 <= radius`` and ``-below <= d <= above``, a scalar.

    With ``cap_i`` the room on the side to which ``c_i`` pulls and any ``lam >= 0``,
    ``<c, d> <= sum_i max_(0 <= d_i <= cap_i) (|c_i| d_i - lam / 2 d_i^2) + lam / 2 radius^2``:
    a bound whatever ``lam`` is, and the maximum itself for one of them. The paper's iteration
    finds that one, so a stop too early costs tightness and never soundness. By the envelope
    theorem the derivative is the formula's for a constant ``lam``: no solver is differentiated.
    The gradient is exact where the maximum is differentiable; there are no second derivatives.

    Args:
      coefficients: ``c``, any shape.
      radius: scalar ``>= 0``, may be infinite; NaN or negative gives NaN.
      below: room towards smaller values, of ``c``'s shape, may be infinite. Negative room counts
        as 0, which only enlarges the set.
      above: the same towards larger values.

    Returns:
      The maximum; NaN where anything is NaN, infinite where neither ball nor box is bounded.
    """
    dtype = coefficients.dtype
    radius = jnp.asarray(radius, dtype)
    if radius.ndim or not coefficients.shape == jnp.shape(below) == jnp.shape(above):
        raise ValueError(
            "spread needs a scalar radius and arrays of one shape, got radius "
            f"{radius.shape}, coefficients {coefficients.shape}, below {jnp.shape(below)} and "
            f"above {jnp.shape(above)}"
        )
    slopes = jnp.abs(coefficients)
    pulls = slopes > 0
    room = jnp.where(coefficients > 0, above, below)
    # Features behind which the box ends before the ball; others are free whatever `lam` is. Where
    # c is 0 nothing is gained: no room stands for it. Hence every cap is finite.
    boxed = (room < radius) | (room <= 0) | ~pulls
    cap = jnp.where(boxed & pulls & (room > 0), room, 0.0)

    # `lam * radius` in place of `lam`: the multiplier may leave the float's range, the price does
    # not, nor do the lengths that are measured in radii.
    fixed = jax.lax.stop_gradient(radius)
    unit = jnp.where(fixed > 0, fixed, 1.0)
    price = _price(*jax.lax.stop_gradient((slopes, cap / unit, boxed)))
    clipped = jax.lax.stop_gradient(boxed & (slopes >= price * (cap / unit)))

    finite = jnp.isfinite(fixed)
    reach = jnp.where(finite, fixed, 0.0)
    at_cap = cap * (slopes - 0.5 * price * (cap / unit))
    # Zeroed before the quotient: what overflows makes gradients NaN even where it is not chosen.
    free = jnp.where(clipped, 0.0, slopes)
    inside = free * (0.5 * reach * (free / jnp.where(price > 0, price, 1.0)))
    # Of value `price * radius / 2` and derivative `price`, also at radius 0.
    ball = price * (jnp.where(finite, radius, 0.0) - 0.5 * reach)
    value = jnp.sum(jnp.where(clipped, at_cap, inside)) + ball
    value = jnp.where(finite | jnp.all(clipped), value, jnp.inf)

    # Comparisons lose a NaN; one that is lost would certify.
    lost = jnp.any(jnp.isnan(slopes) | jnp.isnan(below) | jnp.isnan(above)) | ~(radius >= 0)
    return jnp.where(lost, jnp.nan, value)


@jax.jit
def _price(slopes: Array, share: Array, boxed: Array) -> Array:
    """``lam * radius`` of the maximum: what one more unit of radius is worth.

    The authors' iteration: what the ball's solution moves out of the box stays at its cap, the
    rest is stretched to the sphere again, until nothing new leaves the box. The price falls, so
    caps that bind once bind for good.

    Args:
      slopes: ``|c|``.
      share: the caps in radii, where ``boxed``.
      boxed: where a cap may bind.
    """
    resolution = jnp.finfo(slopes.dtype).eps

    def price(clipped: Array) -> Array:
        # Scaled by the largest: squares of small slopes would underflow to 0.
        free = jnp.where(clipped, 0.0, slopes)
        scale = jnp.max(free, initial=0.0)
        squares = jnp.sum(jnp.square(free / jnp.where(scale > 0, scale, 1.0)))
        # What is left of the sphere; less than its rounding cannot be told from nothing, and costs
        # no more than that rounding.
        left = 1.0 - jnp.sum(jnp.where(clipped, jnp.square(share), 0.0))
        return scale * jnp.sqrt(squares / jnp.maximum(left, resolution))

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, grew, rounds = state
        return grew & (rounds < _MOST_ROUNDS)

    def clip(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        clipped, _, rounds = state
        more = clipped | (boxed & (slopes >= price(clipped) * share))
        return more, jnp.any(more != clipped), rounds + 1

    # The box within the ball: every cap binds, at a price of 0.
    within = jnp.all(boxed) & (jnp.sum(jnp.square(share)) <= 1.0)
    first = (boxed & ((share == 0) | within), ~within, jnp.int32(0))
    return price(jax.lax.while_loop(unfinished, clip, first)[0])

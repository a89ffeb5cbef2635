"""The intersection of an l2 ball and a box, and the maximum of a linear function over it.

Box constraint propagation (Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight
Outer Bound") bounds the last layer over such sets, and so does an l2 ball cut to a clip range.
"""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from boundjax.numerics import float_info, larger, length, smaller
from boundjax.sets import rounding, trees, upward
from boundjax.sets.checks import as_float, concrete, first_index, require_finite
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.typing import Jitted, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "radius", "lower", "upper"],
    meta_fields=["outward"],
)
@dataclasses.dataclass(frozen=True)
class BallBox:
    """All `x` with `||x - center||_2 <= radius` and `lower <= x <= upper`, elementwise.

    A Lipschitz constant and interval bounds together confine a hidden layer to such a set.

    Attributes:
      center: the ball's center, any shape, or a pytree of arrays of one floating dtype. The ball is
        then one of all leaves together; what the methods take and return is a pytree.
      radius: scalar, in the units of `x`, `>= 0`; infinite if there is only the box.
      lower: of the center's shape; may be `-inf`.
      upper: of the center's shape; may be `inf`.
      outward: whether every answer holds for the exact set, as certificates need, instead of up to
        rounding. Radii and ends that are numbers or numpy arrays are then rounded outwards to the
        dtype of the center. Center and JAX arrays are exact as they are.

    `support` is exact if the center lies in the box. Otherwise the box is extended to the center,
    which gives an upper bound no larger than the support of `interval()`. A set that is unbounded
    in some feature has no middle, and its support is NaN.

    Raises:
      ValueError: for different shapes, a center that is not finite, a radius that is negative or
        NaN, `lower > upper`.

    Source: Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound".
    """

    center: Num[Array, "*shape"] | PyTree
    radius: Num[ArrayLike, ""]
    lower: Num[Array, "*shape"] | PyTree
    upper: Num[Array, "*shape"] | PyTree
    outward: bool = False

    def __post_init__(self) -> None:
        for field in ("center", "lower", "upper"):
            object.__setattr__(self, field, trees.numbers_as_array(getattr(self, field)))
        trees.require_one_structure(
            "BallBox", center=self.center, lower=self.lower, upper=self.upper
        )
        if self.outward:
            lower, upper = rounding.outward_numbers(self.lower, self.upper, self.center)
            _, radius = rounding.outward_numbers(None, self.radius, self.center)
            for field, value in (("radius", radius), ("lower", lower), ("upper", upper)):
                object.__setattr__(self, field, value)
        radius = concrete(self.radius)
        if radius is not None and not (radius >= 0).all():
            bad = ~(radius >= 0)
            raise ValueError(
                f"BallBox.radius must be >= 0, got {radius[bad].flat[0]}{first_index(bad)}"
            )
        leaves = [
            trees.named_leaves(field, getattr(self, field))
            for field in ("center", "lower", "upper")
        ]
        for name, center in leaves[0]:
            require_finite(f"BallBox.{name}", center)
        for (name, center), (_, lower), (_, upper) in zip(*leaves, strict=False):
            _require_ends(name.removeprefix("center"), center, lower, upper)

    @property
    def is_box(self) -> bool:
        """False: the ball cuts the box's corners."""
        return False

    def _radius(self) -> Array:
        radius = as_float(self.radius, as_float(self.center))
        # `__post_init__` cannot check this: a batch of sets that `vmap` returns has a radius for
        # each.
        if radius.ndim:
            raise ValueError(f"BallBox.radius must be a scalar, got shape {radius.shape}")
        return rounding.float_above(self.radius, radius.dtype) if self.outward else radius

    def _ends(self) -> tuple[Array, Array]:
        center = as_float(self.center)
        if not self.outward:
            return as_float(self.lower, center), as_float(self.upper, center)
        return (
            rounding.float_below(self.lower, center.dtype),
            rounding.float_above(self.upper, center.dtype),
        )

    def flattened(self) -> tuple[InputSet, trees.Layout | None]:
        """The set of a pytree in one flat array; itself for a set of one array.

        Raises:
          TypeError: for leaves of different floating dtypes.
        """
        if not trees.is_tree(self.center):
            return self, None
        fields = [jax.tree.leaves(field) for field in (self.center, self.lower, self.upper)]
        centers = [as_float(center) for center in fields[0]]
        trees.require_one_dtype([center.dtype for center in centers], self.center)
        parts = [
            BallBox(center, self.radius, lower, upper, self.outward)
            for center, lower, upper in zip(*fields, strict=True)
        ]
        lowers, uppers = zip(*(part._ends() for part in parts), strict=True)
        center, lower, upper = map(trees.concatenated, (centers, lowers, uppers))
        flat = BallBox(center, self.radius, lower, upper, self.outward)
        return flat, trees.Layout.of(self.center)

    def outwards(self) -> BallBox:
        """The same set with answers that hold for it exactly."""
        return self if self.outward else dataclasses.replace(self, outward=True)

    @trees.for_trees
    def interval(self) -> Interval:
        """`[center - radius, center + radius]`, cut to the box; NaN where that is empty.

        With `outward` middle and half-width, as computed, describe an interval that encloses it.
        """
        center, radius = as_float(self.center), self._radius()
        lower, upper = self._ends()
        ends = Interval(larger(lower, center - radius), smaller(upper, center + radius))
        nearest = ends.unless_empty()
        if not self.outward:
            return nearest
        least, most = rounding.outward_ends(center, jnp.broadcast_to(radius, center.shape))
        ends = Interval(lower, upper).cut(Interval(least, most))
        return rounding.enclosure(ends.unless_empty(), nearest)

    @trees.for_trees
    def ball(self) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
        """`center` and `radius`, or a smaller radius where the box ends earlier."""
        center, radius, (lower, upper) = as_float(self.center), self._radius(), self._ends()
        corner = jnp.maximum(jnp.abs(upper - center), jnp.abs(center - lower))
        nearest = jnp.minimum(radius, length(corner))
        if not self.outward:
            return center, nearest
        arguments = radius, center, lower, upper
        return rounding.flushed(center), upward.with_slack(
            upward.enclosing_radius, nearest, *arguments
        )

    @trees.for_trees
    def support(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x>`; `c` has the input's shape."""
        middle, spread = self.interval().middle, self.spread(coefficients)
        nearest = jnp.sum(coefficients * middle) + spread
        if not self.outward:
            return nearest
        return upward.with_slack(upward.support_above, nearest, coefficients, middle, spread)

    @trees.for_trees
    def spread(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x - middle>`, see `ball_box.spread`."""
        nearest = self._nearest_spread(coefficients)
        if not self.outward:
            return nearest
        arguments = coefficients, as_float(self.center), self._radius(), *self._ends()
        return upward.with_slack(_set_spread_above, nearest, *arguments, *self.interval())

    def _nearest_spread(self, coefficients: Array) -> Array:
        center, interval, (lower, upper) = as_float(self.center), self.interval(), self._ends()
        below, above = center - lower, upper - center
        shift = jnp.sum(coefficients * (center - interval.middle))
        largest = spread(coefficients, self._radius(), below, above) + shift
        # With the center inside, `largest` is exact; taking the minimum with an equal `box` would
        # average their derivatives.
        inside = jnp.all((below >= 0) & (above >= 0))
        box = jnp.sum(jnp.abs(coefficients) * interval.radius)
        return jnp.where(inside, largest, smaller(largest, box))


def _require_ends(where: str, center: Any, lower: Any, upper: Any) -> None:
    """Checks the ends of one array, unless their numbers are not known yet."""
    center, lower, upper = map(concrete, (center, lower, upper))
    if center is None or lower is None or upper is None:
        return
    if not center.shape == lower.shape == upper.shape:
        raise ValueError(
            f"BallBox needs arrays of one shape, got center{where} {center.shape}, "
            f"lower{where} {lower.shape} and upper{where} {upper.shape}"
        )
    bad = ~(lower <= upper)
    if bad.any():
        raise ValueError(
            f"BallBox needs lower{where} <= upper{where}, got {lower[bad].flat[0]} > "
            f"{upper[bad].flat[0]}{first_index(bad)}"
        )


# Stopping after any round is sound; random problems need fewer than ten.
_MOST_ROUNDS = 64


def spread(coefficients: Array, radius: ArrayLike, below: Array, above: Array) -> Array:
    """`max <c, d>` over `||d||_2 <= radius` and `-below <= d <= above`, a scalar.

    With `cap_i` the room on the side to which `c_i` pulls and any `lam >= 0`,
    `<c, d> <= sum_i max_(0 <= d_i <= cap_i) (|c_i| d_i - lam / 2 d_i^2) + lam / 2 radius^2`:
    a bound for every `lam`, and the maximum itself for one of them. The paper's iteration finds
    that one, so stopping early costs tightness but not soundness. By the envelope theorem the
    derivative is that of the formula with `lam` held constant: no solver is differentiated. The
    gradient is exact where the maximum is differentiable; there are no second derivatives.

    Args:
      coefficients: `c`, any shape.
      radius: scalar `>= 0`, may be infinite; NaN or negative gives NaN.
      below: distance to the lower end of the box, of `c`'s shape, may be infinite. Negative
        distances count as 0, which only enlarges the set.
      above: distance to the upper end.

    Returns:
      The maximum; NaN if an argument has a NaN, infinite if neither ball nor box is bounded.
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
    # Features in which the box may end before the ball; the rest is free for every `lam`. Features
    # with a coefficient of 0 gain nothing and get a cap of 0, so every cap is finite.
    boxed = (room < radius) | (room <= 0) | ~pulls
    cap = jnp.where(boxed & pulls & (room > 0), room, 0.0)

    # `price` is `lam * radius`. Unlike `lam` it stays within the range of the dtype, as do lengths
    # measured in radii.
    fixed = jax.lax.stop_gradient(radius)
    unit = jnp.where(fixed > 0, fixed, 1.0)
    price = _jitted_price(*jax.lax.stop_gradient((slopes, cap / unit, boxed)))
    clipped = jax.lax.stop_gradient(boxed & (slopes >= price * (cap / unit)))

    finite = jnp.isfinite(fixed)
    reach = jnp.where(finite, fixed, 0.0)
    at_cap = cap * (slopes - 0.5 * price * (cap / unit))
    # Set to 0 before dividing: an overflow makes gradients NaN even in the branch not taken.
    free = jnp.where(clipped, 0.0, slopes)
    inside = free * (0.5 * reach * (free / jnp.where(price > 0, price, 1.0)))
    # Its value is `price * radius / 2` and its derivative `price`, also at radius 0.
    ball = price * (jnp.where(finite, radius, 0.0) - 0.5 * reach)
    value = jnp.sum(jnp.where(clipped, at_cap, inside)) + ball
    value = jnp.where(finite | jnp.all(clipped), value, jnp.inf)

    # Comparisons drop NaN, and a NaN that is dropped would certify.
    lost = jnp.any(jnp.isnan(slopes) | jnp.isnan(below) | jnp.isnan(above)) | ~(radius >= 0)
    return jnp.where(lost, jnp.nan, value)


def spread_above(coefficients: Array, radius: Array, below: Array, above: Array) -> Array:
    """An upper bound on `max <c, d>` over `||d / radius||_2 <= 1` and `-below <= d <= above`.

    It holds for the arguments as exact numbers, however its terms are rounded, and exceeds the
    maximum by a few roundings of their sum. For any `lam > 0` and any split `0 <= g_i` of the
    slopes `|c_i|` between ball and box, with `cap_i` as in `spread`,
    `<c, d> <= lam / 2 + sum_i ((g_i radius_i)^2 / (2 lam) + max(|c_i| - g_i, 0) cap_i)`,
    because `g d <= lam / 2 (d / radius)^2 + (g radius)^2 / (2 lam)`. Computed `lam` and `g` are
    therefore as good as exact ones: only the evaluation of this formula is rounded up. It is the
    maximum for the `lam` of the paper's iteration and `g_i = min(|c_i|, lam cap_i / radius_i^2)`.

    Args:
      coefficients: `c`, any shape.
      radius: half-axes of the ball, of `c`'s shape, `>= 0`, may be infinite.
      below: as in `spread`.
      above: as in `spread`.

    Returns:
      The bound, a scalar; NaN if an argument has a NaN, infinite if nothing bounds it.
    """
    slopes, radius = rounding.raised(jnp.abs(coefficients)), rounding.raised(radius)
    # The sign of a subnormal number is in its bits only.
    room = jnp.where(jnp.signbit(coefficients), below, above)
    cap = jnp.maximum(rounding.raised(room), 0.0)
    bounded = jnp.isfinite(radius)
    reach = jnp.where(bounded & (radius > 0), radius, 1.0)
    pulls = jnp.where(bounded, slopes * radius, 0.0)
    boxed = ~bounded | (cap < radius) | ~(pulls > 0)
    share = jnp.where(boxed & (pulls > 0), cap / reach, 0.0)
    price = upward.usable_price(_jitted_price(pulls, share, boxed))

    by_ball = jnp.minimum(slopes, (price * (cap / reach)) / reach)
    by_ball = jnp.where(bounded, by_ball, 0.0)
    # A product of 0 and infinity is NaN; features that cannot move are left to the ball.
    by_ball = jnp.where(jnp.isnan(by_ball) | (radius == 0) | jnp.isinf(cap), slopes, by_ball)
    moments = upward.product_above(by_ball, jnp.where(by_ball == 0, 0.0, radius))
    by_box = jnp.maximum(rounding.sum_above(slopes, -by_ball), 0.0)
    terms = rounding.sum_above(
        upward.square_above(moments, price), upward.product_above(by_box, cap)
    )
    value = rounding.sum_above(upward.total_above(terms), upward.ball_above(moments, price))
    # Comparisons drop NaN, and a NaN that is dropped would certify.
    lost = jnp.isnan(slopes) | jnp.isnan(below) | jnp.isnan(above) | ~(radius >= 0)
    return jnp.where(jnp.any(lost), jnp.nan, value)


def _set_spread_above(
    coefficients: Array,
    center: Array,
    radius: Array,
    lower: Array,
    upper: Array,
    *interval: Array,
) -> Array:
    """An upper bound on the spread of a `BallBox` around the middle of an interval, a scalar."""
    enclosing = Interval(*interval)
    largest = spread_above(
        coefficients,
        jnp.broadcast_to(radius, center.shape),
        rounding.sum_above(center, -lower),
        rounding.sum_above(upper, -center),
    )
    centered = upward.spread_around(largest, coefficients, center, enclosing.middle)
    return jnp.minimum(centered, upward.box_above(coefficients, enclosing.radius))


def _price(slopes: Array, share: Array, boxed: Array) -> Array:
    """`lam * radius` at the maximum: the value of one more unit of radius.

    The authors' iteration: features that the ball's solution moves out of the box are fixed at
    their caps and the rest is stretched to the sphere again, until no further feature leaves the
    box. The price falls in every round, so a cap that binds once binds for good.

    Args:
      slopes: `|c|`.
      share: the caps in radii, where `boxed`.
      boxed: where a cap may bind.
    """
    resolution = float_info(slopes.dtype).eps

    def price(clipped: Array) -> Array:
        # Scaled by the largest: squares of small slopes would underflow to 0.
        free = jnp.where(clipped, 0.0, slopes)
        scale = jnp.max(free, initial=0.0)
        squares = jnp.sum(jnp.square(free / jnp.where(scale > 0, scale, 1.0)))
        # The remainder of the sphere, at least the rounding error with which it is computed.
        left = 1.0 - jnp.sum(jnp.where(clipped, jnp.square(share), 0.0))
        return scale * jnp.sqrt(squares / jnp.maximum(left, resolution))

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, grew, rounds = state
        return grew & (rounds < _MOST_ROUNDS)

    def clip(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        clipped, _, rounds = state
        more = clipped | (boxed & (slopes >= price(clipped) * share))
        return more, jnp.any(more != clipped), rounds + 1

    # If the box lies within the ball, every cap binds and the price is 0.
    within = jnp.all(boxed) & (jnp.sum(jnp.square(share)) <= 1.0)
    first = (boxed & ((share == 0) | within), ~within, jnp.int32(0))
    return price(jax.lax.while_loop(unfinished, clip, first)[0])


# Compiled even where the walk around it runs op by op, so that the loop stays fast.
_jitted_price: Jitted = jax.jit(_price)

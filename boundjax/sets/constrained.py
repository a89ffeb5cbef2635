"""Input sets with linear constraints between the inputs."""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from boundjax.numerics import float_info, larger, length, smaller, with_derivative_of
from boundjax.sets import multipliers, rounding, upward
from boundjax.sets.checks import (
    as_float,
    concrete,
    first_index,
    require_array,
    require_finite,
    require_input_set,
)
from boundjax.sets.input_set import InputSet, outwards
from boundjax.sets.interval import Interval
from boundjax.sets.trees import is_tree

# Passes over the rows in which each tightens the ends of every input.
_ROUNDS = 3


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "rows", "upper", "lower"],
    meta_fields=["outward"],
)
@dataclasses.dataclass(frozen=True)
class Constrained:
    """All `x` of a set with `lower <= rows x <= upper`: linear constraints between the inputs.

    `Constrained(box, jnp.array([[1.0, -1.0]]), jnp.zeros(1))` is the part of a box of two inputs
    where `x_0 <= x_1`. A constraint that is an equation has equal limits.

    Attributes:
      base: any input set of one array `[*shape]`, such as a `Box` or an `LpBall`.
      rows: `[k, *shape]` for `k >= 1` constraints, finite.
      upper: `[k]`, finite or `inf`.
      lower: `[k]`, finite or `-inf`; None if no row has a lower limit.
      outward: whether every answer holds for the exact set, as certificates need, instead of up to
        rounding. Limits that are numbers or numpy arrays are then rounded outwards to the dtype of
        the base, and rows must be numbers of that dtype.

    `interval()` is the box around the base, tightened by every row a few times; it need not be the
    smallest one. `support` is an upper bound by Lagrange multipliers. It misses the maximum over a
    box and constraints by less than 1e-5 of the box's own spread (in float32) as a rule; over other
    bases it is exact up to rounding for one row, and for several it may miss more.

    A set without points has no bounds, since everything holds for each of its points. Where the
    numbers are known and one set is made, that is an error. Under `jit` and `vmap` contradictions
    that the tightening or the multipliers find give NaN bounds, which never certify; what they do
    not find gives bounds that say nothing.

    Raises:
      TypeError: for a base that is not an input set.
      ValueError: for other shapes, numbers that are not finite, a lower above an upper limit, a set
        without points, or rows that are no numbers of the dtype of an `outward` set.

    Source: Boyd and Vandenberghe 2004, "Convex Optimization", 5.2 (weak duality).
    """

    base: InputSet
    rows: Num[Array, "k ..."]
    upper: Num[ArrayLike, " k"]
    lower: Num[ArrayLike, " k"] | None = None
    outward: bool = False

    def __post_init__(self) -> None:
        require_array("Constrained.rows", self.rows)
        if self.outward:
            base: Any = self.base  # or what JAX puts into pytrees
            if isinstance(base, InputSet):
                object.__setattr__(self, "base", outwards(base))
            object.__setattr__(self, "upper", rounding.number_above(self.upper, self.rows))
            if self.lower is not None:
                object.__setattr__(self, "lower", rounding.number_below(self.lower, self.rows))
        rows, upper = concrete(self.rows), concrete(self.upper)
        lower = None if self.lower is None else concrete(self.lower)
        # What JAX puts into pytrees (axes, shardings) is no array of rows; a batch of sets, which
        # `vmap` returns, is one of more dimensions. Neither can be checked here.
        if rows is None or upper is None or rows.ndim == 0 or upper.ndim != 1:
            return
        require_input_set(self.base)
        if is_tree(self.base.interval().lower):
            raise TypeError(
                "Constrained needs a base of one array, got a set of a pytree; concatenate what "
                "the constraints join, and split that array inside the function"
            )
        require_finite("Constrained.rows", rows)
        if rows.shape[:1] != upper.shape or not len(upper):
            raise ValueError(
                "Constrained needs rows [k, *shape] and limits [k] for k >= 1, got "
                f"{rows.shape} and {upper.shape}"
            )
        if lower is not None and lower.shape != upper.shape:
            raise ValueError(
                f"Constrained needs limits of one shape, got lower {lower.shape} and upper "
                f"{upper.shape}"
            )
        least = np.full(len(upper), -np.inf) if lower is None else lower.astype(np.float64)
        bad = ~((least <= upper) & (upper > -np.inf) & (least < np.inf))
        if bad.any():
            raise ValueError(
                "Constrained needs lower <= upper, finite or -inf and inf, got "
                f"{least[bad][0]} and {upper[bad][0]}{first_index(bad)}"
            )
        self._require_points(rows, least, upper)

    def _require_points(self, rows: np.ndarray, least: np.ndarray, most: np.ndarray) -> None:
        """Raises ValueError where a set whose numbers are known has none."""
        low, high = map(concrete, self.base.interval())
        if low is None or high is None:
            return
        if low.shape != rows.shape[1:]:
            raise ValueError(_shapes(rows.shape, low.shape))
        if not (np.isfinite(low) & np.isfinite(high)).all():
            return
        flat = rows.reshape(len(rows), -1).astype(np.float64)
        ends = (end.reshape(-1).astype(np.float64) for end in (low, high))
        empty = multipliers.is_empty(flat, least, most.astype(np.float64), *ends)
        if not empty and not self.base.is_box:
            like = jnp.asarray(low)
            values = [
                [float(sign * self.base.support(as_float(sign * row, like))) for sign in (-1, 1)]
                for row in rows
            ]
            # Supports are rounded: a set that a row touches has a point.
            slack = 1e-6 * np.abs(flat) @ np.maximum(abs(low), abs(high)).reshape(-1)
            smallest, largest = np.array(values).T
            empty = bool(((smallest > most + slack) | (largest < least - slack)).any())
        if empty:
            raise ValueError(
                f"Constrained needs points, but no input of the base satisfies all {len(rows)} "
                "constraints; everything would hold for an empty set"
            )

    def _exact_rows(self, like: Array) -> Array:
        """The rows as numbers of this dtype, which they must be already.

        Raises:
          ValueError: if they are not: the constraints would be others.
        """
        rows, values = as_float(self.rows, like), concrete(self.rows)
        cure = f"give the constraints that are meant: jnp.asarray(rows, jnp.{like.dtype})"
        if values is None:
            dtype = jnp.result_type(self.rows)
            if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > like.dtype.itemsize:
                raise ValueError(f"rigorous bounds need rows of {like.dtype}, got {dtype}; {cure}")
            return rows
        exact = values.astype(like.dtype).astype(values.dtype) == values
        if not exact.all():
            raise ValueError(
                f"rigorous bounds need rows of {like.dtype} numbers, got "
                f"{values[~exact].flat[0]}{first_index(~exact)}; {cure}"
            )
        return rows

    @property
    def is_box(self) -> bool:
        """False: constraints tie the inputs to one another."""
        return False

    def outwards(self) -> Constrained:
        """The same set with answers that hold for it exactly."""
        if self.outward:
            return self
        return dataclasses.replace(self, base=outwards(self.base), outward=True)

    def interval(self) -> Interval:
        """A box that contains the set; NaN where the constraints are seen to contradict.

        With `outward` middle and half-width, as computed, describe an interval that encloses it.
        """
        base = self.base.interval()
        rows, least, most = self._constraints(base.lower)
        nearest = _tightened(rows, least, most, base)
        if not self.outward:
            return nearest
        ends = _tightened_outwards(rows, least, most, Interval(*lax.stop_gradient(tuple(base))))
        return rounding.enclosure(ends.unless_empty(), nearest)

    def constraints(self) -> tuple[Array, Array, Array]:
        """Rows `[k, *shape]`, lower and upper limits `[k]`, in the dtype of the base."""
        rows, least, most = self._constraints(self.base.interval().lower)
        return rows, least, most

    def _constraints(self, like: Array) -> tuple[Array, Array, Array]:
        """Rows `[k, *shape]` and both limits `[k]`, in the dtype of an end of the base."""
        rows = self._exact_rows(like) if self.outward else as_float(self.rows, like)
        if rows.shape[1:] != like.shape:
            raise ValueError(_shapes(rows.shape, like.shape))
        lower = jnp.full(rows.shape[:1], -jnp.inf) if self.lower is None else self.lower
        if self.outward:
            most = rounding.float_above(self.upper, like.dtype)
            return rows, rounding.float_below(lower, like.dtype), most
        return rows, as_float(lower, like), as_float(self.upper, like)

    def ball(self) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
        """The middle of `interval()`, and the radius of an l2 ball around it with the set inside.

        It is that around the box, or around the base's own ball if that is smaller.
        """
        interval = self.interval()
        middle, radius = interval.middle, interval.radius
        method = getattr(self.base, "ball", None)
        if self.base.is_box or method is None:
            nearest = length(radius)
            if self.outward:
                nearest = upward.with_slack(upward.length_above, nearest, radius)
            return middle, nearest
        center, size = method()
        nearest = jnp.minimum(length(radius), size + length(middle - center))
        if not self.outward:
            return middle, nearest
        return middle, upward.with_slack(_radius_above, nearest, middle, radius, center, size)

    def support(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x>` or slightly more; `c` has the input's shape."""
        middle, spread = self.interval().middle, self.spread(coefficients)
        nearest = jnp.sum(coefficients * middle) + spread
        if not self.outward:
            return nearest
        return upward.with_slack(upward.support_above, nearest, coefficients, middle, spread)

    def spread(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <c, x - middle>` or slightly more, see `multipliers`.

        Its derivative is that of the program's Lagrangian: with respect to `c` the maximiser, with
        respect to a limit its multiplier.
        """
        interval, base = self.interval(), self.base.interval()
        rows, least, most = self._constraints(interval.lower)
        nearest, weights = _box_spread(coefficients, interval, rows, least, most)
        fixed = lax.stop_gradient((coefficients, interval, (rows, least, most)))
        if self.base.is_box:
            if not self.outward:
                return nearest
            return with_derivative_of(
                _box_spread_above(*fixed, lax.stop_gradient(weights)), nearest
            )
        around, weights_of_base = self._base_spread(coefficients, interval, base, rows, least, most)
        nearest = smaller(nearest, around)
        if not self.outward:
            return nearest
        above = jnp.minimum(
            _box_spread_above(*fixed, lax.stop_gradient(weights)),
            self._base_spread_above(*fixed, lax.stop_gradient(weights_of_base)),
        )
        return with_derivative_of(above, nearest)

    def _base_spread(
        self,
        coefficients: Array,
        interval: Interval,
        base: Interval,
        rows: Array,
        least: Array,
        most: Array,
    ) -> tuple[Array, Array]:
        """A bound by the spread of the base around its own middle, and its multipliers."""
        low, high = _limits(rows, least, most, base)
        arguments = lax.stop_gradient((coefficients, rows, low, high))
        frozen = lax.stop_gradient(self.base)
        weights = multipliers.over_set(frozen.spread, *arguments)
        rest = coefficients - _weighted(weights, rows)
        priced = jnp.sum(jnp.where(weights > 0, high, low) * weights)
        shift = jnp.sum(coefficients * (base.middle - interval.middle))
        # Below the least value on the box: only a set without points has such a bound.
        box = jnp.sum(jnp.abs(coefficients) * interval.radius)
        value = self.base.spread(rest) + priced + shift
        contradicts = ~(value >= -box - 1e-3 * jnp.sum(jnp.abs(coefficients) * base.radius))
        return jnp.where(contradicts, jnp.nan, value), weights

    def _base_spread_above(
        self,
        coefficients: Array,
        interval: Interval,
        constraints: tuple[Array, Array, Array],
        weights: Array,
    ) -> Array:
        """An upper bound on the bound of `_base_spread`, for these very multipliers."""
        rows, least, most = constraints
        base = Interval(*lax.stop_gradient(tuple(self.base.interval())))
        rest = coefficients - _weighted(weights, rows)
        spread = lax.stop_gradient(self.base).spread(rest)
        lost = _lost(coefficients, weights, rows, rest)
        total = rounding.sum_above(spread, upward.box_above(lost, base.radius))
        limits = _limits_above(rows, least, most, base)
        total = rounding.sum_above(total, upward.combination_above(weights, *limits))
        total = upward.spread_around(total, coefficients, base.middle, interval.middle)
        box = upward.box_above(coefficients, interval.radius)
        return jnp.where(total < -box, jnp.nan, total)


def _shapes(rows: tuple[int, ...], base: tuple[int, ...]) -> str:
    return (
        f"Constrained.rows must have shape [k, {', '.join(map(str, base))}] for a base of shape "
        f"{base}, got {rows}"
    )


def _weighted(weights: Array, rows: Array) -> Array:
    """`sum_j weights_j rows_j`."""
    return jnp.tensordot(weights, rows, axes=1, precision=lax.Precision.HIGHEST)


def _of_rows(function: Callable[..., Array], rows: Array, *others: Array) -> Array:
    return jax.vmap(lambda row: function(row, *others))(rows)


def _tightened(rows: Array, least: Array, most: Array, ends: Interval) -> Interval:
    """Ends that every row has tightened a few times, up to rounding."""
    axes = tuple(range(1, rows.ndim))
    usable = rows != 0
    sizes = jnp.where(usable, jnp.abs(rows), 1.0)

    def column(values: Array) -> Array:
        return values.reshape(-1, *(1 for _ in axes))

    for _ in range(_ROUNDS):
        lower, upper = (end[None] for end in ends)
        small = jnp.minimum(rows * lower, rows * upper)
        large = jnp.maximum(rows * lower, rows * upper)
        # How far each element may lead up from the least value of its row, and down from the most.
        # A small coefficient would make much of what is lost here.
        size = jnp.sum(jnp.maximum(jnp.abs(small), jnp.abs(large)), axis=axes)
        up = most - jnp.sum(small, axis=axes), most
        down = jnp.sum(large, axis=axes) - least, least
        (up, rises), (down, falls) = (
            (
                column(jnp.where(jnp.isfinite(limit), room + _lost_by(size, limit, rows), 0.0)),
                column(jnp.isfinite(limit)),
            )
            for room, limit in (up, down)
        )
        positive = rows > 0
        above = lower + jnp.where(positive, up, down) / sizes
        below = upper - jnp.where(positive, down, up) / sizes
        above = jnp.where(usable & jnp.where(positive, rises, falls), above, upper)
        below = jnp.where(usable & jnp.where(positive, falls, rises), below, lower)
        cut = Interval(jnp.max(below, axis=0), jnp.min(above, axis=0))
        cut = Interval(larger(ends.lower, cut.lower), smaller(ends.upper, cut.upper))
        ends = ends.intersect(cut)
    return ends


def _tightened_outwards(rows: Array, least: Array, most: Array, ends: Interval) -> Interval:
    """Ends that contain every point of the exact set, and cross only if there is none."""
    info, size = float_info(rows.dtype), jnp.abs(rows)
    # The reciprocals of the others are no normal numbers.
    usable = (size >= 4.0 * info.tiny) & (size <= 0.25 / info.tiny)
    sizes = jnp.where(usable, size, 1.0)

    def column(values: Array) -> Array:
        return values.reshape(-1, *(1 for _ in range(rows.ndim - 1)))

    def quotient(room: Array) -> Array:
        # A negative one is a proof that there is no point.
        room = jnp.where(room < 0, jnp.nan, rounding.raised(room))
        return column(room) / sizes * (1.0 + 8.0 * info.eps) + info.tiny

    def tighten(_: int, ends: Interval) -> Interval:
        lower, upper = ends
        least_value = _of_rows(upward.combination_above, -rows, lower, upper)
        most_value = _of_rows(upward.combination_above, rows, lower, upper)
        up = quotient(rounding.sum_above(most, least_value))
        down = quotient(rounding.sum_above(most_value, -least))
        rises, falls = jnp.where(rows > 0, up, down), jnp.where(rows > 0, down, up)
        shape = rows.shape
        above = rounding.sum_above(jnp.broadcast_to(lower[None], shape), rises)
        below = -rounding.sum_above(jnp.broadcast_to(-upper[None], shape), falls)
        cut = Interval(
            jnp.max(jnp.where(usable, below, lower[None]), axis=0),
            jnp.min(jnp.where(usable, above, upper[None]), axis=0),
        )
        return ends.cut(cut)

    return lax.fori_loop(0, _ROUNDS, tighten, ends)


def _limits(rows: Array, least: Array, most: Array, ends: Interval) -> tuple[Array, Array]:
    """Both limits of `rows (x - middle)`, which are finite: a box limits every row as well."""
    axes = tuple(range(1, rows.ndim))
    reach = jnp.sum(jnp.abs(rows) * ends.radius[None], axis=axes)
    terms = rows * ends.middle[None]
    at_middle, size = jnp.sum(terms, axis=axes), jnp.sum(jnp.abs(terms), axis=axes)
    below = least - at_middle - _lost_by(size, least, rows)
    above = most - at_middle + _lost_by(size, most, rows)
    return jnp.maximum(below, -reach), jnp.minimum(above, reach)


def _lost_by(size: Array, limit: Array, rows: Array) -> Array:
    """What the difference of a limit and the sum of a row may lose, also where it is not a proof.

    Multipliers and divisions by coefficients would enlarge it. No gradient flows in it.
    """
    size = lax.stop_gradient(size + jnp.where(jnp.isfinite(limit), jnp.abs(limit), 0.0))
    return size * rounding.Arithmetic.of(size.dtype).gamma(rows[0].size)


def _limits_above(rows: Array, least: Array, most: Array, ends: Interval) -> tuple[Array, Array]:
    """`_limits`, rounded outwards."""
    middle, reach = ends.middle, _of_rows(upward.box_above, rows, ends.radius)
    above = rounding.sum_above(most, _of_rows(upward.combination_above, -rows, middle, middle))
    below = rounding.sum_above(-least, _of_rows(upward.combination_above, rows, middle, middle))
    return -jnp.minimum(below, reach), jnp.minimum(above, reach)


def _box_spread(
    coefficients: Array, interval: Interval, rows: Array, least: Array, most: Array
) -> tuple[Array, Array]:
    """A bound on `max <c, x - middle>` over a box and constraints, and its multipliers `[k]`."""
    radius = interval.radius
    low, high = _limits(rows, least, most, interval)
    flat = (coefficients.reshape(-1), radius.reshape(-1), rows.reshape(len(rows), -1), low, high)
    weights, shares = multipliers.over_box(*lax.stop_gradient(flat))
    shares = shares.reshape(radius.shape)
    rest = coefficients - _weighted(weights, rows)
    priced = jnp.sum(jnp.where(weights > 0, high, low) * weights)
    box = jnp.sum(jnp.abs(coefficients) * radius)
    value = jnp.sum(jnp.abs(rest) * radius) + priced
    # The coefficient of an element between its ends is 0 up to rounding, whose sign says nothing.
    formula = jnp.sum(rest * shares * radius) + priced
    # Below the least value on the box: only a set without points has such a bound.
    value = jnp.where(value < -1.001 * box, jnp.nan, jnp.maximum(value, -box))
    bound = with_derivative_of(value, formula)
    return jnp.where(value < box, bound, jnp.where(jnp.isnan(value), jnp.nan, box)), weights


def _box_spread_above(
    coefficients: Array,
    interval: Interval,
    constraints: tuple[Array, Array, Array],
    weights: Array,
) -> Array:
    """An upper bound on the bound of `_box_spread`, for these very multipliers, a scalar."""
    rows, least, most = constraints
    box = upward.box_above(coefficients, interval.radius)
    low, high = _limits_above(rows, least, most, interval)
    rest = coefficients - _weighted(weights, rows)
    lost = _lost(coefficients, weights, rows, rest)
    total = rounding.sum_above(
        upward.box_above(rest, interval.radius), upward.box_above(lost, interval.radius)
    )
    total = rounding.sum_above(total, upward.combination_above(weights, low, high))
    total = jnp.where(total < -box, jnp.nan, total)
    return jnp.minimum(total, box)


def _lost(coefficients: Array, weights: Array, rows: Array, rest: Array) -> Array:
    """At least the distance of `rest`, elementwise, from the exact `c - weights rows`."""
    factors = jnp.concatenate([jnp.ones_like(weights[:1]), -weights, -jnp.ones_like(weights[:1])])
    values = jnp.concatenate([coefficients[None], rows, rest[None]]).reshape(len(factors), -1)
    above = jax.vmap(
        lambda column: jnp.maximum(
            upward.combination_above(factors, column, column),
            upward.combination_above(-factors, column, column),
        )
    )(values.T)
    return jnp.maximum(above, 0.0).reshape(rest.shape)


def _radius_above(middle: Array, radius: Array, center: Array, size: Array) -> Array:
    """The radius of a ball around `middle` with a box and a ball around `center` inside."""
    apart = jnp.maximum(rounding.sum_above(middle, -center), rounding.sum_above(center, -middle))
    moved = rounding.sum_above(size, upward.length_above(apart))
    return jnp.minimum(upward.length_above(radius), moved)

"""Log-sum-exp and log-softmax: functions of a whole row.

They occur as named composites, by which rewrites replace patterns in a traced function. The softmax
is `exp(log_softmax(x))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.ir.families import Error, Joint, Planes, Position
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import signed_parts
from boundjax.ops.product import rounding
from boundjax.ops.rows import (
    axes_of,
    first_largest,
    from_rows,
    row_error,
    row_size,
    rows_of,
    sum_of_others,
    to_rows,
)
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic


def logsumexp(x: Array, axes: tuple[int, ...]) -> Array:
    """`log sum exp(x)` over `axes`, which are dropped."""
    shift = lax.stop_gradient(jnp.max(x, axes, keepdims=True, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    return jnp.log(jnp.sum(jnp.exp(x - shift), axes)) + jnp.squeeze(shift, axes)


def log_softmax(x: Array, axes: tuple[int, ...], least: float | None = None) -> Array:
    """`x - logsumexp(x)`, normalised over `axes`.

    Rows with an entry below `least` that is not -inf are NaN, and where an entry may be below it
    bounds are infinite: there -inf does not stand for the number that fills a mask.
    """
    if least is not None:
        low = ((x < least) & (x > -jnp.inf)).any(axes, keepdims=True)
        x = jnp.where(low, jnp.nan, x)
    return x - jnp.expand_dims(logsumexp(x, axes), axes)


# --- sums of exponentials -------------------------------------------------------------------------


def _total(values: Array) -> Array:
    """Log-sum-exp of rows `[..., n] -> [..., 1]`; entries may be -inf."""
    shift = lax.stop_gradient(jnp.max(values, -1, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    total = jnp.sum(jnp.exp(values - shift), -1, keepdims=True)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, shift + jnp.log(jnp.where(empty, 1.0, total)))


def _total_of_others(values: Array) -> Array:
    """For each entry of `[..., n]`, the log-sum-exp of the other entries; n > 1."""
    first = first_largest(values)
    shift = lax.stop_gradient(jnp.max(values, -1, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    terms = jnp.where(first, 0.0, jnp.exp(values - shift))
    # The largest term, 1, is part of the sum for every other entry.
    rest = jnp.sum(terms, -1, keepdims=True) - terms
    largest_term = jnp.sum(jnp.where(first, jnp.exp(values - shift), 0.0), -1, keepdims=True)
    total = jnp.where(first, 1.0, largest_term + signed_parts(rest)[1])
    return jnp.where(first, _total(jnp.where(first, -jnp.inf, values)), shift + jnp.log(total))


# --- intervals ------------------------------------------------------------------------------------


def _logsumexp_image(node: Node, x: Interval) -> Interval:
    axes = axes_of(node, x.lower.ndim)
    ends = []
    for sign, end in zip((-1.0, 1.0), rows_of(x, axes), strict=True):
        value = _total(end)
        slack = rounding(1.0 + jnp.abs(value))
        ends.append(jnp.where(jnp.isinf(value), value, value + sign * slack))
    return Interval(*(end.reshape(node.shape) for end in ends))


def _low(node: Node, x: Interval) -> Array:
    """Rows `[..., 1]` of log-softmax's operand with an entry that may be below `least`."""
    rows = rows_of(x, axes_of(node, x.lower.ndim))
    low = (rows.lower < node.params.get("least", -jnp.inf)) & (rows.upper > -jnp.inf)
    return low.any(-1, keepdims=True)


def _log_softmax_image(node: Node, x: Interval) -> Interval:
    """The exact range: `-log(1 + sum_{j != i} exp(x_j - x_i))` at two opposite corners."""
    axes = axes_of(node, x.lower.ndim)
    rows = rows_of(x, axes)
    ends = []
    for sign, entry, opposite in ((-1.0, rows.lower, rows.upper), (1.0, rows.upper, rows.lower)):
        if entry.shape[-1] == 1:
            ends.append(jnp.where(jnp.isnan(entry), jnp.nan, jnp.zeros_like(entry)))
            continue
        rest = _total_of_others(opposite)
        value = -jax.nn.softplus(rest - entry)
        # Softplus passes on the rounding of its argument in proportion to its derivative: a few
        # units of the sum, and half a unit of the difference.
        passed = jax.nn.sigmoid(rest - entry)
        moved_by = passed * (jnp.abs(rest) + jnp.abs(rest - entry) / 8.0)
        # With all other entries masked by -inf the argument is infinite, but nothing is passed on.
        size = jnp.where(passed == 0, 0.0, moved_by) - value
        # A masked entry may be the least finite number, with which the sum overflows. Clip the sum
        # before rounding it, as XLA may merge several roundings into one of their sum.
        greatest = float(jnp.finfo(value.dtype).max)
        slack = rounding(jnp.minimum(size, greatest))
        moved = jnp.maximum(value + sign * slack, jnp.finfo(value.dtype).min)
        ends.append(jnp.where(jnp.isinf(value), value, jnp.minimum(moved, 0.0)))
    if "least" in node.params:
        low = _low(node, x)
        ends = [jnp.where(low, most, end) for most, end in zip((-jnp.inf, 0.0), ends, strict=True)]
    return Interval(*(from_rows(end, axes, node.shape) for end in ends))


# --- planes of log-sum-exp ------------------------------------------------------------------------

# Rows whose weights' logarithms round by more than this get constant planes.
_MOST_ROUNDING = 0.1
# An entry this far below another's lower end has no weight, as its exp is 0 in float32.
_FAR = 200.0

# A linear function below or above log-sum-exp: rows of weights, and an offset per row.
Plane = tuple[Array, Array]


def _tangent(x: Interval, masked: Array, position: Array) -> Plane:
    """A plane below log-sum-exp, which is convex: its tangent at `position` between the ends."""
    # A weighted mean of the ends would overflow at a mask's -1e38 (see `Interval.finite_middle`).
    point = jnp.where(masked, 0.0, x.lower + position * (x.upper - x.lower))
    shift = lax.stop_gradient(jnp.max(jnp.where(masked, -jnp.inf, point), -1, keepdims=True))
    # exp(point - total) would be off by the rounding of the total.
    terms = jnp.where(masked, 0.0, jnp.exp(jnp.where(masked, 0.0, point - shift)))
    sum_of_terms = jnp.sum(terms, -1, keepdims=True)
    total, slopes = shift + jnp.log(sum_of_terms), terms / sum_of_terms
    offset = total - jnp.sum(slopes * point, -1, keepdims=True)
    size = jnp.sum(slopes * x.largest, -1, keepdims=True) + jnp.abs(total)
    # The error of a slope counts in proportion to its entry's distance from the point.
    reach = slopes * (1.0 + jnp.abs(point - shift)) * (x.upper - x.lower)
    return slopes, offset - rounding(size + jnp.sum(reach, -1, keepdims=True))


def _best_shift(x: Interval, masked: Array) -> Array:
    """The shift `c` with which `_chord` is lowest at the middle of the box.

    The value there is `log sum_j exp(m_j) cosh(R_j)`, which is convex in `c`. Its derivative in
    `c_k` has the sign of `sum_j w_j - 2 w_k` with `w_j = exp(m_j) sinh(R_j)`. So `c = 0` is best,
    unless one `w_p` exceeds the sum of the others. Then the best `c_p` makes both equal, which
    solves to `c_p r_p = (LSE(u_p, others' l) - LSE(l_p, others' u)) / 2`, and the value becomes the
    mean of these two LSEs. They are attained at opposite vertices, whose middle is that of the box:
    no plane above log-sum-exp is lower there.
    """
    m, r = x.finite_middle, x.finite_radius
    # log(exp(u) - exp(l)), up to the factor 2.
    positive = r > 0
    safe = jnp.where(positive, r, 1.0)
    growth = jnp.where(positive, m + safe + jnp.log(-jnp.expm1(-2.0 * safe)), -jnp.inf)
    fastest = first_largest(lax.stop_gradient(growth))
    high = _total(jnp.where(masked, -jnp.inf, jnp.where(fastest, x.upper, x.lower)))
    low = _total(jnp.where(masked, -jnp.inf, jnp.where(fastest, x.lower, x.upper)))
    # On a narrow interval there is nothing to gain, and the quotient would be mostly rounding.
    wide = fastest & (r > 1e-3 * (1.0 + jnp.abs(m)))
    share = 0.5 * (high - low) / jnp.where(wide, r, 1.0)
    return jnp.where(wide & (share > 0), jnp.minimum(share, 1.0), 0.0)


def _log_mean_slope(r: Array) -> Array:
    """`log(sinh(r) / r)` for `r >= 0`; a series near 0, where the quotient has no derivative."""
    small = r < 0.03
    safe = jnp.where(small, 1.0, r)
    square = jnp.square(jnp.where(small, r, 0.0))
    series = square * (1.0 / 6.0 - square * (1.0 / 180.0 - square / 2835.0))
    return jnp.where(small, series, safe + jnp.log(-jnp.expm1(-2.0 * safe) / (2.0 * safe)))


def _chord(x: Interval, masked: Array, shift: Array) -> Plane:
    """A plane above log-sum-exp, for any shift `c` in `[0, 1]^n`.

    `LSE(x) = c x + log sum_j exp(d_j)` with `d_j = x_j - c x`, which lies within
    `R_j = (1 - c_j) r_j + sum_{k != j} c_k r_k` of its middle `a_j`. There exp lies below its
    chord, which has the value `exp(a_j) cosh(R_j)` at the middle and the slope
    `exp(a_j) sinh(R_j) / R_j`, and the logarithm of the sum of chords lies below its tangent at the
    middle.
    """
    m, r = x.finite_middle, x.finite_radius
    c = jnp.where(r > 0, shift, 0.0)  # not for fixed entries, such as a mask's -1e38
    moved = c * r
    reach = (1.0 - c) * r + sum_of_others(moved)
    base = jnp.sum(c * m, -1, keepdims=True)
    a = jnp.where(masked, -jnp.inf, m - base)
    log_cosh = reach + jnp.log1p(jnp.exp(-2.0 * reach)) - float(np.log(2.0))
    total = _total(a + log_cosh)
    slopes_of_d = jnp.exp(a + _log_mean_slope(reach) - total)
    slopes = slopes_of_d + c * (1.0 - jnp.sum(slopes_of_d, -1, keepdims=True))
    offset = base + total - jnp.sum(slopes * m, -1, keepdims=True)
    size = (jnp.abs(slopes) + c) * x.largest + slopes_of_d * reach
    size = jnp.sum(size, -1, keepdims=True) + jnp.abs(base) + jnp.abs(total)
    # The error of a slope, from the rounding of its logarithm, counts in proportion to its entry's
    # distance from the middle.
    logarithms = jnp.where(masked, 0.0, jnp.abs(m - base)) + jnp.abs(base) + reach + jnp.abs(total)
    errors = slopes_of_d * jnp.expm1(jnp.minimum(rounding(logarithms), 1.0))
    slack = jnp.sum(errors * r, -1, keepdims=True)
    slack += jnp.sum(moved, -1, keepdims=True) * jnp.sum(errors, -1, keepdims=True)
    return slopes, offset + rounding(size) + lax.stop_gradient(slack)


def _split(x: Interval) -> tuple[Interval, Array, Array]:
    """Rows with finite ends, which entries are masked by -inf, and which rows are unbounded.

    A masked entry adds nothing to the sum. A row that is masked entirely counts as unbounded.
    """
    masked = x.upper == -jnp.inf
    open_ended = (x.unbounded & ~masked).any(-1, keepdims=True)
    open_ended = open_ended | masked.all(-1, keepdims=True)
    bounded = Interval(*(jnp.where(open_ended | masked, 0.0, end) for end in x))
    return bounded, masked & ~open_ended, open_ended


def _logsumexp_rows(x: Interval, at: Array, shift: Array) -> tuple[Plane, Plane]:
    """The planes below and above rows `[..., n]`, constant where a row is unbounded."""
    bounded, masked, open_ended = _split(x)

    def either(plane: Plane, constant: Array) -> Plane:
        slopes, offset = plane
        return jnp.where(open_ended, 0.0, slopes), jnp.where(open_ended, constant, offset)

    low, high = _total(x.lower), _total(x.upper)
    low, high = low - rounding(1.0 + jnp.abs(low)), high + rounding(1.0 + jnp.abs(high))
    below, above = _tangent(bounded, masked, at), _chord(bounded, masked, shift)
    # In a row of such large entries no digit of a weight is right. Far entries have no weight.
    counts = ~masked & (bounded.upper > bounded.lower.max(-1, keepdims=True) - _FAR)
    size = jnp.where(counts, bounded.largest, 0.0).max(-1, keepdims=True)
    open_ended = open_ended | (rounding(size) > _MOST_ROUNDING)
    return either(below, low), either(above, high)


def _free(x: Interval, axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Default positions in the operand's shape: the tangent's point and the chord's shift."""
    bounded, masked, _ = _split(rows_of(x, axes))
    best = _best_shift(bounded, masked)
    return jnp.full(shape, 0.5, x.lower.dtype), from_rows(best, axes, shape)


def _logsumexp_planes(node: Node, x: Interval, *, position: Position) -> Planes:
    axes = axes_of(node, x.lower.ndim)
    at, shift = _free(x, axes, x.lower.shape)
    shift, at = position(x.lower, x.upper, shift), position(x.lower, x.upper, at)
    below, above = _logsumexp_rows(rows_of(x, axes), to_rows(at, axes), to_rows(shift, axes))

    def product(weights: tuple[Array], value: Array) -> Array:
        return jnp.sum(weights[0] * value, axes)

    def plane(rows: Plane) -> tuple[tuple[Array], Array]:
        return (from_rows(rows[0], axes, x.lower.shape),), rows[1].reshape(node.shape)

    return Planes(product, *plane(below), *plane(above))


def _log_softmax_planes(node: Node, x: Interval, *, position: Position) -> Planes:
    """`x_i` minus the planes of log-sum-exp, which all entries of a row share.

    No other planes are tighter at the middle of the box, as `x_i` is linear.
    """
    axes = axes_of(node, x.lower.ndim)
    if "least" in node.params:
        low = from_rows(_low(node, x), axes, node.shape)
        x = Interval(jnp.where(low, -jnp.inf, x.lower), jnp.where(low, jnp.inf, x.upper))
    at, shift = _free(x, axes, node.shape)
    at, shift = position(x.lower, x.upper, at), position(x.lower, x.upper, shift)
    below, above = _logsumexp_rows(rows_of(x, axes), to_rows(at, axes), to_rows(shift, axes))

    def product(weights: tuple[Array, Array], value: Array) -> Array:
        # `a_i x_i + sum_{j != i} b_j x_j` increases with x where the weights are positive.
        a, b = weights
        total = jnp.sum(b * value, axes, keepdims=True)
        return (a - b) * value + jnp.broadcast_to(total, value.shape)

    # The rounding of `a - b`, 1 - slope + slope.
    slack = rounding(jnp.where(jnp.isfinite(x.lower + x.upper), x.largest, 0.0))

    def plane(rows: Plane, sign: float) -> tuple[tuple[Array, Array], Array]:
        slopes, offset = (from_rows(part, axes, node.shape) for part in rows)
        return (1.0 - slopes, -slopes), sign * slack - offset

    return Planes(product, *plane(above, -1.0), *plane(below, 1.0))


# --- errors ---------------------------------------------------------------------------------------


def _logarithmic_error(node: Node, sizes: Sequence[Array], arithmetic: Arithmetic) -> Error:
    """Differences from the largest element, whose error is relative to the elements' size."""
    relative = row_error(node, arithmetic)
    return Error(relative * jnp.max(sizes[0], initial=0.0), relative)


# --- Lipschitz constants --------------------------------------------------------------------------


def _log_softmax_lipschitz(node: Node) -> tuple[float]:
    """The Jacobian `I - 1 p^T` is an oblique projection, as long as `1 p^T`: `sqrt(n) |p|_2`."""
    count = row_size(node)
    return (math.sqrt(count) if count > 1 else 0.0,)


def _softmax_lipschitz(node: Node, then: Node) -> float | None:
    """Of `exp(log_softmax(x))`: 1/2 between l2 norms, and between all other p-norms.

    The rows of the symmetric Jacobian `diag(p) - p p^T` have the absolute sums `2 p_i (1 - p_i)`,
    which are at most 1/2, and bound its spectral norm.
    """
    del node
    return 0.5 if then.primitive == "exp" else None


# --- the table ------------------------------------------------------------------------------------

register(
    Joint(
        name="logsumexp",
        note="of a perturbed array, over axes",
        image=_logsumexp_image,
        planes=_logsumexp_planes,
        error=_logarithmic_error,
        lipschitz=lambda node: (1.0,),  # its gradient is a softmax
    )
)
register(
    Joint(
        name="log_softmax",
        note="softmax is its exp",
        image=_log_softmax_image,
        planes=_log_softmax_planes,
        error=_logarithmic_error,
        lipschitz=_log_softmax_lipschitz,
        lipschitz_with=_softmax_lipschitz,
    )
)

"""Log-softmax, log-sum-exp and normalisation to unit variance: functions of a whole row at once.

They occur as named composites: patterns of a traced function are written as one of the functions
``log_softmax``, ``logsumexp`` and ``normalize``. The softmax is ``exp(log_softmax(x))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.ir.families import Joint, Planes, Position
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, signed_parts, smaller
from boundjax.ops.product import (
    center,
    corner_products,
    largest,
    product_planes,
    radius,
    rounding,
    unbounded,
)
from boundjax.sets.interval import Interval


def logsumexp(x: Array, axes: tuple[int, ...]) -> Array:
    """``log sum exp(x)`` over ``axes``, which are dropped."""
    shift = lax.stop_gradient(jnp.max(x, axes, keepdims=True, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    return jnp.log(jnp.sum(jnp.exp(x - shift), axes)) + jnp.squeeze(shift, axes)


def log_softmax(x: Array, axes: tuple[int, ...]) -> Array:
    """``x - logsumexp(x)``, normalised over ``axes``."""
    return x - jnp.expand_dims(logsumexp(x, axes), axes)


def normalize(d: Array, r: Array, axes: tuple[int, ...], eps: float) -> Array:
    """``d r``, for ``r = 1 / sqrt(mean(d^2) + eps)`` with the mean over ``axes``, in d's shape.

    The bounds rely on what ``r`` is.
    """
    del axes, eps
    return d * r


# --- rows -----------------------------------------------------------------------------------------


def _axes(node: Node, ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in node.params["axes"])


def _to_rows(value: Array, axes: tuple[int, ...]) -> Array:
    """``[..., n]``: the axes moved to the end and made one."""
    kept = value.ndim - len(axes)
    moved = jnp.moveaxis(value, axes, range(kept, value.ndim))
    return moved.reshape(*moved.shape[:kept], math.prod(moved.shape[kept:]))


def _from_rows(rows: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Back to ``shape``; entries that a whole row shares (``n = 1``) are repeated."""
    kept = [size for axis, size in enumerate(shape) if axis not in axes]
    sizes = [shape[axis] for axis in axes]
    full = jnp.broadcast_to(rows, (*rows.shape[:-1], int(np.prod(sizes))))
    return jnp.moveaxis(full.reshape(*kept, *sizes), range(len(kept), len(shape)), axes)


def _rows_of(x: Interval, axes: tuple[int, ...]) -> Interval:
    """Rows of an interval; a row with one NaN end has no other."""
    lower, upper = (_to_rows(end, axes) for end in x)
    bad = (jnp.isnan(lower) | jnp.isnan(upper)).any(-1, keepdims=True)
    return Interval(jnp.where(bad, jnp.nan, lower), jnp.where(bad, jnp.nan, upper))


def _sum_of_others(terms: Array) -> Array:
    """Per entry of ``[..., n]`` non-negative terms the sum of the others.

    The total minus the entry loses no digits where another entry is at least as large; the sum
    without the largest is made separately.
    """
    first = _first_largest(terms)
    rest = jnp.sum(jnp.where(first, 0.0, terms), -1, keepdims=True)
    total = jnp.sum(terms, -1, keepdims=True)
    return jnp.where(first, rest, total - jnp.where(first, 0.0, terms))


def _first_largest(values: Array) -> Array:
    index = jnp.argmax(values, -1, keepdims=True)
    return index == jnp.arange(values.shape[-1]).reshape((1,) * (values.ndim - 1) + (-1,))


def _total(values: Array) -> Array:
    """Log-sum-exp of rows ``[..., n] -> [..., 1]``; entries may be -inf."""
    shift = lax.stop_gradient(jnp.max(values, -1, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    total = jnp.sum(jnp.exp(values - shift), -1, keepdims=True)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, shift + jnp.log(jnp.where(empty, 1.0, total)))


def _total_of_others(values: Array) -> Array:
    """Per entry of ``[..., n]`` the log-sum-exp of the others, as ``_sum_of_others``; n > 1."""
    first = _first_largest(values)
    shift = lax.stop_gradient(jnp.max(values, -1, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    terms = jnp.where(first, 0.0, jnp.exp(values - shift))
    # The largest term is 1, and in the sum of the others of every entry but its own.
    others = jnp.sum(terms, -1, keepdims=True) - terms
    largest_term = jnp.sum(jnp.where(first, jnp.exp(values - shift), 0.0), -1, keepdims=True)
    total = jnp.where(first, 1.0, largest_term + signed_parts(others)[1])
    return jnp.where(first, _total(jnp.where(first, -jnp.inf, values)), shift + jnp.log(total))


# --- intervals ------------------------------------------------------------------------------------


def _logsumexp_image(node: Node, x: Interval) -> Interval:
    axes = _axes(node, x.lower.ndim)
    ends = []
    for sign, end in zip((-1.0, 1.0), _rows_of(x, axes), strict=True):
        value = _total(end)
        slack = rounding(1.0 + jnp.abs(value))
        ends.append(jnp.where(jnp.isinf(value), value, value + sign * slack))
    return Interval(*(end.reshape(node.shape) for end in ends))


def _log_softmax_image(node: Node, x: Interval) -> Interval:
    """The exact range: ``-log(1 + sum_{j != i} exp(x_j - x_i))`` at two opposite corners."""
    axes = _axes(node, x.lower.ndim)
    rows = _rows_of(x, axes)
    ends = []
    for sign, own, others in ((-1.0, rows.lower, rows.upper), (1.0, rows.upper, rows.lower)):
        if own.shape[-1] == 1:
            ends.append(jnp.where(jnp.isnan(own), jnp.nan, jnp.zeros_like(own)))
            continue
        rest = _total_of_others(others)
        value = -jax.nn.softplus(rest - own)
        # The derivative of softplus passes on the rounding of its argument: that of the sum, a few
        # units, and that of the difference, half a unit.
        passed = jax.nn.sigmoid(rest - own)
        moved_by = passed * (jnp.abs(rest) + jnp.abs(rest - own) / 8.0)
        # An entry that stands alone, all others masked by -inf: infinite, and nothing of it passed.
        size = jnp.where(passed == 0, 0.0, moved_by) - value
        # A masked entry may stand at the least number there is, and then the sum overflows. XLA may
        # make one sum of several roundings, so this one is written out and cut.
        greatest = float(jnp.finfo(value.dtype).max)
        slack = rounding(jnp.minimum(size, greatest))
        moved = jnp.maximum(value + sign * slack, jnp.finfo(value.dtype).min)
        ends.append(jnp.where(jnp.isinf(value), value, jnp.minimum(moved, 0.0)))
    return Interval(*(_from_rows(end, axes, node.shape) for end in ends))


def _normalize_image(node: Node, d: Interval, r: Interval) -> Interval:
    """The product's interval, intersected with that of ``d_i / sqrt((d_i^2 + S_i) / N + eps)``.

    ``S_i``, the sum of the others' squares, varies independently of ``d_i``; the quotient grows
    with ``d_i``, and shrinks in magnitude as ``S_i`` grows. It lies within ``sqrt(N)`` of 0.
    """
    axes = _axes(node, d.lower.ndim)
    rows = _rows_of(d, axes)
    count = rows.lower.shape[-1]
    eps = float(node.params["eps"])
    # Rows of large values are scaled, so that no square overflows.
    scale = lax.stop_gradient(jnp.max(largest(rows), -1, keepdims=True))
    scale = jnp.where(scale > 1.0, scale, 1.0)
    lower, upper = rows.lower / scale, rows.upper / scale
    least = signed_parts(larger(lower, -upper))[1]  # the distance of the interval from 0
    greatest = larger(jnp.abs(lower), jnp.abs(upper))
    fewest, most = (_sum_of_others(jnp.square(end)) / count for end in (least, greatest))
    bound = float(np.sqrt(count)) * (1.0 + 8.0 * float(jnp.finfo(lower.dtype).eps))

    def quotient(end: Array, sign: float) -> Array:
        others = jnp.where(sign * end > 0, fewest, most)
        variance = jnp.square(end) / count + others + eps / scale / scale
        positive = variance > 0
        value = end / jnp.sqrt(jnp.where(positive, variance, 1.0))
        value = value + sign * rounding(jnp.abs(value))
        return jnp.where(positive, jnp.clip(value, -bound, bound), sign * bound)

    def known(value: Array, otherwise: float) -> Array:
        # An infinite end is no number to divide by; NaN stays.
        infinite = unbounded(rows).any(-1, keepdims=True)
        nan = jnp.isnan(rows.lower)
        value = jnp.where(infinite, otherwise, jnp.where(nan, jnp.nan, value))
        return _from_rows(value, axes, node.shape)

    product = corner_products(d, r)
    low = larger(product.lower, known(quotient(lower, -1.0), -jnp.inf))
    high = smaller(product.upper, known(quotient(upper, 1.0), jnp.inf))
    # Ends that cross do so by rounding, or because r is not what it should be: no bound then.
    wrong = low - high > 1e-3 * (1.0 + jnp.abs(low) + jnp.abs(high))
    ends = smaller(low, high), larger(low, high)
    return Interval(*(jnp.where(wrong, jnp.nan, end) for end in ends))


# --- planes of log-sum-exp ------------------------------------------------------------------------

# Of the logarithm of a weight; planes of rows with more of it are constant.
_MOST_ROUNDING = 0.1
# Below the others' lower ends, from where an entry has no weight: exp of it is 0 in float32.
_FAR = 200.0

# A function from rows of weights and an offset per row, both below or above log-sum-exp.
Plane = tuple[Array, Array]


def _tangent(x: Interval, masked: Array, position: Array) -> Plane:
    """A plane below log-sum-exp, which is convex: its tangent at ``position`` between the ends."""
    # Not a mean of the ends, whose sum overflows at a mask's -1e38 (see `product.center`).
    point = jnp.where(masked, 0.0, x.lower + position * (x.upper - x.lower))
    shift = lax.stop_gradient(jnp.max(jnp.where(masked, -jnp.inf, point), -1, keepdims=True))
    # Not exp(point - total), which has the rounding of the total for an error.
    terms = jnp.where(masked, 0.0, jnp.exp(jnp.where(masked, 0.0, point - shift)))
    sum_of_terms = jnp.sum(terms, -1, keepdims=True)
    total, slopes = shift + jnp.log(sum_of_terms), terms / sum_of_terms
    offset = total - jnp.sum(slopes * point, -1, keepdims=True)
    size = jnp.sum(slopes * largest(x), -1, keepdims=True) + jnp.abs(total)
    # What is wrong in a slope counts as far as its entry goes from the point.
    reach = slopes * (1.0 + jnp.abs(point - shift)) * (x.upper - x.lower)
    return slopes, offset - rounding(size + jnp.sum(reach, -1, keepdims=True))


def _best_shift(x: Interval, masked: Array) -> Array:
    """The shift ``c`` with which ``_chord`` is lowest at the middle of the box.

    In ``log sum_j exp(m_j) cosh(R_j)``, its value there (convex in ``c``), the derivative in
    ``c_k`` has the sign of ``sum_j w_j - 2 w_k`` with ``w_j = exp(m_j) sinh(R_j)``. So ``c = 0`` is
    best, unless one ``w_p`` is more than the sum of the others. Then ``c_p`` makes it equal to that
    sum, which solves to ``c_p r_p = (LSE(u_p, others' l) - LSE(l_p, others' u)) / 2``; the value
    becomes the mean of these two. They are attained at opposite vertices, whose middle is that of
    the box: no plane above log-sum-exp is lower there.
    """
    m, r = center(x), radius(x)
    # log(exp(u) - exp(l)), up to the factor 2.
    positive = r > 0
    safe = jnp.where(positive, r, 1.0)
    growth = jnp.where(positive, m + safe + jnp.log(-jnp.expm1(-2.0 * safe)), -jnp.inf)
    chosen = _first_largest(lax.stop_gradient(growth))
    high = _total(jnp.where(masked, -jnp.inf, jnp.where(chosen, x.upper, x.lower)))
    low = _total(jnp.where(masked, -jnp.inf, jnp.where(chosen, x.lower, x.upper)))
    # In a narrow interval nothing is to be gained, and the quotient would be rounding.
    wide = chosen & (r > 1e-3 * (1.0 + jnp.abs(m)))
    share = 0.5 * (high - low) / jnp.where(wide, r, 1.0)
    return jnp.where(wide & (share > 0), jnp.minimum(share, 1.0), 0.0)


def _log_mean_slope(r: Array) -> Array:
    """``log(sinh(r) / r)`` for ``r >= 0``; the series where the quotient has no derivative."""
    small = r < 0.03
    safe = jnp.where(small, 1.0, r)
    square = jnp.square(jnp.where(small, r, 0.0))
    series = square * (1.0 / 6.0 - square * (1.0 / 180.0 - square / 2835.0))
    return jnp.where(small, series, safe + jnp.log(-jnp.expm1(-2.0 * safe) / (2.0 * safe)))


def _chord(x: Interval, masked: Array, shift: Array) -> Plane:
    """A plane above log-sum-exp, for any shift ``c`` in ``[0, 1]^n``.

    ``LSE(x) = c x + log sum_j exp(d_j)`` with ``d_j = x_j - c x``, which lies within
    ``R_j = (1 - c_j) r_j + sum_{k != j} c_k r_k`` of its middle ``a_j``. There exp is below its
    chord, of value ``exp(a_j) cosh(R_j)`` at the middle and slope ``exp(a_j) sinh(R_j) / R_j``, and
    the logarithm of the sum of chords is below its tangent at the middle.
    """
    m, r = center(x), radius(x)
    c = jnp.where(r > 0, shift, 0.0)  # a fixed entry has no part: it may be a mask's -1e38
    moved = c * r
    reach = (1.0 - c) * r + _sum_of_others(moved)
    base = jnp.sum(c * m, -1, keepdims=True)
    a = jnp.where(masked, -jnp.inf, m - base)
    log_cosh = reach + jnp.log1p(jnp.exp(-2.0 * reach)) - float(np.log(2.0))
    total = _total(a + log_cosh)
    slopes_of_d = jnp.exp(a + _log_mean_slope(reach) - total)
    slopes = slopes_of_d + c * (1.0 - jnp.sum(slopes_of_d, -1, keepdims=True))
    offset = base + total - jnp.sum(slopes * m, -1, keepdims=True)
    size = (jnp.abs(slopes) + c) * largest(x) + slopes_of_d * reach
    size = jnp.sum(size, -1, keepdims=True) + jnp.abs(base) + jnp.abs(total)
    # What is wrong in a slope, by the rounding of its logarithm, counts as far as its entry goes
    # from the middle.
    logarithms = jnp.where(masked, 0.0, jnp.abs(m - base)) + jnp.abs(base) + reach + jnp.abs(total)
    wrong = slopes_of_d * jnp.expm1(jnp.minimum(rounding(logarithms), 1.0))
    reached = jnp.sum(wrong * r, -1, keepdims=True)
    reached += jnp.sum(moved, -1, keepdims=True) * jnp.sum(wrong, -1, keepdims=True)
    return slopes, offset + rounding(size) + lax.stop_gradient(reached)


def _split(x: Interval) -> tuple[Interval, Array, Array]:
    """Rows without infinite ends, which entries are masked by -inf, which rows are unbounded.

    A masked entry has no part in the sum. A row of nothing else has no sum.
    """
    masked = x.upper == -jnp.inf
    open_ended = (unbounded(x) & ~masked).any(-1, keepdims=True)
    open_ended = open_ended | masked.all(-1, keepdims=True)
    bounded = Interval(*(jnp.where(open_ended | masked, 0.0, end) for end in x))
    return bounded, masked & ~open_ended, open_ended


def _logsumexp_rows(x: Interval, at: Array, shift: Array) -> tuple[Plane, Plane]:
    """The plane below and the one above rows ``[..., n]``; constant where a row is unbounded."""
    bounded, masked, open_ended = _split(x)

    def either(plane: Plane, constant: Array) -> Plane:
        slopes, offset = plane
        return jnp.where(open_ended, 0.0, slopes), jnp.where(open_ended, constant, offset)

    low, high = _total(x.lower), _total(x.upper)
    low, high = low - rounding(1.0 + jnp.abs(low)), high + rounding(1.0 + jnp.abs(high))
    below, above = _tangent(bounded, masked, at), _chord(bounded, masked, shift)
    # No digit is left of the weights of so wide a row. Entries far below the others have none.
    counts = ~masked & (bounded.upper > bounded.lower.max(-1, keepdims=True) - _FAR)
    size = jnp.where(counts, largest(bounded), 0.0).max(-1, keepdims=True)
    open_ended = open_ended | (rounding(size) > _MOST_ROUNDING)
    return either(below, low), either(above, high)


def _free(x: Interval, axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Where the free planes stand by default, in the operand's shape: tangent's point, shift."""
    bounded, masked, _ = _split(_rows_of(x, axes))
    best = _best_shift(bounded, masked)
    return jnp.full(shape, 0.5, x.lower.dtype), _from_rows(best, axes, shape)


def _logsumexp_planes(node: Node, x: Interval, *, position: Position) -> Planes:
    axes = _axes(node, x.lower.ndim)
    at, shift = _free(x, axes, x.lower.shape)
    shift, at = position(x.lower, x.upper, shift), position(x.lower, x.upper, at)
    below, above = _logsumexp_rows(_rows_of(x, axes), _to_rows(at, axes), _to_rows(shift, axes))

    def product(weights: tuple[Array], value: Array) -> Array:
        return jnp.sum(weights[0] * value, axes)

    def plane(rows: Plane) -> tuple[tuple[Array], Array]:
        return (_from_rows(rows[0], axes, x.lower.shape),), rows[1].reshape(node.shape)

    return Planes(product, *plane(below), *plane(above))


def _log_softmax_planes(node: Node, x: Interval, *, position: Position) -> Planes:
    """``x_i`` minus the planes of log-sum-exp, which all entries of a row share.

    At the middle of the box no other planes are tighter, as ``x_i`` is linear.
    """
    axes = _axes(node, x.lower.ndim)
    at, shift = _free(x, axes, node.shape)
    at, shift = position(x.lower, x.upper, at), position(x.lower, x.upper, shift)
    below, above = _logsumexp_rows(_rows_of(x, axes), _to_rows(at, axes), _to_rows(shift, axes))

    def product(weights: tuple[Array, Array], value: Array) -> Array:
        # ``own_i x_i + sum_{j != i} others_j x_j``: grows with x where the weights are positive.
        own, others = weights
        total = jnp.sum(others * value, axes, keepdims=True)
        return (own - others) * value + jnp.broadcast_to(total, value.shape)

    # That of the own weight, 1 - slope + slope.
    own = rounding(jnp.where(jnp.isfinite(x.lower + x.upper), largest(x), 0.0))

    def plane(rows: Plane, sign: float) -> tuple[tuple[Array, Array], Array]:
        slopes, offset = (_from_rows(part, axes, node.shape) for part in rows)
        return (1.0 - slopes, -slopes), sign * own - offset

    return Planes(product, *plane(above, -1.0), *plane(below, 1.0))


# --- planes of the normalisation ------------------------------------------------------------------


def _normalize_planes(node: Node, d: Interval, r: Interval, *, position: Position) -> Planes:
    """McCormick's planes of the product, or the interval's ends where they are better.

    Better at the middle of the box; on wide boxes the product forgets that ``|y| <= sqrt(N)``.
    """
    image = _normalize_image(node, d, r)
    planes = product_planes(d, r, position)
    finite = ~(unbounded(d) | unbounded(r))
    middles = [jnp.where(finite, center(x), 0.0) for x in (d, r)]

    def either(
        weights: tuple[Array, ...], offset: Array, end: Array, worse: Callable[..., Array]
    ) -> tuple[tuple[Array, ...], Array]:
        constant = worse(planes.product(weights, *middles) + offset, end)
        chosen = tuple(jnp.where(constant, 0.0, weight) for weight in weights)
        return chosen, jnp.where(constant, end, offset)

    return Planes(
        planes.product,
        *either(planes.lower_weights, planes.lower_offset, image.lower, jnp.less),
        *either(planes.upper_weights, planes.upper_offset, image.upper, jnp.greater),
    )


# --- the table ------------------------------------------------------------------------------------

register(
    Joint(
        name="logsumexp",
        note="of a perturbed array, over axes",
        image=_logsumexp_image,
        planes=_logsumexp_planes,
    )
)
register(
    Joint(
        name="log_softmax",
        note="softmax is its exp",
        image=_log_softmax_image,
        planes=_log_softmax_planes,
    )
)
register(
    Joint(
        name="normalize",
        note="by its own root mean square: layer, group and RMS norm",
        accepts=lambda node: all(node.perturbed),
        image=_normalize_image,
        planes=_normalize_planes,
    )
)

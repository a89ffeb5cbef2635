"""Products of two perturbed values: elementwise, and matrix products (attention).

Both share one relaxation, the planes of McCormick (1976). For `x` in `[xl, xu]` and `y` in
`[yl, yu]` the products of non-negative factors

    (x - xl)(y - yl) >= 0,   (xu - x)(yu - y) >= 0      give two planes below   x y,
    (xu - x)(y - yl) >= 0,   (x - xl)(yu - y) >= 0      give two planes above   x y.

A convex combination of the two planes on one side is a plane on that side; together they form the
convex and the concave envelope. With the middles `cx, cy`, the radii `rx, ry` and
`s = position - 1/2` in `[-1/2, 1/2]` a combination is

    below:  (cy + 2 s ry) x + (cx + 2 s rx) y - (cx + 2 s rx) cy - (rx + 2 s cx) ry,
    above:  (cy + 2 s ry) x + (cx - 2 s rx) y - (cx - 2 s rx) cy + (rx - 2 s cx) ry.

At the middle of the box every combination has the value `cx cy - rx ry` (`+` above), which is its
mean over the box, so all positions give the same volume. The default, 1/2, makes the planes
parallel, so that a walk passes them once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from boundjax import precision
from boundjax.ir.families import Error, Expansion, Joint, Planes, Position, copies
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.ops import matmul
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic

# Offsets are moved outward by this many roundings of the largest term.
_ULPS = 8.0

# A matrix product (of one example) with at most this many terms sums their exact ranges.
_EXACT_TERMS = 2**26


def rounding(size: Array) -> Array:
    """How far to move outward a bound with terms of magnitude `size`; no gradient flows."""
    return _ULPS * jnp.finfo(size.dtype).eps * lax.stop_gradient(size)


def corner_products(x: Interval, y: Interval) -> Interval:
    """The range of `x y` over a box, elementwise: its least and largest corner.

    A corner `0 * inf`, which is NaN in floating point, says nothing about the products near it:
    both ends are infinite then. NaN ends stay NaN.
    """

    def least(small: Array, large: Array, first: Array) -> Array:
        # Choose the corner by signs, as the derivative of a minimum depends on ties. On an interval
        # without width `first` gives the end that leads outward.
        at_lower = x.lower * jnp.where(x.lower >= 0, small, large)
        at_upper = x.upper * jnp.where(x.upper >= 0, small, large)
        choice = jnp.where(at_lower == at_upper, first, at_lower < at_upper)
        return jnp.where(choice, at_lower, at_upper)

    low = least(y.lower, y.upper, y.lower >= 0)
    high = -least(-y.upper, -y.lower, y.upper <= 0)
    nan = jnp.isnan(x.lower) | jnp.isnan(x.upper) | jnp.isnan(y.lower) | jnp.isnan(y.upper)
    unknown = (_has_zero(x) & y.unbounded) | (x.unbounded & _has_zero(y))
    low = jnp.where(nan, jnp.nan, jnp.where(unknown, -jnp.inf, low))
    return Interval(low, jnp.where(nan, jnp.nan, jnp.where(unknown, jnp.inf, high)))


def _has_zero(x: Interval) -> Array:
    return (x.lower == 0) | (x.upper == 0)


def weighted_sum(weights: tuple[Array, ...], *operands: Array) -> Array:
    """`sum_i weights_i operands_i`; operands are broadcast to their weights (scalars)."""
    terms = [w * jnp.broadcast_to(x, w.shape) for w, x in zip(weights, operands, strict=True)]
    return sum(terms[1:], terms[0])


def product_planes(x: Interval, y: Interval, position: Position) -> Planes:
    """McCormick's planes of `x y` for two intervals of one shape; see the module.

    Where an operand is unbounded, the planes are constant: the ends of the product's interval.
    """
    open_ended = x.unbounded | y.unbounded
    constant = corner_products(x, y)
    # Double where: no infinite end reaches the planes, nor their derivatives.
    x, y = (Interval(*(jnp.where(open_ended, 0.0, end) for end in factor)) for factor in (x, y))
    cx, rx, cy, ry = x.finite_middle, x.finite_radius, y.finite_middle, y.finite_radius
    default = jnp.full_like(cx, 0.5)
    above, below = position(x.lower, x.upper, default), position(x.lower, x.upper, default)
    slack = rounding(x.largest * y.largest)

    if above is default and below is default:
        weights = (cy, cx)
        lower = (weights, -cx * cy - rx * ry - slack)
        upper = (weights, -cx * cy + rx * ry + slack)
    else:
        s, t = below - 0.5, above - 0.5
        ax, bx = cx + 2.0 * s * rx, cx - 2.0 * t * rx
        lower = ((cy + 2.0 * s * ry, ax), -ax * cy - (rx + 2.0 * s * cx) * ry - slack)
        upper = ((cy + 2.0 * t * ry, bx), -bx * cy + (rx - 2.0 * t * cx) * ry + slack)
    return Planes(
        weighted_sum,
        lower[0],
        jnp.where(open_ended, constant.lower, lower[1]),
        upper[0],
        jnp.where(open_ended, constant.upper, upper[1]),
    )


# --- elementwise ----------------------------------------------------------------------------------


def _factors(node: Node, x: Interval, y: Interval) -> tuple[Interval, Interval]:
    """Both factors in the product's shape; one of them may be a scalar."""
    left, right = (Interval(*(jnp.broadcast_to(end, node.shape) for end in z)) for z in (x, y))
    return left, right


def _mul_image(node: Node, x: Interval, y: Interval) -> Interval:
    return corner_products(*_factors(node, x, y))


def _mul_planes(node: Node, x: Interval, y: Interval, *, position: Position) -> Planes:
    return product_planes(*_factors(node, x, y), position)


# --- matrix products ------------------------------------------------------------------------------


def _dot(node: Node, x: Array, y: Array) -> Array:
    numbers = node.params["dimension_numbers"]
    return lax.dot_general(x, y, numbers, precision=precision.of_products())


def _rows(value: Array, contract: tuple[int, ...], batch: tuple[int, ...]) -> Array:
    """Transposes to `[batch, free, contracted]`, each of the three flattened."""
    free = [a for a in range(value.ndim) if a not in (*contract, *batch)]
    groups = (tuple(batch), tuple(free), tuple(contract))
    sizes = [math.prod(value.shape[a] for a in group) for group in groups]
    return jnp.transpose(value, [a for group in groups for a in group]).reshape(sizes)


# The derivative recomputes the terms from the operands, so that no array of all terms is kept.
@jax.checkpoint
def _summed_corners(x: Interval, y: Interval) -> Interval:
    """Sums the ranges of all terms over K: `[B, I, K], [B, J, K] -> [B, I, J]`.

    This is one fused reduction: XLA does not write the array of all terms.
    """
    left = Interval(*(end[:, :, None, :] for end in x))
    right = Interval(*(end[:, None, :, :] for end in y))
    terms = corner_products(left, right)
    return Interval(terms.lower.sum(-1), terms.upper.sum(-1))


def _dot_image(node: Node, x: Interval, y: Interval) -> Interval:
    """The sum of the exact ranges of all terms.

    Beyond `2^26` terms it uses matrix products: `cx cy -+ (|cx| ry + rx |cy| + rx ry)` contains the
    corners of every term, and is at most 1.5 times as wide.
    """
    (x_contract, y_contract), (x_batch, y_batch) = node.params["dimension_numbers"]
    left = Interval(*(_rows(end, x_contract, x_batch) for end in x))
    right = Interval(*(_rows(end, y_contract, y_batch) for end in y))
    if left.lower.size * right.lower.shape[1] <= _EXACT_TERMS:
        return Interval(*(end.reshape(node.shape) for end in _summed_corners(left, right)))
    cx, rx, cy, ry = x.finite_middle, x.finite_radius, y.finite_middle, y.finite_radius
    middle = _dot(node, cx, cy)
    spread = _dot(node, jnp.abs(cx) + rx, ry) + _dot(node, rx, jnp.abs(cy))
    spread = spread + rounding(_dot(node, x.largest, y.largest))
    return Interval(middle - spread, middle + spread)


def _dot_planes(node: Node, x: Interval, y: Interval, *, position: Position) -> Planes:
    """The planes of all terms `x_ik y_kj`, summed over k, with a position per element of `x`.

    The weights are `cy`, the weights of `y`, and `s`: the part `2 s_ik ry_kj` of the weight of
    `x_ik` in element `ij` is never written out. `2 ry >= 0` is not a weight, so that the product is
    linear in the weights and increases with the operands where the weights are positive. An
    unbounded operand gives NaN, which is no bound.
    """
    cx, rx, cy, ry = x.finite_middle, x.finite_radius, y.finite_middle, y.finite_radius
    default = jnp.full_like(cx, 0.5)
    above, below = position(x.lower, x.upper, default), position(x.lower, x.upper, default)
    slack = rounding(_dot(node, x.largest, y.largest))

    if above is default and below is default:

        def parallel(weights: tuple[Array, ...], left: Array, right: Array) -> Array:
            return _dot(node, left, weights[0]) + _dot(node, weights[1], right)

        weights = (cy, cx)
        middle, spread = _dot(node, cx, cy), _dot(node, rx, ry) + slack
        return Planes(parallel, weights, -middle - spread, weights, -middle + spread)

    width = 2.0 * ry

    def product(weights: tuple[Array, ...], left: Array, right: Array) -> Array:
        of_x, of_y, s = weights
        return _dot(node, left, of_x) + _dot(node, of_y, right) + _dot(node, left * s, width)

    s, t = below - 0.5, above - 0.5
    ax, bx = cx + 2.0 * s * rx, cx - 2.0 * t * rx
    lower_offset = -_dot(node, ax, cy) - _dot(node, rx + 2.0 * s * cx, ry) - slack
    upper_offset = -_dot(node, bx, cy) + _dot(node, rx - 2.0 * t * cx, ry) + slack
    return Planes(product, (cy, ax, s), lower_offset, (cy, bx, t), upper_offset)


# --- the table ------------------------------------------------------------------------------------


def _dot_error(node: Node, sizes: Sequence[Array], arithmetic: Arithmetic) -> Error:
    terms = matmul.contracted(node)
    products = node.apply(*sizes) * (1.0 + 2.0 * arithmetic.gamma(terms))
    return Error(arithmetic.gamma(terms + 4) * products, 0.0)


def _both(node: Node) -> bool:
    return all(node.perturbed) and jnp.issubdtype(node.dtype, jnp.floating)


def _same(node: Node) -> bool:
    return _both(node) and node.inputs[0] == node.inputs[1]


register(
    Expansion(
        name="mul",
        note="of a perturbed value by itself: square",
        accepts=_same,
        expand=lambda node: lambda x, _: lax.square(x),
    )
)
register(
    Joint(
        name="mul",
        note="of two perturbed values",
        accepts=_both,
        image=_mul_image,
        planes=_mul_planes,
        error=lambda node, sizes, arithmetic: Error(0.0, 4.0 * arithmetic.unit),
        terms=lambda node: 8,
        reach=copies,
    )
)
register(
    Joint(
        name="dot_general",
        note="of two perturbed values; attention",
        accepts=_both,
        image=_dot_image,
        planes=_dot_planes,
        error=_dot_error,
        terms=lambda node: 3 * matmul.contracted(node) + 8,
    )
)

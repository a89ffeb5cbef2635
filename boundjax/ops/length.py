"""Euclidean lengths of rows.

A length `sqrt(|x|^2 + eps)` is convex. With the middle `c` and the half-widths `r` of a box:

* *below* lies its tangent at the middle, by Cauchy's inequality: `(c x + eps) / sqrt(|c|^2 + eps)`;
* *above*: `x_i^2 <= 2 c_i x_i - c_i^2 + r_i^2` (the chord), and the root of their sum lies below
  its tangent at `s = |c|^2 + |r|^2 + eps`, which gives `(c x + |r|^2 + eps) / sqrt(s)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from boundjax.ir.composite import composite
from boundjax.ir.families import Error, Expansion, Joint, Planes, Position
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, root
from boundjax.ops.product import rounding
from boundjax.ops.rows import axes_of, from_rows, nearest_to_zero, row_size, rows_of
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic


def length(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """`sqrt(sum(x^2) + eps)` over `axes`, which are dropped."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axes) + jnp.asarray(eps, x.dtype))


def _scaled(x: Interval, least: float) -> tuple[Interval, Array]:
    """Rows over a power of two `[..., 1]` with which no square over- or underflows.

    The power is at least about `least`.
    """
    largest = lax.stop_gradient(jnp.max(x.largest, -1, keepdims=True, initial=0.0))
    largest = jnp.maximum(largest, least)
    usable = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1.0))
    limit = int(jnp.finfo(largest.dtype).maxexp) - 2
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -limit, limit))
    return Interval(*(end / scale for end in x)), scale


def _length_image(node: Node, x: Interval) -> Interval:
    rows = rows_of(x, axes_of(node, x.lower.ndim))
    eps = float(node.params["eps"])
    scaled, scale = _scaled(rows, math.sqrt(eps))
    eps = eps / scale / scale
    ends = []
    for sign, end in ((-1.0, nearest_to_zero(scaled)), (1.0, scaled.largest)):
        value = scale * root(jnp.sum(jnp.square(end), -1, keepdims=True) + eps)
        ends.append(value + sign * rounding(value * math.sqrt(end.shape[-1])))
    low, high = larger(ends[0], jnp.zeros_like(ends[0])), ends[1]
    open_ended = rows.unbounded.any(-1, keepdims=True)
    nan = jnp.isnan(rows.lower).any(-1, keepdims=True)
    low, high = jnp.where(open_ended, 0.0, low), jnp.where(open_ended, jnp.inf, high)
    return Interval(*(jnp.where(nan, jnp.nan, end).reshape(node.shape) for end in (low, high)))


def _length_planes(node: Node, x: Interval, *, position: Position) -> Planes:
    axes = axes_of(node, x.lower.ndim)
    rows = rows_of(x, axes)
    image = _length_image(node, x)
    open_ended = rows.unbounded.any(-1, keepdims=True)
    eps = float(node.params["eps"])
    bounded = Interval(*(jnp.where(open_ended, 0.0, end) for end in rows))
    scaled, scale = _scaled(bounded, math.sqrt(eps))
    eps = eps / scale / scale
    c, r = scaled.middle, scaled.radius
    size = rounding(math.sqrt(c.shape[-1]) * jnp.sum(scaled.largest + r, -1, keepdims=True) + eps)

    squares = jnp.sum(jnp.square(c), -1, keepdims=True) + eps
    spread = jnp.sum(jnp.square(r), -1, keepdims=True)
    # Next to 0 the direction of the middle means little, and its gradient is large.
    wide = squares <= 1e-6 * spread

    def plane(at: Array, constant: Array, sign: float) -> tuple[Array, Array]:
        positive = (at > 0) & ~(wide & (sign < 0))
        over = jnp.where(positive, at, 1.0)
        slopes = jnp.where(positive & ~open_ended, c / over, 0.0)
        offset = jnp.where(positive, constant / over, 0.0)
        return slopes, scale * (offset + sign * size)

    below = plane(root(squares), eps, -1.0)
    above = plane(root(squares + spread), spread + eps, 1.0)
    middle = scale * c

    def either(
        rows_plane: tuple[Array, Array], end: Array, worse: Callable[..., Array]
    ) -> tuple[tuple[Array], Array]:
        slopes, offset = rows_plane
        value = jnp.sum(slopes * middle, -1, keepdims=True) + offset
        end = end.reshape(value.shape)
        constant = worse(value, end) | open_ended
        slopes = jnp.where(constant, 0.0, slopes)
        return (from_rows(slopes, axes, x.lower.shape),), jnp.where(constant, end, offset)

    def product(weights: tuple[Array], value: Array) -> Array:
        return jnp.sum(weights[0] * value, axes)

    lower_weights, lower = either(below, image.lower, jnp.less)
    upper_weights, upper = either(above, image.upper, jnp.greater)
    shape = node.shape
    return Planes(product, lower_weights, lower.reshape(shape), upper_weights, upper.reshape(shape))


def _lost_squares(node: Node, arithmetic: Arithmetic) -> float:
    """What squares that underflow may take from a length."""
    return math.sqrt(2.0 * row_size(node) * arithmetic.underflow)


def _length_error(node: Node, sizes: Sequence[Array], arithmetic: Arithmetic) -> Error:
    # The bounds lose a share of the sum of all terms.
    relative = arithmetic.gamma(2 * row_size(node) + 32)
    return Error(_lost_squares(node, arithmetic), relative)


register(
    Joint(
        name="length",
        note="the l2 norm over axes; jnp.linalg.norm, jnp.hypot",
        image=_length_image,
        planes=_length_planes,
        error=_length_error,
        lipschitz=lambda node: (1.0,),
    )
)


def _of_pair(node: Node) -> Callable[[Array, Array], Array]:
    def function(x: Array, y: Array) -> Array:
        x, y = (jnp.broadcast_to(a, node.shape).astype(node.dtype) for a in (x, y))
        # Older versions of JAX build jnp.stack from broadcasts.
        pair = lax.concatenate([x[None], y[None]], 0)
        return composite("length", length, pair, axes=(0,), eps=0.0)

    return function


register(
    Expansion(
        name="hypot",
        note="the length of a pair",
        traced_as=jnp.hypot,
        accepts=lambda node: jnp.issubdtype(node.dtype, jnp.floating),
        expand=_of_pair,
    )
)

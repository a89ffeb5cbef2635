"""Division by a root mean square or an l2 norm: layer, group and RMS norm, and unit vectors.

They occur as the named composite `normalize`, by which rewrites replace patterns in a traced
function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from boundjax.ir.families import Ball, Error, Joint, Planes, Position
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, root, smaller
from boundjax.ops import domain
from boundjax.ops.product import corner_products, product_planes, rounding
from boundjax.ops.rows import (
    axes_of,
    from_rows,
    nearest_to_zero,
    row_error,
    row_size,
    rows_of,
    sum_of_others,
)
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic


def normalize(d: Array, r: Array, axes: tuple[int, ...], eps: float, kind: str = "rms") -> Array:
    """`d r` for `r = 1 / sqrt(mean(d^2) + eps)`, with the mean over `axes`, in d's shape.

    Other kinds have the l2 norm `n` of `d` over `axes`: `r = 1 / (n + eps)` (`"sum"`),
    `r = 1 / max(n, eps)` (`"max"`) or `r = 1 / sqrt(n^2 + eps)` (`"root"`). The bounds rely on this
    relation between `d` and `r`. With kind `"safe"`, `r = 1 / n`, or any number where `d` is 0.
    """
    del axes, eps, kind
    return d * r


# --- intervals ------------------------------------------------------------------------------------


def _divisor(node: Node, squares: Array, count: int, scale: Array) -> Array:
    """What rows are divided by, over `scale`, from the sum of their squares over its square."""
    kind, eps = node.params.get("kind", "rms"), float(node.params["eps"])
    if kind in ("rms", "root"):
        return root(squares / (count if kind == "rms" else 1) + eps / scale / scale)
    offset = jnp.broadcast_to(eps / scale, squares.shape)
    if kind == "safe":
        return root(squares)
    return root(squares) + offset if kind == "sum" else larger(root(squares), offset)


def _at_zero(node: Node) -> float:
    """What the row 0 is divided by, for a mean over one entry."""
    eps = float(node.params["eps"])
    return math.sqrt(eps) if node.params.get("kind", "rms") in ("rms", "root") else eps


def _may_vanish(node: Node, rows: Interval) -> Array:
    """Rows `[..., 1]` that may be 0, or have squares that underflow, while eps is 0."""
    if float(node.params["eps"]) > 0.0:
        return jnp.zeros((*rows.lower.shape[:-1], 1), bool)
    info = jnp.finfo(rows.lower.dtype)
    least = math.sqrt(float(info.tiny) / float(info.eps) * 4.0 * rows.lower.shape[-1])
    return jnp.max(nearest_to_zero(rows), -1, keepdims=True) <= least


def _longest(node: Node, count: int) -> float:
    """The largest l2 norm of a normalised row."""
    return math.sqrt(count) if node.params.get("kind", "rms") == "rms" else 1.0


def _normalize_image(node: Node, d: Interval, r: Interval) -> Interval:
    """The product's interval, intersected with that of `d_i / g(d_i^2 + S_i)`.

    `S_i`, the sum of the other entries' squares, varies independently of `d_i`. The quotient
    increases with `d_i` and shrinks in magnitude as `S_i` grows; its magnitude is at most
    `sqrt(N)`, or 1 if it is divided by a norm and not by a root mean square.
    """
    axes = axes_of(node, d.lower.ndim)
    rows = rows_of(d, axes)
    count = rows.lower.shape[-1]
    # Scale rows of large and small values, so that no square over- or underflows.
    least_scale = _at_zero(node)
    scale = lax.stop_gradient(jnp.max(rows.largest, -1, keepdims=True))
    scale = jnp.where(jnp.isfinite(scale), jnp.maximum(scale, least_scale), 1.0)
    scale = jnp.where(scale > 0.0, scale, 1.0)
    lower, upper = rows.lower / scale, rows.upper / scale
    least = nearest_to_zero(Interval(lower, upper))
    greatest = larger(jnp.abs(lower), jnp.abs(upper))
    fewest, most = (sum_of_others(jnp.square(end)) for end in (least, greatest))
    bound = _longest(node, count) * (1.0 + 8.0 * float(jnp.finfo(lower.dtype).eps))

    def quotient(end: Array, sign: float) -> Array:
        rest = jnp.where(sign * end > 0, fewest, most)
        over = _divisor(node, jnp.square(end) + rest, count, scale)
        positive = over > 0
        value = end / jnp.where(positive, over, 1.0)
        value = value + sign * rounding(jnp.abs(value))
        return jnp.where(positive, jnp.clip(value, -bound, bound), sign * bound)

    def finite_or(value: Array, otherwise: float) -> Array:
        # A row with an infinite end, or one that is 0 and divided by 0, has no quotient.
        vanishes, unknown = _may_vanish(node, rows), rows.unbounded.any(-1, keepdims=True)
        kind = node.params.get("kind", "rms")
        if kind == "rms":
            unknown = unknown | (vanishes & rows_of(r, axes).unbounded.any(-1, keepdims=True))
        elif kind == "safe":
            value = jnp.where(vanishes, jnp.clip(otherwise, -bound, bound), value)
        else:
            unknown = unknown | vanishes
        nan = jnp.isnan(rows.lower)
        value = jnp.where(unknown, otherwise, jnp.where(nan, jnp.nan, value))
        return from_rows(value, axes, node.shape)

    product = corner_products(d, r)
    low = larger(product.lower, finite_or(quotient(lower, -1.0), -jnp.inf))
    high = smaller(product.upper, finite_or(quotient(upper, 1.0), jnp.inf))
    # Ends cross by rounding only, unless r is not what it should be: then there is no bound.
    wrong = low - high > 1e-3 * (1.0 + jnp.abs(low) + jnp.abs(high))
    ends = smaller(low, high), larger(low, high)
    return Interval(*(jnp.where(wrong, jnp.nan, end) for end in ends))


def _warned_normalize_image(node: Node, d: Interval, r: Interval) -> Interval:
    if node.params.get("kind", "rms") not in ("rms", "safe"):
        vanishes = _may_vanish(node, rows_of(d, axes_of(node, d.lower.ndim)))
        domain.warn(node, vanishes, "contain a row of zeros, which has no direction")
    return _normalize_image(node, d, r)


# --- planes of the normalisation ------------------------------------------------------------------


def _normalize_planes(node: Node, d: Interval, r: Interval, *, position: Position) -> Planes:
    """McCormick's planes of the product, or the image's ends where these are tighter at the middle.

    On wide boxes the planes of the product ignore that `|y| <= sqrt(N)`.
    """
    image = _normalize_image(node, d, r)
    planes = product_planes(d, r, position)
    finite = ~(d.unbounded | r.unbounded)
    middles = [jnp.where(finite, x.finite_middle, 0.0) for x in (d, r)]

    def either(
        weights: tuple[Array, ...], offset: Array, end: Array, worse: Callable[..., Array]
    ) -> tuple[tuple[Array, ...], Array]:
        constant = worse(planes.product(weights, *middles) + offset, end)
        weights = tuple(jnp.where(constant, 0.0, weight) for weight in weights)
        return weights, jnp.where(constant, end, offset)

    return Planes(
        planes.product,
        *either(planes.lower_weights, planes.lower_offset, image.lower, jnp.less),
        *either(planes.upper_weights, planes.upper_offset, image.upper, jnp.greater),
    )


# --- errors ---------------------------------------------------------------------------------------


def _normalize_error(node: Node, sizes: Sequence[Array], arithmetic: Arithmetic) -> Error:
    """The planes rely on the exact relation of the operands, of which one is rounded."""
    relative, eps = row_error(node, arithmetic), float(node.params["eps"])
    if eps > 0.0 and node.params.get("kind", "rms") not in ("rms", "root"):
        # Squares that underflow are missing from a norm, which is then compared with eps.
        relative += math.sqrt(2.0 * row_size(node) * arithmetic.underflow) / eps
    return Error(2.0 * arithmetic.underflow, relative)


# --- Lipschitz constants --------------------------------------------------------------------------


def _normalize_lipschitz(node: Node) -> tuple[float, float]:
    """The slope at 0, which is the largest: `1 / g(0)`; `r` is a function of `d`."""
    least = _at_zero(node)
    return (1.0 / least if least > 0.0 else math.inf, 0.0)


# --- the table ------------------------------------------------------------------------------------

register(
    Joint(
        name="normalize",
        note="by its rms (layer, group, RMS norm) or l2 norm (unit vectors)",
        accepts=lambda node: all(node.perturbed),
        image=_warned_normalize_image,
        planes=_normalize_planes,
        error=_normalize_error,
        lipschitz=_normalize_lipschitz,
        ball=lambda node: Ball(axes_of(node, len(node.shape)), _longest(node, row_size(node))),
    )
)

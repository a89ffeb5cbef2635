"""A hinge with any two slopes: PReLU, `where(x > 0, a x, b x)`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, signed_parts, smaller
from boundjax.ops import piecewise


def hinge(x: Array, left: Array, right: Array) -> Array:
    """`left x` for `x < 0`, else `right x`; the slopes have x's shape or are scalars."""
    return jnp.where(x < 0, left * x, right * x)


def _image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    # With slopes of opposite signs the least or the largest value is at 0.
    at_lower, at_upper = node.apply(lower), node.apply(upper)
    low, high = smaller(at_lower, at_upper), larger(at_lower, at_upper)
    around = (lower < 0) & (upper > 0)
    return (
        jnp.where(around, signed_parts(low)[0], low),
        jnp.where(around, signed_parts(high)[1], high),
    )


def _lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    left, right = piecewise.number(node, 0), piecewise.number(node, 1)
    return piecewise.hinge_lines(lower, upper, left, right, position)


def _lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    left, right = (jnp.abs(jnp.asarray(c, lower.dtype)) for c in node.constants)
    return jnp.broadcast_to(jnp.maximum(left, right), lower.shape)


register(
    Scalar(
        name="hinge",
        note="where(x > 0, a x, b x) with constant slopes; PReLU",
        accepts=lambda node: node.perturbed == (True, False, False),
        image=_image,
        lines=_lines,
        lipschitz=_lipschitz,
        pieces=True,
        kinks=piecewise.at_zero,
    )
)

"""Maximum and minimum over windows: pooling, reductions, the larger of two values."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
from chex import Array
from jax import lax

from boundjax.ir.families import Extremum, Lines
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.ops import piecewise


def window_lines(op: Extremum, lower: Array, upper: Array, valid: Array | None) -> Lines:
    """Two lines per window for the maximum (or minimum) of its entries.

    Args:
      op: the entry of the table; its sign says maximum or minimum.
      lower, upper: bounds ``[*out, K]`` on the entries of every window.
      valid: ``[*out, K]``, False at padding; None where there is none.

    Returns:
      Slopes ``[*out, K]`` and intercepts ``[*out]``. For the maximum, with ``i`` the entry of the
      largest lower bound, ``m`` that of the largest upper bound and ``v`` the largest of the other
      upper bounds: ``max x >= x_i`` and ``max x <= max(x_m, v) <=`` the chord of that hinge on
      ``[lower_m, upper_m]``. The chord is ``x_m`` itself where ``m`` dominates, and never looser
      than the constant ``upper_m``.
    """
    if op.sign < 0:
        lower, upper = -upper, -lower
    if valid is not None:
        lower = jnp.where(valid, lower, -jnp.inf)
        upper = jnp.where(valid, upper, -jnp.inf)
    count = lower.shape[-1]
    best_lower = _one_hot(jnp.argmax(lower, axis=-1), count, lower.dtype)
    largest = jnp.argmax(upper, axis=-1)
    chosen = _one_hot(largest, count, upper.dtype)
    rest = jnp.where(chosen > 0, -jnp.inf, upper)
    others = jnp.take_along_axis(rest, jnp.argmax(rest, axis=-1)[..., None], axis=-1)[..., 0]
    lower_m = jnp.take_along_axis(lower, largest[..., None], axis=-1)[..., 0]
    upper_m = jnp.take_along_axis(upper, largest[..., None], axis=-1)[..., 0]
    dominates = lower_m >= others
    # Double where: neither -inf - -inf nor a division by 0 reaches the value or the gradient.
    kink = jnp.where(dominates, lower_m, others)
    width = jnp.where(dominates, 1.0, upper_m - lower_m)
    slope = jnp.where(dominates, 1.0, (upper_m - kink) / width)
    at_kink, at_upper = kink - slope * lower_m, upper_m - slope * upper_m
    chord = piecewise.through_ends(at_kink, at_kink, at_upper, above=True)
    intercept = jnp.where(dominates, 0.0, chord)
    slopes = chosen * slope[..., None]
    bad = jnp.isnan(lower).any(axis=-1) | jnp.isnan(upper).any(axis=-1)
    if valid is not None:
        bad = bad | ~valid.any(axis=-1)  # a window of nothing but padding has the value -inf
    intercept = jnp.where(bad, jnp.nan, intercept)
    if op.sign > 0:
        return Lines(best_lower, jnp.where(bad, jnp.nan, jnp.zeros_like(slope)), slopes, intercept)
    # min x = -max(-x): the slopes stay, the intercepts and the roles of the lines turn over.
    return Lines(slopes, -intercept, best_lower, jnp.where(bad, jnp.nan, jnp.zeros_like(slope)))


def _one_hot(index: Array, count: int, dtype: np.dtype) -> Array:
    shape = (1,) * index.ndim + (count,)
    return (index[..., None] == jnp.arange(count).reshape(shape)).astype(dtype)


def _pool_windows(node: Node, value: Array) -> Array:
    """``[*shape]`` -> ``[*out, K]``, zeros at padding; strided slices, as they transpose fast."""
    p = node.params
    rank = value.ndim
    config = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(p["padding"], p["base_dilation"], strict=True)
    ]
    padded = lax.pad(value, jnp.zeros((), value.dtype), config)
    pieces = []
    for position in itertools.product(*(range(w) for w in p["window_dimensions"])):
        start = [k * d for k, d in zip(position, p["window_dilation"], strict=True)]
        limit = [start[a] + (node.shape[a] - 1) * p["window_strides"][a] + 1 for a in range(rank)]
        pieces.append(lax.slice(padded, start, limit, p["window_strides"]))
    return jnp.stack(pieces, axis=-1)


def _pool_valid(node: Node) -> Array | None:
    p = node.params
    no_padding = all(low <= 0 and high <= 0 for low, high in p["padding"])
    if no_padding and all(d == 1 for d in p["base_dilation"]):
        return None
    return _pool_windows(node, jnp.ones(node.input_shapes[0].shape, node.dtype)) > 0


def _reduce_windows(node: Node, value: Array) -> Array:
    axes = tuple(node.params["axes"])
    moved = jnp.moveaxis(value, axes, range(value.ndim - len(axes), value.ndim))
    return moved.reshape(*node.shape, -1)


def _pair_windows(node: Node, left: Array, right: Array) -> Array:
    return jnp.stack(
        [jnp.broadcast_to(left, node.shape), jnp.broadcast_to(right, node.shape)], axis=-1
    )


def _both_perturbed(node: Node) -> bool:
    return len(node.inputs) == 2


for _name, _sign in (("max", 1), ("min", -1)):
    register(
        Extremum(
            name=f"reduce_window_{_name}",
            note=f"{_name} pooling",
            sign=_sign,
            windows=_pool_windows,
            valid=_pool_valid,
        )
    )
    register(Extremum(name=f"reduce_{_name}", sign=_sign, windows=_reduce_windows))
    register(
        Extremum(
            name=_name,
            note="of two perturbed values",
            sign=_sign,
            windows=_pair_windows,
            accepts=_both_perturbed,
        )
    )

"""Maximum and minimum over windows: pooling, reductions, the larger of two values."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from boundjax.ir.composite import composite
from boundjax.ir.families import Expansion, Extremum, Lines, copies
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.ops import piecewise
from boundjax.ops.local import window_size


def window_lines(
    op: Extremum,
    lower: Float[Array, "*out K"],
    upper: Float[Array, "*out K"],
    valid: Bool[Array, "*out K"] | None,
) -> Lines:
    """Two lines per window for the maximum (or minimum) of its entries.

    Args:
      op: the entry of the table, which says maximum or minimum.
      lower, upper: bounds on the entries of every window.
      valid: False at padding; None without padding.

    Returns:
      Slopes `[*out, K]` and intercepts `[*out]`. For the maximum, with `i` the entry of the
      largest lower bound, `m` that of the largest upper bound and `v` the largest of the other
      upper bounds: `max x >= x_i` and `max x <= max(x_m, v) <=` the chord of that hinge on
      `[lower_m, upper_m]`. The chord is `x_m` itself where `m` dominates, and never looser
      than the constant `upper_m`. A window without entries has the value -inf, and so do its lines.
    """
    if op.sign < 0:
        lower, upper = -upper, -lower
    if valid is not None:
        lower = jnp.where(valid, lower, -jnp.inf)
        upper = jnp.where(valid, upper, -jnp.inf)
    count = lower.shape[-1]
    if not count:
        constant = jnp.full(lower.shape[:-1], -op.sign * jnp.inf, lower.dtype)
        return Lines(lower, constant, upper, constant)
    best_lower = _one_hot(jnp.argmax(lower, axis=-1), count, lower.dtype)
    largest = jnp.argmax(upper, axis=-1)
    is_largest = _one_hot(largest, count, upper.dtype)
    rest = jnp.where(is_largest > 0, -jnp.inf, upper)
    second = jnp.take_along_axis(rest, jnp.argmax(rest, axis=-1)[..., None], axis=-1)[..., 0]
    lower_m = jnp.take_along_axis(lower, largest[..., None], axis=-1)[..., 0]
    upper_m = jnp.take_along_axis(upper, largest[..., None], axis=-1)[..., 0]
    dominates = lower_m >= second
    # Double where: neither -inf - -inf nor a division by 0 reaches the value or the gradient.
    kink = jnp.where(dominates, lower_m, second)
    width = jnp.where(dominates, 1.0, upper_m - lower_m)
    slope = jnp.where(dominates, 1.0, (upper_m - kink) / width)
    at_kink, at_upper = kink - slope * lower_m, upper_m - slope * upper_m
    chord = piecewise.through_ends(at_kink, at_kink, at_upper, above=True)
    intercept = jnp.where(dominates, 0.0, chord)
    slopes = is_largest * slope[..., None]
    below = jnp.zeros_like(slope)
    if valid is not None:
        empty = ~valid.any(axis=-1)
        best_lower, slopes = (jnp.where(empty[..., None], 0.0, s) for s in (best_lower, slopes))
        below, intercept = (jnp.where(empty, -jnp.inf, line) for line in (below, intercept))
    nan = jnp.isnan(lower).any(axis=-1) | jnp.isnan(upper).any(axis=-1)
    below, intercept = (jnp.where(nan, jnp.nan, line) for line in (below, intercept))
    if op.sign > 0:
        return Lines(best_lower, below, slopes, intercept)
    # min x = -max(-x): the slopes stay, the intercepts change sign, the lines change places.
    return Lines(slopes, -intercept, best_lower, -below)


def _one_hot(index: Array, count: int, dtype: np.dtype) -> Array:
    shape = (1,) * index.ndim + (count,)
    return (index[..., None] == jnp.arange(count).reshape(shape)).astype(dtype)


class Pooling(NamedTuple):
    """The parameters of `lax.reduce_window`; `sign` is 1 for the maximum, -1 for the minimum."""

    sign: int
    window_dimensions: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    base_dilation: tuple[int, ...]
    window_dilation: tuple[int, ...]

    @property
    def dilated(self) -> bool:
        """Whether windows or inputs are dilated, for which JAX has no gradient."""
        return any(d != 1 for d in (*self.base_dilation, *self.window_dilation))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def pooled(value: Array, pooling: Pooling) -> Array:
    """Maximum (minimum) pooling whose gradient is that of the first entry that attains it.

    JAX has no gradient for dilated windows. Traced as `lax.reduce_window`, it has those bounds.

    Args:
      value: floating-point, of any rank.
      pooling: one entry per axis.
    """
    start = np.asarray(-pooling.sign * np.inf, value.dtype)  # concrete, as JAX inspects it
    return lax.reduce_window(value, start, lax.max if pooling.sign > 0 else lax.min, *pooling[1:])


@pooled.defjvp
def _(pooling: Pooling, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (value,), (tangent,) = primals, tangents
    result = pooled(value, pooling)
    entries = pooling.sign * _entries(pooling, result.shape, value)
    valid = _valid(pooling, result.shape, value)
    if valid is not None:
        entries = jnp.where(valid, entries, -jnp.inf)
    first = _one_hot(jnp.argmax(entries, axis=-1), entries.shape[-1], np.dtype(bool))
    changes = _entries(pooling, result.shape, tangent)
    return result, jnp.sum(jnp.where(first, changes, jnp.zeros_like(changes)), axis=-1)


def _entries(pooling: Pooling, out: tuple[int, ...], value: Array) -> Array:
    """The entries of all windows, `[*shape] -> [*out, K]`, zero at padding.

    They are strided slices, which transpose fast.
    """
    config = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(pooling.padding, pooling.base_dilation, strict=True)
    ]
    padded = lax.pad(value, jnp.zeros((), value.dtype), config)
    strides = pooling.window_strides
    pieces = []
    for position in itertools.product(*(range(w) for w in pooling.window_dimensions)):
        start = [k * d for k, d in zip(position, pooling.window_dilation, strict=True)]
        limit = [s + (n - 1) * step + 1 for s, n, step in zip(start, out, strides, strict=True)]
        pieces.append(lax.slice(padded, start, limit, strides))
    return jnp.stack(pieces, axis=-1)


def _valid(pooling: Pooling, out: tuple[int, ...], value: Array) -> Array | None:
    """`[*out, K]`, False at padding; None without padding."""
    no_padding = all(low <= 0 and high <= 0 for low, high in pooling.padding)
    if no_padding and all(d == 1 for d in pooling.base_dilation):
        return None
    return _entries(pooling, out, jnp.ones(value.shape, value.dtype)) > 0


def _pooling(node: Node) -> Pooling:
    sign = 1 if node.primitive == "reduce_window_max" else -1
    return Pooling(sign, *(tuple(node.params[name]) for name in Pooling._fields[1:]))


def _without_gradient(node: Node) -> bool:
    """Whether JAX cannot differentiate the equation, and therefore not its bounds."""
    return _pooling(node).dilated and "sign" not in node.params


def _with_gradient(node: Node) -> Callable[[Array], Array]:
    """Expands to `pooled`; the parameter `sign` tells the result from the original equation."""

    def pool(value: Array, **pooling: Any) -> Array:
        return pooled(value, Pooling(**pooling))

    params = _pooling(node)._asdict()
    return lambda value: composite(node.primitive, pool, value, **params)


def _pool_windows(node: Node, value: Array) -> Array:
    return _entries(_pooling(node), node.shape, value)


def _pool_valid(node: Node) -> Array | None:
    (shape,) = node.input_shapes
    return _valid(_pooling(node), node.shape, jnp.zeros(shape.shape, node.dtype))


def _reduce_windows(node: Node, value: Array) -> Array:
    axes = tuple(node.params["axes"])
    moved = jnp.moveaxis(value, axes, range(value.ndim - len(axes), value.ndim))
    return moved.reshape(*node.shape, math.prod(value.shape[axis] for axis in axes))


def _pair_windows(node: Node, left: Array, right: Array) -> Array:
    return jnp.stack(
        [jnp.broadcast_to(left, node.shape), jnp.broadcast_to(right, node.shape)], axis=-1
    )


def _both_perturbed(node: Node) -> bool:
    return len(node.inputs) == 2


for _name, _sign in (("max", 1), ("min", -1)):
    register(
        Expansion(
            name=f"reduce_window_{_name}",
            note="with dilations: the same, with a gradient",
            accepts=_without_gradient,
            expand=_with_gradient,
        )
    )
    register(
        Extremum(
            name=f"reduce_window_{_name}",
            note=f"{_name} pooling",
            sign=_sign,
            windows=_pool_windows,
            valid=_pool_valid,
            reach=window_size,
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
            reach=copies,
        )
    )

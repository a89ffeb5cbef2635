"""What has to be said about how XLA computes: maxima of computed values, and work to be done once.

XLA may compute one value several times, in fusions that round it differently. A derivative that
compares with the result (``jnp.maximum``) may then find no operand equal to it, and one that
repeats the comparison may choose both operands or neither: gradients vanish or double, in
particular where both operands bound the same thing and are equal but for rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.typing import PyTree

# Values that differ by less than this many roundings of their size share the derivative.
_NEAR = 1e3


@jax.custom_jvp
def larger(first: Array, second: Array) -> Array:
    """The larger of two arrays of one shape, elementwise; NaN where either is.

    Its derivative passes from one operand to the other continuously, over a distance that rounding
    does not matter to; equal operands share it.
    """
    return jnp.where((second > first) | jnp.isnan(second), second, first)


@larger.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    first, second = primals
    near = _NEAR * jnp.finfo(first.dtype).eps * (jnp.abs(first) + jnp.abs(second))
    comparable = jnp.isfinite(near) & (near > 0)
    difference = jnp.where(comparable, second - first, 0.0) / jnp.where(comparable, near, 1.0)
    # Infinite values are never equal but for rounding; zeros are equal.
    otherwise = jnp.where(second > first, 1.0, jnp.where(second < first, 0.0, 0.5))
    share = jnp.where(comparable, jnp.clip(0.5 + 0.5 * difference, 0.0, 1.0), otherwise)
    share = jax.lax.stop_gradient(share)
    of_first, of_second = tangents
    # The derivative of what was not chosen may be infinite.
    of_first = jnp.where(share < 1.0, of_first, 0.0) * (1.0 - share)
    of_second = jnp.where(share > 0.0, of_second, 0.0) * share
    return larger(first, second), of_first + of_second


def smaller(first: Array, second: Array) -> Array:
    """The smaller of two arrays of one shape, elementwise, see ``larger``."""
    return -larger(-first, -second)


def quick_larger(first: Array, second: Array) -> Array:
    """``larger`` where ties do not matter: its derivative is one selection."""
    return jnp.where((first > second) | jnp.isnan(first), first, second)


def quick_smaller(first: Array, second: Array) -> Array:
    """``smaller`` where ties do not matter: its derivative is one selection."""
    return jnp.where((first < second) | jnp.isnan(first), first, second)


def signed_parts(x: Array) -> tuple[Array, Array]:
    """``min(x, 0)`` and ``max(x, 0)``; NaN only in the second."""
    return jnp.where(x < 0, x, 0.0), jnp.where(x < 0, 0.0, x)


def squarable(dtype: np.dtype) -> float:
    """A magnitude with room below that at which squares overflow."""
    return float(jnp.finfo(dtype).max) ** 0.5 / 16.0


def root(squares: Array) -> Array:
    """The square root, with derivative 0 at 0."""
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def length(value: Array) -> Array:
    """``||value||_2`` over all axes, without overflow, with derivative 0 at 0."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(value), initial=0.0))
    scale = jnp.where((largest == 0) | jnp.isinf(largest), 1.0, largest)
    return scale * root(jnp.sum(jnp.square(value / scale)))


@jax.custom_jvp
def with_derivative_of(value: Array, formula: Array) -> Array:
    """``value``, differentiated as if it were ``formula``, which equals it but for rounding."""
    return value


@with_derivative_of.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


@jax.custom_jvp
def materialized(tree: PyTree) -> PyTree:
    """The same arrays, which XLA's CPU backend computes once.

    It fuses elementwise work into every consumer and repeats it there; the work behind lines and
    images of smooth functions has hundreds of operations and, in a backward walk, as many consumers
    as there are later nodes. What a loop gives is not repeated, and a loop that only stops because
    of a value is not unrolled.
    """
    return jax.lax.platform_dependent(tree, cpu=_through_a_loop, default=lambda tree: tree)


@materialized.defjvp
def _(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
    return materialized(primals[0]), tangents[0]


def _through_a_loop(tree: PyTree) -> PyTree:
    if not any(leaf.size for leaf in jax.tree.leaves(tree)):
        return tree

    def unfinished(carry: tuple[Array, PyTree]) -> Array:
        round_, found = carry
        leaf = next(leaf for leaf in jax.tree.leaves(found) if leaf.size)
        some = jnp.ravel(leaf)[0]
        # One round; for one improbable value a second one, which gives the same.
        return (round_ < 1) | ((round_ < 2) & (some == jnp.asarray(1.2345e30, some.dtype)))

    first = (jnp.int32(0), jax.tree.map(jnp.zeros_like, tree))
    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, tree), first)[1]


def float_info(dtype: np.dtype[Any]) -> np.finfo[Any]:
    """The machine limits of a floating-point dtype."""
    return jnp.finfo(dtype)

"""Workarounds for how XLA computes: maxima of computed values, and work to be done only once.

XLA may compute one value several times, in fusions that round it differently. A derivative that
compares with the result (`jnp.maximum`) may then find no operand equal to it, and one that
repeats the comparison may select both operands or neither. Gradients then vanish or double,
particularly where both operands bound the same quantity and are equal up to rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.typing import PyTree

# Values that differ by less than this many roundings, relative to their size, share the derivative.
_NEAR = 1e3


@jax.custom_jvp
def larger(first: Array, second: Array) -> Array:
    """The larger of two arrays of one shape, elementwise; NaN where either is.

    The derivative passes continuously from one operand to the other, over a distance much larger
    than rounding; equal operands share it.
    """
    return jnp.where((second > first) | jnp.isnan(second), second, first)


@larger.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    first, second = primals
    near = _NEAR * jnp.finfo(first.dtype).eps * (jnp.abs(first) + jnp.abs(second))
    comparable = jnp.isfinite(near) & (near > 0)
    difference = jnp.where(comparable, second - first, 0.0) / jnp.where(comparable, near, 1.0)
    # Infinite values never differ by rounding only; zeros are equal.
    otherwise = jnp.where(second > first, 1.0, jnp.where(second < first, 0.0, 0.5))
    share = jnp.where(comparable, jnp.clip(0.5 + 0.5 * difference, 0.0, 1.0), otherwise)
    share = jax.lax.stop_gradient(share)
    of_first, of_second = tangents
    # The derivative of the operand that is not selected may be infinite.
    of_first = jnp.where(share < 1.0, of_first, 0.0) * (1.0 - share)
    of_second = jnp.where(share > 0.0, of_second, 0.0) * share
    return larger(first, second), of_first + of_second


def smaller(first: Array, second: Array) -> Array:
    """The smaller of two arrays of one shape, elementwise, see `larger`."""
    return -larger(-first, -second)


def quick_larger(first: Array, second: Array) -> Array:
    """`larger` for where ties do not matter; its derivative is a single selection."""
    return jnp.where((first > second) | jnp.isnan(first), first, second)


def quick_smaller(first: Array, second: Array) -> Array:
    """`smaller` for where ties do not matter; its derivative is a single selection."""
    return jnp.where((first < second) | jnp.isnan(first), first, second)


def largest_along(values: Array) -> Array:
    """The largest along the first axis, with the derivative of the first that attains it.

    The derivative of `jnp.max` is NaN where no value equals the result.
    """
    index = jnp.argmax(jax.lax.stop_gradient(values), axis=0)
    return jnp.take_along_axis(values, index[None], axis=0, mode="clip")[0]


def signed_parts(x: Array) -> tuple[Array, Array]:
    """`min(x, 0)` and `max(x, 0)`; a NaN is only in the second."""
    return jnp.where(x < 0, x, 0.0), jnp.where(x < 0, 0.0, x)


def squarable(dtype: np.dtype) -> float:
    """A magnitude well below that at which squares overflow."""
    return float(jnp.finfo(dtype).max) ** 0.5 / 16.0


def root(squares: Array) -> Array:
    """The square root, with derivative 0 at 0."""
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def length(value: Array) -> Array:
    """`||value||_2` over all axes, without overflow, with derivative 0 at 0."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(value), initial=0.0))
    scale = jnp.where((largest == 0) | jnp.isinf(largest), 1.0, largest)
    return scale * root(jnp.sum(jnp.square(value / scale)))


@jax.custom_jvp
def with_derivative_of(value: Array, formula: Array) -> Array:
    """`value`, differentiated as if it were `formula`, which equals it up to rounding."""
    return value


@with_derivative_of.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


@jax.custom_jvp
def materialized(tree: PyTree) -> PyTree:
    """The same arrays, computed only once by XLA's CPU backend.

    That backend fuses elementwise work into every consumer and repeats it there. The lines and
    images of smooth functions take hundreds of operations and have, in a backward walk, as many
    consumers as there are later nodes. XLA does not repeat the results of a loop, and it does not
    unroll a loop whose end depends on a value.
    """
    return jax.lax.platform_dependent(tree, cpu=_through_a_loop, default=lambda tree: tree)


@materialized.defjvp
def _(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
    return materialized(primals[0]), tangents[0]


def _through_a_loop(tree: PyTree) -> PyTree:
    if not any(leaf.size for leaf in jax.tree.leaves(tree)):
        return tree

    # A value that XLA does not know. One of the arrays would do, but devices that divide a batch
    # would have to agree on it.
    rounds = jax.lax.optimization_barrier(jnp.int32(1))

    def unfinished(carry: tuple[Array, PyTree]) -> Array:
        return carry[0] < rounds

    first = (jnp.int32(0), jax.tree.map(jnp.zeros_like, tree))
    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, tree), first)[1]


def float_info(dtype: np.dtype[Any]) -> np.finfo[Any]:
    """The machine limits of a floating-point dtype."""
    return jnp.finfo(dtype)

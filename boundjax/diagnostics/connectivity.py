"""Curves between two networks in the space of parameters, and barriers of the loss along them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree


def bezier(t: ArrayLike, start: PyTree, control: PyTree, end: PyTree) -> PyTree:
    """The point `phi(t) = (1 - t)^2 start + 2 t (1 - t) control + t^2 end` of a quadratic curve.

    The curve begins at `start` and finishes at `end`, bit for bit, whatever `control` is. With
    `control = (start + end) / 2` it is the straight segment. The derivative of `phi(t)` in
    `control` is `2 t (1 - t)` times the identity.

    Args:
      t: position in `[0, 1]`, a scalar.
      start: parameters at `t = 0`, a pytree of floating-point arrays.
      control: the control point, a pytree like `start`.
      end: parameters at `t = 1`, a pytree like `start`.

    Returns:
      A pytree like `start`.

    Raises:
      ValueError: if the pytrees do not match, or `t` is not a scalar.

    Source: Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
    section 3.3; Lee et al. 2021, "Loss Landscape Matters", appendix I.
    """
    if jnp.ndim(t) != 0:
        raise ValueError(f"t must be a scalar, got the shape {jnp.shape(t)}")
    for name, tree in (("control", control), ("end", end)):
        shapes = [jax.tree.map(jnp.shape, each) for each in (tree, start)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} must have the structure and shapes of start, got {shapes[0]} for start of "
                f"{shapes[1]}"
            )

    def point(first: ArrayLike, middle: ArrayLike, last: ArrayLike) -> Array:
        first = jnp.asarray(first)
        here = jnp.asarray(t).astype(first.dtype)
        rest = 1.0 - here
        inside = rest * rest * first + 2.0 * here * rest * middle + here * here * last
        # The sum would turn -0 into 0, and an infinite control point into NaN.
        return jnp.where(here == 0, first, jnp.where(here == 1, last, inside))

    return jax.tree.map(point, start, control, end)


class Barrier(NamedTuple):
    """How far a loss along a path rises above both of the path's ends.

    Attributes:
      exists: whether `height > 2 * spread`.
      height: largest loss along the path minus the larger of the losses at its ends; 0 if the
        largest is at an end. NaN if a loss is.
      spread: the largest spread among those at the ends and at the highest point.
      index: the highest point, an index into the losses.
    """

    exists: Bool[Array, ""]
    height: Float[Array, ""]
    spread: Float[Array, ""]
    index: Int[Array, ""]


def barrier(losses: Float[Array, " T"], spreads: Float[Array, " T"]) -> Barrier:
    """Decides whether a loss has a barrier along a path.

    It has one if somewhere it exceeds the losses at both ends by more than twice its spread: what
    is less may come from the choice of the images.

    Args:
      losses: `[T]`, the mean loss at `T >= 2` points in the order of the path; the first and the
        last are its ends.
      spreads: `[T]`, the spread of each mean over batches of images, for example its standard error
        (`spread_over_batches`); 0 where the loss is exact.

    Raises:
      ValueError: for fewer than two points, or spreads of another shape.

    Source: Lee et al. 2021, "Loss Landscape Matters", appendix I, without the spread.
    """
    if jnp.ndim(losses) != 1 or len(losses) < 2 or jnp.shape(spreads) != jnp.shape(losses):
        raise ValueError(
            "losses and spreads must have one shape [T] with T >= 2, got "
            f"{jnp.shape(losses)} and {jnp.shape(spreads)}"
        )
    losses, spreads = jnp.asarray(losses), jnp.asarray(spreads)
    index = jnp.argmax(losses)
    height = losses[index] - jnp.maximum(losses[0], losses[-1])
    spread = jnp.maximum(spreads[index], jnp.maximum(spreads[0], spreads[-1]))
    return Barrier(height > 2.0 * spread, height, spread, index)


def spread_over_batches(values: Float[Array, " K"]) -> Float[Array, ""]:
    """The spread of the mean of `K` batches: its standard error, their deviation over `sqrt(K)`.

    Unlike the deviation itself, it hardly depends on the size of the batches.

    Args:
      values: `[K]`, the mean of each of `K >= 2` batches of equal size.

    Returns:
      A scalar; the deviation has the divisor `K - 1`.

    Raises:
      ValueError: for fewer than two batches.
    """
    if jnp.ndim(values) != 1 or len(values) < 2:
        raise ValueError(f"values must be those of two batches or more, got {jnp.shape(values)}")
    values = jnp.asarray(values)
    return jnp.std(values, ddof=1) / math.sqrt(len(values))

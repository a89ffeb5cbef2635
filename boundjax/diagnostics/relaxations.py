"""The relaxed gradient behind a linear bound, and the slopes that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax.sets.interval import Interval


class GradientChange(NamedTuple):
    """How the relaxed gradient of `m` rows has changed.

    Attributes:
      flipped: `[m]`, the fraction of the input's elements whose coefficient has changed its sign.
        A change between 0 and a sign counts as one half. (The released code of the paper prints
        twice this number.)
      distance: `[m]`, the l2 norm of the difference of the coefficients.
    """

    flipped: Float[Array, " m"]
    distance: Float[Array, " m"]


class SlopeShares(NamedTuple):
    """Fractions of the unstable ReLUs whose lower line has slope 0, between 0 and 1, or 1."""

    zero: Float[Array, ""]
    between: Float[Array, ""]
    one: Float[Array, ""]


def relaxed_gradient_change(
    first: Float[Array, "m ..."], second: Float[Array, "m ..."]
) -> GradientChange:
    """Compares the relaxed gradients of one example before and after an update.

    The relaxed gradient of a linear bound `g x + b` is `g`, that is `coefficients` of
    `boundjax.linear(..., has_aux=True)`. It is 0 for interval bounds, and constant without
    nonlinear ops.

    Args:
      first: `[m, *input]`, the coefficients of `m` rows.
      second: `[m, *input]`, those at other parameters.

    Returns:
      Two arrays `[m]`; NaN where a coefficient is NaN.

    Raises:
      ValueError: if the shapes differ, or there is no axis of the input.

    Source: Lee et al. 2021, "Loss Landscape Matters", section 4.2.
    """
    if first.shape != second.shape or first.ndim < 2:
        raise ValueError(
            "first and second must have one shape [m, *input], got "
            f"{first.shape} and {second.shape}"
        )
    axes = tuple(range(1, first.ndim))
    flips = 0.5 * jnp.abs(jnp.sign(first) - jnp.sign(second))
    squares = jnp.square(first - second)
    return GradientChange(jnp.mean(flips, axis=axes), jnp.sqrt(jnp.sum(squares, axis=axes)))


def slope_shares(
    pre_activations: Mapping[str, Interval], slopes: Mapping[str, Array]
) -> SlopeShares:
    """Fractions of the unstable ReLUs whose slope is 0, between 0 and 1, or 1.

    Args:
      pre_activations: label -> bounds of any shape; labels without a slope are left out.
      slopes: label -> positions in `[0, 1]`, of the shape of the bounds; `slopes` of
        `boundjax.linear(..., has_aux=True)`.

    Returns:
      Three scalars that add up to 1. NaN if no ReLU is unstable, or where a bound or the slope of
      an unstable ReLU is NaN.

    Raises:
      ValueError: if there are no slopes, as for interval bounds; for a label without bounds, or
        bounds of another shape.

    Source: Lee et al. 2021, "Loss Landscape Matters", Figure 5.
    """
    if not slopes:
        raise ValueError(
            "slopes must hold the positions of at least one ReLU, got none; use a method with free "
            "slopes (interval bounds and slopes='constant' have none)"
        )
    counts = jnp.zeros((4,), jnp.int32)
    for label, positions in slopes.items():
        if label not in pre_activations:
            raise ValueError(
                f"slopes has an entry {label!r} without bounds, got bounds of "
                f"{', '.join(sorted(pre_activations)) or 'none'}"
            )
        lower, upper = pre_activations[label]
        if positions.shape != lower.shape:
            raise ValueError(
                f"{label}: slopes must have the shape {lower.shape} of the bounds, got "
                f"{positions.shape}; slopes of separate rows are measured one row at a time"
            )
        # Written so that a NaN bound counts as unstable, and a NaN slope as none of the three.
        unstable = ~((lower >= 0) | (upper <= 0))
        bounded = ~jnp.isnan(lower + upper)
        kinds = (positions <= 0, (positions > 0) & (positions < 1), positions >= 1)
        sums = [jnp.sum(unstable & bounded & kind) for kind in kinds]
        counts = counts + jnp.stack([*sums, jnp.sum(unstable)]).astype(jnp.int32)
    *kinds, unstable = counts
    complete = kinds[0] + kinds[1] + kinds[2] == unstable
    return SlopeShares(*(jnp.where(complete, kind / unstable, jnp.nan) for kind in kinds))

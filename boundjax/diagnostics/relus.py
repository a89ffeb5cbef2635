"""States of the ReLUs of every layer, and the regularizers of short warm-up as measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from boundjax.sets.interval import Interval
from boundjax.training.regularizers import (
    RELUStates,
    relu_balance_loss,
    relu_states,
    tightness_loss,
)


class WarmupMeasures(NamedTuple):
    """The two losses of short warm-up, as measures.

    Attributes:
      tightness: `L_tightness`; 0 if the bounds of no layer are more than `1 / tau` times as wide as
        the input box.
      relu_balance: `L_relu`, 0 where active and inactive ReLUs are balanced.
    """

    tightness: Float[Array, ""]
    relu_balance: Float[Array, ""]


def _require_layers(pre_activations: Mapping[str, Interval]) -> None:
    if not pre_activations:
        raise ValueError("pre_activations must hold the bounds of at least one ReLU, got none")


def relu_states_by_layer(
    pre_activations: Mapping[str, Interval], dead_margin: float = 0.0
) -> dict[str, RELUStates]:
    """Fractions of each layer's ReLUs that are active, unstable or dead (inactive).

    Args:
      pre_activations: label -> bounds of any shape, of one example or of a batch.
      dead_margin: see `boundjax.training.relu_states`, which is this for all layers together.

    Returns:
      label -> three scalars that add up to 1.

    Raises:
      ValueError: for no ReLUs, or a `dead_margin` that is negative or NaN.
    """
    _require_layers(pre_activations)
    return {
        label: relu_states({label: bounds}, dead_margin)
        for label, bounds in pre_activations.items()
    }


def slope_histograms(
    pre_activations: Mapping[str, Interval], bins: int = 50
) -> dict[str, Int[Array, " bins"]]:
    """Histograms of the slopes `u / (u - l)` of the upper lines of each layer's unstable ReLUs.

    Args:
      pre_activations: label -> bounds of any shape, of one example or of a batch.
      bins: number of bins of equal width over `[0, 1]`; the last one contains 1.

    Returns:
      label -> counts `[bins]`, which add up to the number of unstable ReLUs. A ReLU whose bounds
      are infinite or NaN is in no bin.

    Raises:
      ValueError: for no ReLUs, or fewer than one bin.
    """
    _require_layers(pre_activations)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return {label: _histogram(*bounds, bins) for label, bounds in pre_activations.items()}


def _histogram(lower: Array, upper: Array, bins: int) -> Array:
    lower, upper = jnp.ravel(lower), jnp.ravel(upper)
    width = upper - lower
    counted = (lower < 0) & (upper > 0) & jnp.isfinite(width)
    slopes = upper / jnp.where(counted, width, 1.0)
    inner = jnp.linspace(0.0, 1.0, bins + 1, dtype=slopes.dtype)[1:-1]
    indices = jnp.searchsorted(inner, slopes, side="right")
    return jnp.zeros((bins,), jnp.int32).at[indices].add(counted.astype(jnp.int32))


def warmup_measures(
    input_interval: Interval, pre_activations: Mapping[str, Interval], tau: float = 0.5
) -> WarmupMeasures:
    """Measures `L_tightness` and `L_relu`, also for methods that are not trained on them.

    Args:
      input_interval, pre_activations, tau: as for `boundjax.training.tightness_loss`.

    Returns:
      Two scalars, through which no gradient flows.

    Raises:
      ValueError: for a `tau` outside `(0, 1]`, or no ReLUs.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", Figures 3 and 4.
    """
    box, bounds = jax.lax.stop_gradient((input_interval, dict(pre_activations)))
    return WarmupMeasures(tightness_loss(box, bounds, tau), relu_balance_loss(bounds, tau))

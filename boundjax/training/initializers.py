"""Initial weights for certified training, as Flax initializers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def ibp_normal(scale: float = 1.0) -> Callable[..., Array]:
    """Normal weights that keep the width of interval bounds from layer to layer.

    The weights are `N(0, sigma^2)` with `sigma = scale sqrt(2 pi) / n`, where `n` is the number of
    inputs of a unit. The absolute weights of a unit then add up to `n E|w| = 2 scale` on average. A
    ReLU halves the mean width, so the gain `n E|w| / 2` equals `scale`.

    Args:
      scale: factor of the standard deviation; 1 / 2 for weights that read a sum of two branches.

    Returns:
      `initializer(key, shape, dtype=float32)` for kernels `[..., out]`, whose axes but the last are
      the inputs of a unit.

    Raises:
      ValueError: for a scale that is not positive and finite; the initializer raises it for fewer
        than two axes.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", section 3.3.1.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")

    def initializer(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        if len(shape) < 2:
            raise ValueError(f"a kernel needs a shape [..., in, out], got {tuple(shape)}")
        fan_in = math.prod(shape[:-1])
        sigma = scale * math.sqrt(2.0 * math.pi) / max(fan_in, 1)
        return sigma * jax.random.normal(key, tuple(shape), dtype)

    return initializer

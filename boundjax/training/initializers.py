"""Initial weights for certified training, in the form of Flax's initializers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def ibp_normal(scale: float = 1.0) -> Callable[..., jax.Array]:
    """Normal weights that keep the width of interval bounds from layer to layer.

    `N(0, sigma^2)` with `sigma = scale sqrt(2 pi) / n`, `n` the number of inputs of a unit. Then
    the absolute weights of a unit add up to `n E|w| = 2 scale` on average, and a ReLU, which halves
    the mean width, makes the gain `n E|w| / 2` equal to `scale`.

    Args:
      scale: of the standard deviation; 1 / 2 for weights that read a sum of two branches.

    Returns:
      `initializer(key, shape, dtype=float32)` for kernels `[..., out]`: all axes but the last are
      the inputs of a unit.

    Raises:
      ValueError: for a scale that is not positive and finite; the initializer, for fewer than two
        axes.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", section 3.3.1.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")

    def initializer(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(f"a kernel needs a shape [..., in, out], got {tuple(shape)}")
        fan_in = math.prod(shape[:-1])
        sigma = scale * math.sqrt(2.0 * math.pi) / max(fan_in, 1)
        return sigma * jax.random.normal(key, tuple(shape), dtype)

    return initializer

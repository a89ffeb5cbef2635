"""Initial weights for certified training, as Flax takes them: functions of (key, shape, dtype)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def ibp_normal(scale: float = 1.0) -> Initializer:
    """Kernels through which interval bounds neither grow nor vanish at the start of training.

    Normal with the standard deviation `scale * sqrt(2 pi) / n`, where `n` is the fan-in. Then the
    sum of `|w|` over the inputs of a neuron is `2 scale` on average, and a layer and its ReLU keep
    the mean width of intervals around zero (Shi et al. 2021, section 4.1, "IBP initialization":
    the difference gain `n / 2 * E|w|` is 1).

    Args:
      scale: 1/2 where the inputs of the kernel are sums of two branches, whose widths add up.

    Returns:
      A function of a key, the shape `[..., inputs, outputs]` of a dense or convolution kernel and a
      dtype to the kernel.

    Raises:
      ValueError: for a scale that is not positive and finite; by the function, for a shape of fewer
        than two axes.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale of an initialization must be positive, got {scale!r}")

    def initialize(
        key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32
    ) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(f"a kernel has the shape [..., inputs, outputs], got {tuple(shape)}")
        deviation = scale * math.sqrt(2.0 * math.pi) / math.prod(shape[:-1])
        return deviation * jax.random.normal(key, shape, dtype)

    return initialize

"""The one shape of network that certified-training papers use: convolutions, dense, logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

# The default of PyTorch, which the published numbers were made with: uniform in +-1/sqrt(fan_in).
_kernel_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Convolution(NamedTuple):
    """C(f, k, s, p) of the table: filters, kernel size, stride and symmetric zero padding."""

    filters: int
    kernel: int
    stride: int
    padding: int


class ConvolutionalClassifier(nn.Module):
    """Convolutions, then dense layers, each followed by a ReLU; then the logits.

    Batch normalisation, where asked for, comes after every convolution and hidden dense layer,
    before the ReLU. In train mode it uses the statistics of the batch and updates the running
    averages with `bn_momentum`. With `bn_momentum = 0` the updated `batch_stats` *are* the
    (differentiable) statistics of the batch: the eval-mode model with them is the function that
    training bounds.

    Attributes:
      convolutions: the convolutions, first to last.
      hidden: widths of the hidden dense layers.
      num_classes: number of logits `C`.
      batch_norm: whether to normalise.
      bn_momentum: weight of the old running average in its update.
      mean, std: per-channel normalisation of the input as the first layer, or None. Radii and clip
        boxes stay in pixel units.
    """

    convolutions: tuple[Convolution, ...] = ()
    hidden: tuple[int, ...] = ()
    num_classes: int = 10
    batch_norm: bool = False
    bn_momentum: float = 0.9
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, channels]` in `[0, 1]` to logits `[B, C]`."""
        if self.mean is not None:
            x = x - jnp.asarray(self.mean, x.dtype).reshape(1, 1, 1, -1)
        if self.std is not None:
            x = x / jnp.asarray(self.std, x.dtype).reshape(1, 1, 1, -1)
        for filters, kernel, stride, padding in self.convolutions:
            x = nn.Conv(
                filters,
                (kernel, kernel),
                strides=(stride, stride),
                padding=((padding, padding), (padding, padding)),
                kernel_init=_kernel_init,
            )(x)
            x = nn.relu(self._normalised(x, train))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.Dense(width, kernel_init=_kernel_init)(x)
            x = nn.relu(self._normalised(x, train))
        return nn.Dense(self.num_classes, kernel_init=_kernel_init)(x)

    def _normalised(self, x: jax.Array, train: bool) -> jax.Array:
        if not self.batch_norm:
            return x
        return nn.BatchNorm(use_running_average=not train, momentum=self.bn_momentum)(x)

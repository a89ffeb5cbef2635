"""The one shape of network that certified-training papers use: convolutions, dense, logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

# The default of PyTorch, which most published numbers were made with: uniform in +-1/sqrt(fan_in).
_kernel_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
# Of convolutions, by name; "fan_out" has the variance 2 / (k^2 out) of Wong et al. 2018 and BCP.
_CONVOLUTION_INITS = {
    "fan_in": _kernel_init,
    "fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
}


class Convolution(NamedTuple):
    """C(f, k, s, p) of the table: filters, kernel size, stride and symmetric zero padding."""

    filters: int
    kernel: int
    stride: int
    padding: int


class Block(NamedTuple):
    """A residual block of the networks of Wong et al. 2018; with `halve`, half the resolution.

    ReLU(second(ReLU(first(x))) + skip(x)): `first` is C(f, 3, 1, 1), halving C(f, 4, 2, 1);
    `second` C(f, 3, 1, 1); `skip` C(f, 1, 1, 0), halving C(f, 2, 2, 0).
    """

    filters: int
    halve: bool = False


class ConvolutionalClassifier(nn.Module):
    """Convolutions, residual blocks, dense layers, each followed by a ReLU; then the logits.

    Batch normalisation, where asked for, comes after every convolution and hidden dense layer,
    before the ReLU. In train mode it uses the statistics of the batch and updates the running
    averages with `bn_momentum`. With `bn_momentum = 0` the updated `batch_stats` *are* the
    (differentiable) statistics of the batch: the eval-mode model with them is the function that
    training bounds.

    Attributes:
      convolutions: the convolutions, first to last.
      blocks: residual blocks after them, without batch normalisation.
      hidden: widths of the hidden dense layers.
      num_classes: number of logits `C`.
      batch_norm: whether to normalise.
      bn_momentum: weight of the old running average in its update.
      mean, std: per-channel normalisation of the input as the first layer, or None. Radii and clip
        boxes stay in pixel units.
      convolution_init: how the kernels of convolutions start, `"fan_in"` or `"fan_out"`.
    """

    convolutions: tuple[Convolution, ...] = ()
    blocks: tuple[Block, ...] = ()
    hidden: tuple[int, ...] = ()
    num_classes: int = 10
    batch_norm: bool = False
    bn_momentum: float = 0.9
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    convolution_init: str = "fan_in"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[B, H, W, channels]` in `[0, 1]` to logits `[B, C]`."""
        if self.mean is not None:
            x = x - jnp.asarray(self.mean, x.dtype).reshape(1, 1, 1, -1)
        if self.std is not None:
            x = x / jnp.asarray(self.std, x.dtype).reshape(1, 1, 1, -1)
        for convolution in self.convolutions:
            x = nn.relu(self._normalised(self._convolved(x, *convolution), train))
        for filters, halve in self.blocks:
            y = nn.relu(self._convolved(x, filters, *((4, 2, 1) if halve else (3, 1, 1))))
            y = self._convolved(y, filters, 3, 1, 1)
            x = nn.relu(y + self._convolved(x, filters, *((2, 2, 0) if halve else (1, 1, 0))))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.Dense(width, kernel_init=_kernel_init)(x)
            x = nn.relu(self._normalised(x, train))
        return nn.Dense(self.num_classes, kernel_init=_kernel_init)(x)

    def _convolved(
        self, x: jax.Array, filters: int, kernel: int, stride: int, padding: int
    ) -> jax.Array:
        return nn.Conv(
            filters,
            (kernel, kernel),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            kernel_init=_CONVOLUTION_INITS[self.convolution_init],
        )(x)

    def _normalised(self, x: jax.Array, train: bool) -> jax.Array:
        if not self.batch_norm:
            return x
        return nn.BatchNorm(use_running_average=not train, momentum=self.bn_momentum)(x)

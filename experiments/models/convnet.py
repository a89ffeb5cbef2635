"""The network that papers on certified training use: convolutions, dense layers, logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from boundjax.stochastic import GaussianNoise
from boundjax.training import ibp_normal
from experiments.settings.errors import ExperimentError

Layer = Callable[[jax.Array], jax.Array]
Initializer = Callable[..., jax.Array]

# PyTorch's default, behind most published numbers: uniform in +-1/sqrt(fan_in).
_fan_in = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
# "fan_out" has the variance 2 / (k^2 out) of Wong et al. 2018 and BCP.
_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_CONVOLUTION_INITS = {"fan_in": _fan_in, "fan_out": _fan_out}
_DENSE_INITS = {"fan_in": _fan_in, "fan_out": _fan_in}
KERNEL_INITS = (*_CONVOLUTION_INITS, "ibp")


class Convolution(NamedTuple):
    """C(f, k, s, p) in the table: filters, kernel size, stride and symmetric zero padding."""

    filters: int
    kernel: int
    stride: int
    padding: int


class GroupedConvolution(NamedTuple):
    """A convolution in groups; the filters of each group see an equal share of the channels."""

    filters: int
    kernel: int
    stride: int
    padding: int
    groups: int


class Pool(NamedTuple):
    """Max or average pooling over adjacent windows of `size` x `size` pixels."""

    size: int
    average: bool = False


class Residual(NamedTuple):
    """A residual block, ReLU(body(x) + skip(x)), with a ReLU between any two layers of the body.

    The skip is one convolution, or None for the identity.
    """

    body: tuple[Convolution | GroupedConvolution, ...]
    skip: Convolution | None


class Block(NamedTuple):
    """A residual block of the networks of Wong et al. 2018; `halve` halves the resolution.

    It is ReLU(second(ReLU(first(x))) + skip(x)). `first` is C(f, 3, 1, 1), or C(f, 4, 2, 1) to
    halve; `second` is C(f, 3, 1, 1); `skip` is C(f, 1, 1, 0), or C(f, 2, 2, 0) to halve.
    """

    filters: int
    halve: bool = False

    @property
    def body(self) -> tuple[Convolution, ...]:
        """The two convolutions beside the skip."""
        first = (4, 2, 1) if self.halve else (3, 1, 1)
        return Convolution(self.filters, *first), Convolution(self.filters, 3, 1, 1)

    @property
    def skip(self) -> Convolution:
        """The convolution of the skip."""
        return Convolution(self.filters, *((2, 2, 0) if self.halve else (1, 1, 0)))


class ConvolutionalClassifier(nn.Module):
    """Convolutions, residual blocks, dense layers, each followed by a ReLU; then the logits.

    Optional batch normalisation comes after every convolution and hidden dense layer, before the
    ReLU or the sum of a residual block. In train mode it uses the statistics of the batch and
    updates the running averages with `bn_momentum`. With `bn_momentum = 0` the updated
    `batch_stats` *are* the (differentiable) statistics of the batch: the eval-mode model with them
    is the function that training bounds.

    Without residual blocks the network is a list of layers and can be applied in parts (TAPS):
    `apply(v, apply(v, x, stop=k), start=k)` is `apply(v, x)` for every `k`. The layers are counted
    as in CTBench: the normalisation of the input, even if there is none; then every convolution,
    batch normalisation, ReLU, pooling, the flattening, and every dense layer. CNN-7 has 21.

    Attributes:
      convolutions: the convolutions and the pooling between them, first to last.
      blocks: residual blocks after the convolutions.
      hidden: widths of the hidden dense layers.
      num_classes: number of logits `C`.
      batch_norm: whether to normalise.
      bn_momentum: weight of the old running average in its update.
      mean, std: per-channel normalisation of the input as the first layer, or None. Radii and clip
        boxes stay in pixel units.
      kernel_init: initialisation of the kernels. `"fan_in"`: uniform in +-1/sqrt(fan_in).
        `"fan_out"`: convolutions normal with variance 2 / (k^2 out), dense layers as before.
        `"ibp"`: all but the last layer by `boundjax.training.ibp_normal`, at half the scale behind
        a residual block, whose branches add up their widths (Shi et al. 2021).
      negative_slope: 0 for ReLU; otherwise the slope of a LeakyReLU in its place.
      noise: None, or the standard deviations of Gaussian noise on the input of the first
        convolution and of all others, those of skips included (RSE, Liu et al. 2018: 0.2 and 0.1):
        a random network, see `boundjax.stochastic`. A noise is no layer of its own.
    """

    convolutions: tuple[Convolution | Pool, ...] = ()
    blocks: tuple[Block | Residual, ...] = ()
    hidden: tuple[int, ...] = ()
    num_classes: int = 10
    batch_norm: bool = False
    bn_momentum: float = 0.9
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    kernel_init: str = "fan_in"
    negative_slope: float = 0.0
    noise: tuple[float, float] | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, *, start: int = 0, stop: int | None = None
    ) -> jax.Array:
        """Maps images `[B, H, W, channels]` in `[0, 1]` to logits `[B, C]`.

        Args:
          x: images, or the output of the layers before `start`.
          train: whether to normalise by the statistics of the batch and update the averages.
          start, stop: apply the layers `start <= i < stop` only; None means `layer_count`.

        Raises:
          ExperimentError: for a part of a network with residual blocks, unless `0 <= start <= stop
            <= layer_count`, and for images too small for the convolutions and pools.
        """
        layers = self._layers(train)
        if self.blocks and (start, stop) != (0, None):
            raise ExperimentError(
                "a network with residual blocks is not a list of layers: apply it as a whole, got "
                f"start={start}, stop={stop}"
            )
        if not 0 <= start <= (len(layers) if stop is None else stop) <= len(layers):
            raise ExperimentError(
                f"of {len(layers)} layers, expected 0 <= start <= stop <= {len(layers)}, "
                f"got start={start}, stop={stop}"
            )
        return _composed(layers[start:stop], x)

    @property
    def layer_count(self) -> int:
        """The number of layers that `start` and `stop` count.

        Raises:
          ExperimentError: for a network with residual blocks.
        """
        if self.blocks:
            raise ExperimentError("a network with residual blocks is not a list of layers to count")
        return len(self._layers(train=False))

    def _layers(self, train: bool) -> list[Layer]:
        """Returns the network as functions, which create their modules when they are called.

        The names are Flax's automatic ones, stated here because a part may begin at any layer.
        """
        if self.kernel_init not in KERNEL_INITS:
            raise ExperimentError(
                f"kernel_init must be one of {', '.join(KERNEL_INITS)}, got {self.kernel_init!r}"
            )
        convs, norms, denses = (
            map(f"{kind}_{{}}".format, itertools.count()) for kind in ("Conv", "BatchNorm", "Dense")
        )
        activated = partial(_activated, negative_slope=self.negative_slope)

        def normalised(layer: Layer) -> list[Layer]:
            if not self.batch_norm:
                return [layer]
            options = {"use_running_average": not train, "momentum": self.bn_momentum}
            return [layer, partial(_applied, nn.BatchNorm, {**options, "name": next(norms)})]

        noises = itertools.count()

        def disturbed(layer: Layer) -> Layer:
            if self.noise is None:
                return layer
            index = next(noises)
            options = {"std": self.noise[min(index, 1)], "name": f"GaussianNoise_{index}"}
            return partial(_composed, (partial(_applied, GaussianNoise, options), layer))

        def convolved(layer: Convolution | GroupedConvolution, scale: float = 1.0) -> list[Layer]:
            options = {
                "features": layer.filters,
                "kernel_size": (layer.kernel, layer.kernel),
                "strides": (layer.stride, layer.stride),
                "padding": ((layer.padding, layer.padding),) * 2,
                "feature_group_count": getattr(layer, "groups", 1),
                "kernel_init": self._initializer(scale, _CONVOLUTION_INITS),
                "name": next(convs),
            }
            return normalised(disturbed(partial(_applied, nn.Conv, options)))

        def dense(width: int, kernel_init: Initializer) -> Layer:
            options = {"features": width, "kernel_init": kernel_init, "name": next(denses)}
            return partial(_applied, nn.Dense, options)

        layers: list[Layer] = [partial(_standardised, mean=self.mean, std=self.std)]
        for layer in self.convolutions:
            if isinstance(layer, Pool):
                layers.append(partial(_pooled, pool=layer))
            else:
                layers += [*convolved(layer), activated]
        scale = 1.0
        for block in self.blocks:
            body = convolved(block.body[0], scale)
            for layer in block.body[1:]:
                body += [activated, *convolved(layer)]
            skip = [] if block.skip is None else convolved(block.skip, scale)
            layers += [partial(_summed, body=body, skip=skip), activated]
            scale = 0.5
        layers.append(_flattened)
        for width in self.hidden:
            layers += [*normalised(dense(width, self._initializer(scale, _DENSE_INITS))), activated]
            scale = 1.0
        return [*layers, dense(self.num_classes, _fan_in)]

    def _initializer(self, scale: float, by_name: Mapping[str, Initializer]) -> Initializer:
        return ibp_normal(scale) if self.kernel_init == "ibp" else by_name[self.kernel_init]


def _composed(layers: Sequence[Layer], x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def _applied(module: type[nn.Module], options: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return module(**options)(x)


def _standardised(
    x: jax.Array, mean: Sequence[float] | None, std: Sequence[float] | None
) -> jax.Array:
    if mean is not None:
        x = x - jnp.asarray(mean, x.dtype).reshape(1, 1, 1, -1)
    if std is not None:
        x = x / jnp.asarray(std, x.dtype).reshape(1, 1, 1, -1)
    return x


def _activated(x: jax.Array, negative_slope: float) -> jax.Array:
    return nn.leaky_relu(x, negative_slope) if negative_slope else nn.relu(x)


def _pooled(x: jax.Array, pool: Pool) -> jax.Array:
    window = (pool.size, pool.size)
    if not pool.average:
        return nn.max_pool(x, window, strides=window)
    # `nn.avg_pool` divides by an integer, which strict promotion refuses.
    return nn.pooling.pool(x, 0.0, jax.lax.add, window, window, "VALID") / float(pool.size**2)


def _summed(x: jax.Array, body: Sequence[Layer], skip: Sequence[Layer]) -> jax.Array:
    return _composed(body, x) + _composed(skip, x)


def _flattened(x: jax.Array) -> jax.Array:
    if 0 in x.shape[1:]:
        raise ExperimentError(
            f"the convolutions and pools leave maps of shape {x.shape[1:]}: use larger images"
        )
    return x.reshape(x.shape[0], -1)

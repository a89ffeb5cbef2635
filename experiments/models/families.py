"""Small members of the common architecture families, in Linen and some of them in NNX.

Tests and benchmarks of the bounds use them for breadth: each has every layer type of its family
once or twice and is small enough for full CROWN on two cores. Images are `[8, 8, 3]`, sequences
`[6, 4]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

IMAGE, SEQUENCE = (8, 8, 3), (6, 4)
CLASSES = 4


class MLP(nn.Module):
    """Dense layers with gelu and silu."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nn.gelu(nn.Dense(24)(x.reshape(x.shape[0], -1)))
        x = nn.silu(nn.Dense(16)(x))
        return nn.Dense(CLASSES)(x)


class CNN(nn.Module):
    """Convolutions, max and average pooling, dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.leaky_relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


class ResNet(nn.Module):
    """Two residual blocks with batch normalisation, the second one strided; global pooling."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""

        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(norm(nn.Conv(6, (3, 3), use_bias=False)(x)))
        for features, strides in ((6, 1), (8, 2)):
            y = nn.relu(norm(nn.Conv(features, (3, 3), strides=strides, use_bias=False)(x)))
            y = norm(nn.Conv(features, (3, 3), use_bias=False)(y))
            if strides > 1:
                x = norm(nn.Conv(features, (1, 1), strides=strides, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Layers on the concatenation of all earlier ones; group normalisation, elu."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nn.Conv(4, (3, 3), strides=2)(x)
        for _ in range(2):
            y = nn.Conv(4, (3, 3))(nn.elu(nn.GroupNorm(num_groups=2)(x)))
            x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class UNet(nn.Module):
    """Downsampling; upsampling by a transposed convolution and by repeated pixels; skips."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        top = nn.relu(nn.Conv(4, (3, 3))(x))
        middle = nn.relu(nn.Conv(6, (3, 3), strides=2)(top))
        bottom = nn.relu(nn.Conv(6, (3, 3), strides=2)(middle))
        up = jax.image.resize(bottom, (*middle.shape[:-1], 6), "nearest")
        up = nn.relu(nn.Conv(6, (3, 3))(jnp.concatenate([up, middle], axis=-1)))
        up = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(up)
        x = nn.Conv(CLASSES, (1, 1))(jnp.concatenate([up, top], axis=-1))
        return x.mean((1, 2))


class ViT(nn.Module):
    """Patches, positions, one pre-norm transformer block, mean over the tokens."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nn.Conv(8, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.param("position", nn.initializers.normal(0.1), (1, x.shape[1], 8))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        y = nn.LayerNorm()(x)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(y)))
        return nn.Dense(CLASSES)(x.mean(1))


class LSTM(nn.Module):
    """A recurrent layer over six steps; classifies its last output."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        outputs = nn.RNN(nn.LSTMCell(6))(x)
        assert not isinstance(outputs, tuple)  # a pair only with `return_carry`
        return nn.Dense(CLASSES)(outputs[:, -1])


class Mixer(nn.Module):
    """One mixer block: across tokens, then across channels, with layer norms and gelu."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nn.Conv(8, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, 8)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(8)(y)))
        x = x + y.swapaxes(1, 2)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class NnxMLP(nnx.Module):
    """`MLP` in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(192, 24, rngs=rngs)
        self.second = nnx.Linear(24, 16, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nnx.gelu(self.first(x.reshape(x.shape[0], -1)))
        return self.head(nnx.silu(self.second(x)))


class NnxResNet(nnx.Module):
    """One residual block with batch normalisation, global pooling."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.first = nnx.Conv(6, 6, (3, 3), use_bias=False, rngs=rngs)
        self.second = nnx.Conv(6, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(6, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = nnx.relu(self.norms[0](self.stem(x)))
        y = nnx.relu(self.norms[1](self.first(x)))
        x = nnx.relu(x + self.norms[2](self.second(y)))
        return self.head(x.mean((1, 2)))


class NnxViT(nnx.Module):
    """`ViT` in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, 8, (4, 4), strides=4, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.widen = nnx.Linear(8, 16, rngs=rngs)
        self.narrow = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[B, 4]` of a batch."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.attention(self.norms[0](x))
        x = x + self.narrow(nnx.gelu(self.widen(self.norms[1](x))))
        return self.head(x.mean(1))


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: its module class, the shape of one example, and its layers in words."""

    module: type[nn.Module] | Callable[[nnx.Rngs], nnx.Module]
    input_shape: tuple[int, ...]
    layers: str

    def model(self, seed: int, dtype: DTypeLike = jnp.float32) -> Callable[[jax.Array], jax.Array]:
        """Creates a function of a batch, with random weights and statistics."""
        if isinstance(self.module, type) and issubclass(self.module, nn.Module):
            module = self.module()
            example = jnp.zeros((1, *self.input_shape), dtype)
            variables = _shaken(module.init(jax.random.key(seed), example), seed, dtype)

            def apply_linen(x: jax.Array) -> jax.Array:
                logits = module.apply(variables, x)
                assert not isinstance(logits, tuple)  # a pair only with `mutable` collections
                return logits

            return apply_linen
        graph, state = nnx.split(self.module(nnx.Rngs(seed)))
        state = _shaken(state, seed, dtype)

        def apply_nnx(x: jax.Array) -> jax.Array:
            model = nnx.merge(graph, state)
            model.eval()
            return model(x)

        return apply_nnx


def _shaken(variables: Any, seed: int, dtype: DTypeLike) -> Any:
    """Moves biases, scales and statistics away from 0 and 1, where a wrong rule could hide."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(variables))))

    def shake(value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        noise = jax.random.normal(next(keys), value.shape, value.dtype)
        return (value * jnp.exp(0.1 * noise) + 0.05).astype(dtype)

    return jax.tree.map(shake, variables)


FAMILIES: dict[str, Family] = {
    "mlp": Family(MLP, IMAGE, "dense, gelu, silu"),
    "cnn": Family(CNN, IMAGE, "conv, max and average pooling, leaky relu"),
    "resnet": Family(ResNet, IMAGE, "conv, batch norm, residual adds, relu"),
    "densenet": Family(DenseNet, IMAGE, "conv, group norm, concatenation, elu"),
    "unet": Family(UNet, IMAGE, "conv, transposed conv, nearest upsampling, skips"),
    "vit": Family(ViT, IMAGE, "attention, softmax, layer norm, gelu"),
    "lstm": Family(LSTM, SEQUENCE, "LSTM over 6 steps, unrolled scan"),
    "mixer": Family(Mixer, IMAGE, "token and channel mixing, layer norm, gelu"),
    "mlp (nnx)": Family(NnxMLP, IMAGE, "as mlp"),
    "resnet (nnx)": Family(NnxResNet, IMAGE, "conv, batch norm, one residual add"),
    "vit (nnx)": Family(NnxViT, IMAGE, "as vit"),
}

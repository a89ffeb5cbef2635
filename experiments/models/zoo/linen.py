"""Modules of Flax Linen, whose variables are kept beside them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.zoo.registry import ZooModel, inputs, model, until


@model
def linen_cnn() -> ZooModel:
    """Batch normalisation and dropout behind one `train` argument, which has no default."""

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Conv(4, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
            return nn.Dense(3)(x)

    x = inputs(4, 4, 1)
    variables = jax.jit(functools.partial(CNN().init, train=False))(jax.random.key(0), x)
    return ZooModel(
        functools.partial(CNN().apply, variables, train=False),
        lambda x, _: CNN().apply(variables, x, train=False),
        x,
    )


@model
def linen_resnet() -> ZooModel:
    """Two residual blocks of an ImageNet ResNet, the second with a projection."""

    class Block(nn.Module):
        features: int
        strides: int
        train: bool

        @nn.compact
        def __call__(self, x):
            norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
            conv = functools.partial(nn.Conv, use_bias=False)
            y = nn.relu(norm()(conv(self.features, (3, 3), strides=self.strides)(x)))
            y = norm()(conv(self.features, (3, 3))(y))
            if y.shape != x.shape:
                x = norm()(conv(self.features, (1, 1), strides=self.strides)(x))
            return nn.relu(x + y)

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = True):
            x = Block(3, 1, train)(x)
            x = Block(6, 2, train)(x)
            return nn.Dense(3)(x.mean(axis=(1, 2)))

    x = inputs(6, 6, 3)
    variables = jax.jit(functools.partial(ResNet().init, train=False))(jax.random.key(0), x)
    return ZooModel(
        (ResNet(), variables),
        lambda x, _: ResNet().apply(variables, x, train=False),
        x,
        {"call": {"train": False}},
        eps=2e-3,
    )


@model
def linen_vit() -> ZooModel:
    """A block of a vision transformer, told by a keyword that it does not train."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic: bool):
            x = nn.Dense(4)(x)
            y = nn.LayerNorm(use_fast_variance=False)(x)
            y = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1)(
                y, deterministic=deterministic
            )
            x = x + nn.Dropout(0.1)(y, deterministic=deterministic)
            y = nn.LayerNorm(use_fast_variance=False)(x)
            x = x + nn.Dense(4)(nn.gelu(nn.Dense(8)(y)))
            return nn.Dense(3)(x.mean(axis=1))

    x = inputs(3, 4)
    init = functools.partial(Block().init, deterministic=True)
    variables = jax.jit(init)(jax.random.key(0), x)
    return ZooModel(
        (Block(), variables),
        lambda x, _: Block().apply(variables, x, deterministic=True),
        x,
        {"call": {"deterministic": True}},
        eps=1e-3,
    )


@model
def linen_tagger() -> ZooModel:
    """A class for every token of padded sequences: masked attention, `[B, T, C]`."""

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, x, exists):
            mask = nn.make_attention_mask(exists, exists)
            x = x + nn.MultiHeadDotProductAttention(num_heads=1)(x, mask=mask)
            return nn.Dense(3)(nn.tanh(nn.Dense(6)(x)))

    x, exists = inputs(4, 3), until([4, 2, 3], 4)
    variables = jax.jit(Tagger().init)(jax.random.key(0), x, exists)
    return ZooModel(
        (Tagger(), variables), jax.jit(functools.partial(Tagger().apply, variables)), x,
        {"constants": exists},
    )  # fmt: skip


@model
def linen_lstm() -> ZooModel:
    """An LSTM over sequences of different lengths, whose last carry is classified."""

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, lengths):
            carry, _ = nn.RNN(nn.LSTMCell(4), return_carry=True)(x, seq_lengths=lengths)
            return nn.Dense(3)(carry[1])

    x, lengths = inputs(4, 3), np.array([4, 1, 3], np.int32)
    variables = jax.jit(Classifier().init)(jax.random.key(0), x, lengths)
    return ZooModel(
        (Classifier(), variables), jax.jit(functools.partial(Classifier().apply, variables)), x,
        {"constants": lengths},
    )  # fmt: skip


@model
def linen_unet() -> ZooModel:
    """A class for every pixel: down, up by a transposed convolution, and a skip, `[B, H, W, C]`."""

    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            skip = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.relu(nn.Conv(6, (3, 3))(nn.max_pool(skip, (2, 2), strides=(2, 2))))
            x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
            return nn.Conv(3, (1, 1))(jnp.concatenate([x, skip], axis=-1))

    x = inputs(4, 4, 2)
    variables = jax.jit(UNet().init)(jax.random.key(0), x)
    return ZooModel(UNet().bind(variables), lambda x, _: UNet().apply(variables, x), x, eps=5e-3)


@model
def linen_mixer() -> ZooModel:
    """A block of an MLP-Mixer: dense layers over patches, then over channels."""

    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2, 2), strides=(2, 2))(x).reshape(len(x), -1, 4)
            y = nn.LayerNorm(use_fast_variance=False)(x).swapaxes(1, 2)
            x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(y))).swapaxes(1, 2)
            y = nn.LayerNorm(use_fast_variance=False)(x)
            x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(y)))
            return nn.Dense(3)(x.mean(axis=1))

    x = inputs(4, 4, 2)
    variables = jax.jit(Mixer().init)(jax.random.key(0), x)
    return ZooModel((Mixer(), variables), lambda x, _: Mixer().apply(variables, x), x, eps=1e-3)


@model
def linen_ensemble() -> ZooModel:
    """The mean probability of three networks under `nn.vmap`, with normalised weights."""

    class Member(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.elu(nn.WeightNorm(nn.Dense(6))(x))
            return nn.softmax(nn.SpectralNorm(nn.Dense(3))(x, update_stats=False))

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                Member,
                in_axes=None,  # pyright: ignore[reportArgumentType]  # Flax's hint forgets None
                axis_size=3,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
            )
            return members()(x).mean(axis=0)

    x = inputs(5)
    variables = jax.jit(Ensemble().init)(jax.random.key(0), x)
    return ZooModel((Ensemble(), variables), lambda x, _: Ensemble().apply(variables, x), x)


@model
def actor_critic() -> ZooModel:
    """Logits of actions and a value."""

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            return nn.Dense(3)(x), nn.Dense(1)(x)[:, 0]

    x = inputs(5)
    module = ActorCritic()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    return ZooModel(
        module.bind(variables),
        lambda x, _: module.apply(variables, x)[0],
        x,
        {"output": lambda y: y[0]},
    )


@model
def dueling_dqn() -> ZooModel:
    """Values of actions from normalised and clipped observations, as a value and advantages."""

    class QNetwork(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("statistics", "mean", lambda: jnp.full(5, 0.5))
            variance = self.variable("statistics", "variance", lambda: jnp.full(5, 0.09))
            x = jnp.clip((x - mean.value) / jnp.sqrt(variance.value + 1e-8), -1.5, 1.5)
            x = nn.relu(nn.Dense(8)(x))
            advantages, value = nn.Dense(3)(x), nn.Dense(1)(x)
            return value + advantages - advantages.mean(axis=-1, keepdims=True)

    x = inputs(5)
    variables = jax.jit(QNetwork().init)(jax.random.key(0), x)
    return ZooModel((QNetwork(), variables), lambda x, _: QNetwork().apply(variables, x), x)

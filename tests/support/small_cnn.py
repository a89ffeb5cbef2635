"""A small Linen network that classifies small images, which several tests certify."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 4
EXAMPLES = 6


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(3, (2, 2), strides=2)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(8)(x)))


def images_of():
    """A batch `[B, 4, 4, 1]`."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(EXAMPLES, 4, 4, 1)), jnp.float32)


def variables_of(images):
    return jax.jit(LinenNet().init)(jax.random.key(1), images)


def model_of(variables):
    return functools.partial(LinenNet().apply, variables)

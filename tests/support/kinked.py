"""Every op with kinks, as a function of five numbers."""

import jax
from jax import numpy as jnp

CUTS = jnp.asarray([-0.3, 0.1, 0.4, -0.1, 0.2])
KINKED = {
    "relu": jax.nn.relu,
    "leaky relu": lambda x: jax.nn.leaky_relu(x, 0.2),
    "hinge": lambda x: jnp.where(x > 0, 0.5 * x, -0.2 * x),
    "abs": jnp.abs,
    "max": lambda x: jnp.maximum(x, CUTS),
    "min": lambda x: jnp.minimum(x, CUTS),
    "relu6": lambda x: jax.nn.relu6(3.0 * x + 3.0),
    "hard tanh": lambda x: jax.nn.hard_tanh(2.0 * x),
    "clip": lambda x: jnp.clip(x, -0.2, CUTS + 0.4),
    "clamp": lambda x: jax.lax.clamp(jnp.float32(-0.2), x, jnp.float32(0.3)),
    "relu and tanh": lambda x: jax.nn.relu(x) + jnp.tanh(x),
}

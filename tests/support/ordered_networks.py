"""Networks over orders, spans, counts, indices, interpolation, perturbed kernels and solves."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from network import Network, affine, dense, normal


def _ordered_draw(rng):
    return {"first": dense(rng, 3, 3), "head": dense(rng, 3, 2), "heights": rng.normal(size=3)}


def _ordered(weights, x):
    """A sorted pair, spans and a product over an axis, an interpolated function."""
    y = affine(weights["first"], x)
    pair = jnp.sort(y[:2])
    spans = lax.cummax(y) - lax.cummin(y, reverse=True)
    curve = jnp.interp(y, jnp.array([-1.0, 0.1, 0.8], y.dtype), weights["heights"])
    return affine(weights["head"], curve - 0.1 * spans) + 0.3 * pair + jnp.prod(y)


def _counted_draw(rng):
    return {"first": dense(rng, 4, 4), "table": rng.normal(size=(5, 2)), "own": normal(rng, 4, 4)}


def _counted(weights, x):
    """Casts, counts, reads at an index, and an order of other values."""
    y = affine(weights["first"], x)
    y = jnp.where(jnp.isnan(y), 0.0, y)
    knots = jnp.array([-1.0, 0.1, 0.8], y.dtype)
    levels = jnp.clip((2.0 * y).astype(jnp.int32) + 2, 0, 4)
    rows = weights["table"][levels]
    count = (y > 0.1).sum().astype(x.dtype) + jnp.interp(y[0], knots, knots[::-1], right=0.5)
    order = jnp.argsort(y).astype(x.dtype) - y[jnp.argmax(y)]
    return jnp.stack([rows[0, 0] + count, (order @ rows)[1]]) + (weights["own"] @ x)[:2]


def _kernels_draw(rng):
    return {
        "kernel": normal(rng, 3, 3),
        "image": rng.normal(size=(1, 1, 5)),
        "matrix": _matrix(rng),
    }


def _matrix(rng):
    return normal(rng, 4, 4) + 3.0 * np.eye(4)


def _kernels(weights, x):
    """Convolutions with a perturbed kernel and image, and a linear system."""
    kernel = x.reshape(1, 1, 4)
    fixed = lax.conv_general_dilated(weights["image"], kernel, (1,), "SAME").ravel()
    solved = jnp.linalg.solve(weights["matrix"], fixed[:4])
    image = jax.nn.relu(fixed).reshape(1, 1, 5)
    both = lax.conv_general_dilated(image, kernel, (2,), ((1, 0),)).ravel()
    return jnp.concatenate([solved, 0.3 * both])


NETWORKS: tuple[Network, ...] = (
    Network("ordered", (3,), _ordered_draw, _ordered),
    Network("counted", (4,), _counted_draw, _counted),
    Network("kernels", (4,), _kernels_draw, _kernels),
)

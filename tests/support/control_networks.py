"""Networks over loops, branches, gathers and scatters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from network import Network, affine, dense, normal


def _sequence_model(dtype):
    return nn.RNN(nn.OptimizedLSTMCell(2, param_dtype=dtype))


def _lstm_draw(rng):
    sequence = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
    shapes = jax.eval_shape(_sequence_model(jnp.float32).init, jax.random.key(0), sequence)
    cell = jax.tree.map(lambda leaf: 0.7 * rng.normal(size=leaf.shape), shapes)
    return {"cell": cell, "head": dense(rng, 2, 2)}


def _lstm(weights, x):
    states = _sequence_model(x.dtype).apply(weights["cell"], x[None])[0]
    return affine(weights["head"], states[-1])


def _loops_draw(rng):
    return {"mix": normal(rng, 2, 2), "shift": rng.normal(size=(3, 2)), "slow": rng.normal(size=2)}


def _loops(weights, x):
    """Loops that are written out, backwards too, and one that is too long for that."""

    def step(carry, inputs):
        count, state = carry
        value, shift = inputs
        state = jax.nn.relu(state @ weights["mix"] + value - shift)
        return (count + 1, state), state / (count + 1).astype(x.dtype)

    (count, last), states = lax.scan(
        step, (jnp.int32(0), x[0]), (x, weights["shift"]), reverse=True
    )
    state = lax.fori_loop(0, 2, lambda k, v: jnp.maximum(v, x[k + 1]) - 0.5 * x[0], last)

    def long_step(state, k):
        state = jnp.tanh(weights["slow"] * state + 0.01 * k.astype(x.dtype) * x[1])
        return state, state.sum()

    end, sums = lax.scan(long_step, 0.1 * state, jnp.arange(130))
    return jnp.concatenate([states.sum(0) / count.astype(x.dtype), end, sums[-1:] + state[:1]])


def _branches_draw(rng):
    return {"slopes": rng.normal(size=3), "switch": rng.uniform(0, 3), "layer": dense(rng, 3, 3)}


def _branches(weights, x):
    """Branches on weights, which are known only when compiled code runs; hinges."""
    x = affine(weights["layer"], x)
    x = lax.cond(weights["switch"] > 1.5, jax.nn.relu, lambda v: -v[::-1], x)
    branches = [lambda v: v + 1.0, lambda v: jnp.abs(v), lambda v: jnp.minimum(v, 0.3)]
    x = lax.switch(weights["switch"].astype(jnp.int32), branches, x)
    x = jnp.where(x >= 0, x, weights["slopes"] * x)
    return jnp.where(x < 0, -0.2 * x, 2.0 * x) + affine(weights["layer"], x)


def _indexing_draw(rng):
    return {"rows": rng.normal(size=(2, 3)), "head": normal(rng, 3, 2)}


def _indexing(weights, x):
    """Gathers and scatters at constant places, repeated and out of range ones too."""
    rows = weights["rows"]
    places = np.array([2, 0, 2])
    x = x[places] - jnp.take(x, np.array([1, 1, 0]), axis=1)
    x = jax.nn.relu(x.at[np.array([0, 3])].set(0.5 * x[1:]) + x.at[1].set(rows[0]))
    x = x.at[places[:2]].add(rows - x[:2]).at[places].add(x)
    x = x.at[np.array([0, 0])].subtract(x[1:]).at[np.array([1, 2])].multiply(rows)
    fixed = jnp.zeros((4, 3), x.dtype).at[np.array([3, 1, 0])].set(x[::-1])
    return lax.dynamic_slice(fixed, (1, 0), (3, 3)) @ weights["head"]


NETWORKS: tuple[Network, ...] = (
    Network("lstm", (2, 2), _lstm_draw, _lstm),
    Network("loops", (3, 2), _loops_draw, _loops),
    Network("branches", (3,), _branches_draw, _branches),
    Network("indexing", (3, 3), _indexing_draw, _indexing),
)

"""Plain functions and callable pytrees: what is not a module of Flax."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.zoo.registry import EXAMPLES, ZooModel, inputs, model, until, weights


@model
def haiku() -> ZooModel:
    """`transformed.apply(params, rng, x)`, with the random key that it does not need."""
    params = {
        "linear": {"w": weights(5, 8), "b": weights(8, seed=1)},
        "linear_1": {"w": weights(8, 3, seed=2), "b": weights(3, seed=3)},
    }

    def apply(params, rng, x):
        del rng
        x = jax.nn.relu(x @ params["linear"]["w"] + params["linear"]["b"][None])
        return x @ params["linear_1"]["w"] + params["linear_1"]["b"][None]

    return ZooModel(
        functools.partial(apply, params, None), lambda x, _: apply(params, None, x), inputs(5)
    )


@jax.tree_util.register_pytree_node_class
class Tree:
    """A module that is a pytree: its function is a leaf, too, as are those of Equinox."""

    def __init__(self, kernel, bias, scale, activation, inner=None):
        self.parts = (kernel, bias, scale, activation, inner)

    def __call__(self, x, *, key=None):
        """Classifies one example `[F]`; a key is for layers that draw."""
        del key
        kernel, bias, scale, activation, inner = self.parts
        x = activation(scale * (x @ kernel) + bias)
        return x if inner is None else inner(x)

    def tree_flatten(self):
        """Its arrays and its functions."""
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        """A module of other parts."""
        return cls(*parts)


def tree_module(seed: int = 0) -> Tree:
    """A module of one example with random weights."""
    last = Tree(weights(8, 3, seed=seed), weights(3, seed=seed + 1), np.float32(1.5), jnp.tanh)
    return Tree(weights(5, 8, seed=seed + 2), weights(8, seed=seed + 3), 1.0, jax.nn.relu, last)


@jax.tree_util.register_pytree_node_class
class Batched:
    """A pytree that maps another over a batch."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        """Classifies a batch."""
        return jax.vmap(self.inner)(x)

    def tree_flatten(self):
        """Its arrays and its functions."""
        return (self.inner,), None

    @classmethod
    def tree_unflatten(cls, _, parts):
        """A module of other parts."""
        return cls(*parts)


@model
def tree() -> ZooModel:
    """A callable pytree, as Equinox has them."""
    module = Batched(tree_module())
    return ZooModel(module, lambda x, _: module(x), inputs(5))


@model
def graph_net() -> ZooModel:
    """Messages between the nodes of graphs of different sizes, and a mean over those that exist."""
    kernels = [weights(2, 6), weights(6, 3, seed=1)]

    def apply(x, graph):
        mask = graph["mask"][..., None].astype(x.dtype)  # [B, N, 1]
        for kernel in kernels:
            x = jax.nn.relu(jnp.einsum("bij,bjf->bif", graph["edges"], x) @ kernel + x @ kernel)
        count = jnp.sum(mask, axis=1)
        return jnp.sum(x * mask, axis=1) / count

    rng, mask = np.random.default_rng(0), until([4, 2, 3], 4)
    edges = (rng.uniform(size=(EXAMPLES, 4, 4)) < 0.5) & mask[:, None] & mask[:, :, None]
    constants = {"mask": mask, "edges": edges.astype(np.float32)}
    return ZooModel(apply, apply, inputs(4, 2), {"constants": constants})


@model
def pinn() -> ZooModel:
    """A coordinate network as physics-informed ones are: sines, then tanh, closed over weights."""
    parts = [weights(2, 8), weights(8, 8, seed=1), weights(8, 3, seed=2)]

    @jax.jit
    def apply(x):
        x = jnp.sin(np.float32(3.0) * (x @ parts[0]))
        return jnp.tanh(x @ parts[1]) @ parts[2]

    return ZooModel(apply, lambda x, _: apply(x), inputs(2))


@model
def neural_ode() -> ZooModel:
    """Features moved along a vector field by a Runge-Kutta scheme of four steps."""
    first, second, last = weights(4, 6), weights(6, 4, seed=1), weights(4, 3, seed=2)

    def field(x):
        return jnp.tanh(x @ first) @ second

    def step(x, dt):
        k1 = field(x)
        k2 = field(x + dt / 2 * k1)
        k3 = field(x + dt / 2 * k2)
        k4 = field(x + dt * k3)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def apply(x):
        return jax.lax.scan(step, x, jnp.full(4, 0.25))[0] @ last

    return ZooModel(apply, lambda x, _: apply(x), inputs(4))


@model
def point_net() -> ZooModel:
    """The largest features of sets of points of different sizes, whatever their order."""
    kernels = [weights(3, 8), weights(8, 6, seed=1), weights(6, 3, seed=2)]

    def apply(x, exists):
        x = jax.nn.relu(x @ kernels[0])
        x = jnp.where(exists[..., None], x @ kernels[1], jnp.finfo(x.dtype).min)
        return x.max(axis=1) @ kernels[2]

    return ZooModel(apply, apply, inputs(5, 3), {"constants": until([5, 1, 3], 5)})


class Categorical(NamedTuple):
    """A distribution over actions, as a policy returns it."""

    logits: jax.Array

    @property
    def probabilities(self) -> jax.Array:
        """`[B, C]`."""
        return jax.nn.softmax(self.logits)


@model
def policy() -> ZooModel:
    """A distribution over actions, of which some are forbidden in each state."""
    first, last = weights(5, 8), weights(8, 3, seed=1)
    allowed = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1]], bool)

    def apply(x, allowed):
        logits = jax.nn.silu(x @ first) @ last
        return Categorical(jax.nn.log_softmax(jnp.where(allowed, logits, -1e6)))

    return ZooModel(
        apply,
        lambda x, allowed: apply(x, allowed).probabilities,
        inputs(5),
        {"constants": allowed, "output": lambda action: action.probabilities},
    )

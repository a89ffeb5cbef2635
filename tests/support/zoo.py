"""Classifiers as the ecosystem's own examples write them, each as its users would hand it over.

A new kind of model is one more function with `@model`; `tests/boundjax/test_zoo.py` certifies every
one of them and attacks what it certifies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Animal:
    """A model, how `certify` is asked about it, and what it computes.

    Attributes:
      model: what is given to `certify`.
      logits: `(x, constants) -> [B, C]`, written without this library.
      x: `[B, ...]`.
      options: arguments of `certify` that describe the model.
      eps: a radius at which intervals say something.
    """

    model: Any
    logits: Callable[[jax.Array, Any], jax.Array]
    x: np.ndarray
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    eps: float = 0.01


ZOO: dict[str, Callable[[], Animal]] = {}


def model(make: Callable[[], Animal]) -> Callable[[], Animal]:
    """Adds a model to the zoo; it is made only once."""
    ZOO[make.__name__] = functools.cache(make)
    return ZOO[make.__name__]


def inputs(*shape: int, seed: int = 0) -> np.ndarray:
    """A batch of inputs in [0, 1]."""
    return np.random.default_rng(seed).uniform(size=(EXAMPLES, *shape)).astype(np.float32)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Random weights that keep the size of what they multiply."""
    fan_in = shape[0] if len(shape) > 1 else 10
    return (np.random.default_rng(seed).normal(size=shape) / fan_in**0.5).astype(np.float32)


def traced_together(module: nnx.Module) -> Callable[[jax.Array, Any], jax.Array]:
    """An NNX module that traces its state and its input together, as `nnx.jit` does."""
    graphdef, state = nnx.split(module)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))
    return lambda x, _: run(state, x)


@model
def linen_cnn() -> Animal:
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
    return Animal(
        functools.partial(CNN().apply, variables, train=False),
        lambda x, _: CNN().apply(variables, x, train=False),
        x,
    )


@model
def linen_vit() -> Animal:
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
    return Animal(
        (Block(), variables),
        lambda x, _: Block().apply(variables, x, deterministic=True),
        x,
        {"call": {"deterministic": True}},
        eps=1e-3,
    )


@model
def nnx_mlp() -> Animal:
    """Dropout that holds its own random keys, in train mode as a training loop leaves it."""

    class MLP(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(5, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    module = MLP(nnx.Rngs(0))
    still = nnx.clone(module)
    still.eval()
    module.train()
    return Animal(module, lambda x, _: still(x), inputs(5))


@model
def nnx_scan() -> Animal:
    """Layers stacked by `nnx.vmap` and run by `nnx.scan`."""

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def layer(rngs: nnx.Rngs):
                return nnx.Linear(5, 5, rngs=rngs)

            self.layers, self.last = layer(rngs), nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return nnx.relu(layer(x))

            return self.last(forward(x, self.layers))

    module = Stack(nnx.Rngs(0))
    return Animal(module, traced_together(module), inputs(5))


@model
def nnx_rnn() -> Animal:
    """A recurrent network, whose cell draws its first carry."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(3, 4, rngs=rngs))
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x)[:, -1])

    module = Net(nnx.Rngs(0))
    return Animal(module, traced_together(module), inputs(3, 3))


@model
def haiku() -> Animal:
    """`transformed.apply(params, rng, x)`, with the random key that it does not need."""
    params = {
        "linear": {"w": weights(5, 8), "b": weights(8, seed=1)},
        "linear_1": {"w": weights(8, 3, seed=2), "b": weights(3, seed=3)},
    }

    def apply(params, rng, x):
        del rng
        x = jax.nn.relu(x @ params["linear"]["w"] + params["linear"]["b"][None])
        return x @ params["linear_1"]["w"] + params["linear_1"]["b"][None]

    return Animal(
        functools.partial(apply, params, None), lambda x, _: apply(params, None, x), inputs(5)
    )


@jax.tree_util.register_pytree_node_class
class Tree:
    """A module that is a pytree: its function is a leaf, too, as are those of Equinox."""

    def __init__(self, kernel, bias, scale, activation, inner=None):
        self.parts = (kernel, bias, scale, activation, inner)

    def __call__(self, x, *, key=None):
        del key
        kernel, bias, scale, activation, inner = self.parts
        x = activation(scale * (x @ kernel) + bias)
        return x if inner is None else inner(x)

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
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
        return jax.vmap(self.inner)(x)

    def tree_flatten(self):
        return (self.inner,), None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


@model
def tree() -> Animal:
    """A callable pytree, as Equinox has them."""
    module = Batched(tree_module())
    return Animal(module, lambda x, _: module(x), inputs(5))


@model
def actor_critic() -> Animal:
    """Logits of actions and a value."""

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            return nn.Dense(3)(x), nn.Dense(1)(x)[:, 0]

    x = inputs(5)
    module = ActorCritic()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    return Animal(
        module.bind(variables),
        lambda x, _: module.apply(variables, x)[0],
        x,
        {"output": lambda y: y[0]},
    )


@model
def graph_net() -> Animal:
    """Messages between the nodes of graphs of different sizes, and a mean over those that exist."""
    kernels = [weights(2, 6), weights(6, 3, seed=1)]

    def apply(x, graph):
        mask = graph["mask"][..., None].astype(x.dtype)  # [B, N, 1]
        for kernel in kernels:
            x = jax.nn.relu(jnp.einsum("bij,bjf->bif", graph["edges"], x) @ kernel + x @ kernel)
        count = jnp.sum(mask, axis=1)
        return jnp.sum(x * mask, axis=1) / count

    rng = np.random.default_rng(0)
    sizes = np.array([4, 2, 3])
    mask = np.arange(4)[None] < sizes[:, None]
    edges = (rng.uniform(size=(EXAMPLES, 4, 4)) < 0.5) & mask[:, None] & mask[:, :, None]
    constants = {"mask": mask, "edges": edges.astype(np.float32)}
    return Animal(apply, apply, inputs(4, 2), {"constants": constants})


@model
def pinn() -> Animal:
    """A coordinate network as physics-informed ones are: sines, then tanh, closed over weights."""
    parts = [weights(2, 8), weights(8, 8, seed=1), weights(8, 3, seed=2)]

    @jax.jit
    def apply(x):
        x = jnp.sin(np.float32(3.0) * (x @ parts[0]))
        return jnp.tanh(x @ parts[1]) @ parts[2]

    return Animal(apply, lambda x, _: apply(x), inputs(2))

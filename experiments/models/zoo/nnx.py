"""Modules of Flax NNX, which hold their own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.models.zoo.registry import ZooModel, inputs, model


def traced_together(module: nnx.Module) -> Callable[[jax.Array, Any], jax.Array]:
    """An NNX module that traces its state and its input together, as `nnx.jit` does."""
    graphdef, state = nnx.split(module)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))
    return lambda x, _: run(state, x)


def evaluated(module: nnx.Module) -> Callable[[jax.Array, Any], jax.Array]:
    """A copy of a module in eval mode; the module itself is left in train mode."""
    still = nnx.clone(module)
    still.eval()
    module.train()
    return lambda x, _: still(x)


@model
def nnx_mlp() -> ZooModel:
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
    return ZooModel(module, evaluated(module), inputs(5))


@model
def nnx_cnn() -> ZooModel:
    """The convolutional network of Flax's own MNIST example, with group normalisation."""

    class CNN(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.norm = nnx.GroupNorm(4, num_groups=2, use_fast_variance=False, rngs=rngs)
            self.second = nnx.Conv(4, 6, (3, 3), rngs=rngs)
            self.dropout = nnx.Dropout(0.25, rngs=rngs)
            self.last = nnx.Linear(24, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.avg_pool(nnx.relu(self.norm(self.first(x))), (2, 2), strides=(2, 2))
            x = nnx.max_pool(nnx.swish(self.second(x)), (2, 2), strides=(2, 2))
            return self.last(self.dropout(x.reshape(len(x), -1)))

    module = CNN(nnx.Rngs(0))
    return ZooModel(module, evaluated(module), inputs(8, 8, 1), eps=1e-3)


@model
def nnx_scan() -> ZooModel:
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
    return ZooModel(module, traced_together(module), inputs(5))


@model
def nnx_rnn() -> ZooModel:
    """A recurrent network, whose cell draws its first carry."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(3, 4, rngs=rngs))
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            states: Any = self.rnn(x)
            return self.head(states[:, -1])

    module = Net(nnx.Rngs(0))
    return ZooModel(module, traced_together(module), inputs(3, 3))

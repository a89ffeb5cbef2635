"""A small network for the tests: a function of one example and of random weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Weights = Any


@dataclasses.dataclass(frozen=True)
class Network:
    """`apply(weights, x)` maps one example `[*input_shape]` to a pytree of arrays.

    `sequential`: every value is used once, so that interval bounds and constant lines agree.
    `methods`: names of the methods it is bounded with, None for all of them.
    """

    name: str
    input_shape: tuple[int, ...]
    draw: Callable[[np.random.Generator], Weights]
    apply: Callable[[Weights, jax.Array], Any]
    sequential: bool = False
    methods: tuple[str, ...] | None = None

    def weights(self, seed: int, dtype: Any = np.float32) -> Weights:
        """Random weights of one dtype, the same for the same seed in every precision."""
        drawn = self.draw(np.random.default_rng(seed))
        return jax.tree.map(lambda w: jnp.asarray(np.asarray(w), dtype), drawn)

    def flat(self, weights: Weights, x: jax.Array) -> jax.Array:
        """The outputs as one vector `[m]`."""
        return jnp.concatenate(
            [jnp.ravel(leaf) for leaf in jax.tree.leaves(self.apply(weights, x))]
        )


def normal(rng: np.random.Generator, *shape: int, fan_in: int | None = None) -> np.ndarray:
    return rng.normal(size=shape) / np.sqrt(fan_in or shape[0])


def dense(rng: np.random.Generator, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {"kernel": normal(rng, inputs, outputs), "bias": 0.3 * rng.normal(size=outputs)}


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]

"""The zoo's table, and what its models are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A model, how `certify` is asked about it, and what it computes.

    Attributes:
      model: what is given to `certify`.
      logits: `(x, constants) -> [B, ..., C]`, written without this library.
      x: `[B, ...]`.
      options: arguments of `certify` that describe the model.
      eps: a radius at which intervals say something.
    """

    model: Any
    logits: Callable[[jax.Array, Any], Any]
    x: np.ndarray
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    eps: float = 0.01


ZOO: dict[str, Callable[[], ZooModel]] = {}


def model(make: Callable[[], ZooModel]) -> Callable[[], ZooModel]:
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


def until(lengths: list[int], size: int) -> np.ndarray:
    """Which of `size` positions exist, for sequences of these lengths: bool `[B, size]`."""
    return np.arange(size)[None] < np.asarray(lengths)[:, None]

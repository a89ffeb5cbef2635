"""A network on all local devices: its clean pass, and the attack on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from boundjax.attacks import pgd
from experiments.config import EvaluationConfig
from experiments.data import Images


class Problem(NamedTuple):
    """What is evaluated: an eval-mode `model` on all of `data` in balls of radius `eps`."""

    model: nn.Module
    variables: Any
    data: Images
    eps: float
    norm: float
    clip: tuple[float, float] | None


class Network:
    """The network on all local devices, which divide every batch.

    Compiled once: the variables and the images are arguments, all batches have one shape. What
    counts is computed as bounds are: with the shorter factors that accelerators take by default, an
    example might look misclassified that is verified. The attack may take them on its way.
    """

    def __init__(self, problem: Problem, config: EvaluationConfig):
        """Computes and compiles nothing yet."""
        self._problem, self._config = problem, config
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))
        self._variables = jax.device_put(problem.variables, NamedSharding(mesh, PartitionSpec()))
        self.size = min(config.batch_size, len(problem.data))
        self._filled = -(-self.size // len(devices)) * len(devices)

    def correct(self, data: Images) -> np.ndarray:
        """The clean pass: which images are classified correctly, bool `[N]`."""
        flags = np.zeros(len(data), bool)
        for start in range(0, len(data), self.size):
            rows = np.arange(start, min(start + self.size, len(data)))
            images, labels = data.take(np.resize(rows, self._filled))
            logits = self._predict(self._variables, jax.device_put(images, self._sharded))
            flags[rows] = _strictly_correct(logits, labels)[: len(rows)]
        return flags

    def resisted(self, batch: Images, losses: tuple[str, ...], key: jax.Array) -> list[np.ndarray]:
        """Which images of at most a batch are correct at the strongest point, for every loss."""
        images, labels = batch.take(np.resize(np.arange(len(batch)), self._filled))
        images, labels_there = jax.device_put((images, labels), self._sharded)
        points = self._attack(losses, self._variables, images, labels_there, key)
        return [
            _strictly_correct(self._predict(self._variables, point), labels)[: len(batch)]
            for point in points
        ]

    @functools.cached_property
    def _predict(self) -> Callable[..., jax.Array]:
        @jax.jit
        @jax.default_matmul_precision("highest")
        def predict(variables, images):
            return self._problem.model.apply(variables, images)

        return predict

    @functools.cached_property
    def _attack(self) -> Callable[..., list[jax.Array]]:
        problem, config = self._problem, self._config

        @functools.partial(jax.jit, static_argnums=0)
        @jax.default_matmul_precision("high")
        def attack(losses, variables, images, labels, key):
            return [
                pgd(
                    lambda x: problem.model.apply(variables, x),
                    images,
                    labels,
                    problem.eps,
                    key=key,
                    norm=problem.norm,
                    clip=problem.clip,
                    steps=config.pgd_steps,
                    restarts=config.pgd_restarts,
                    loss=loss,
                )
                for loss in losses
            ]

        return attack


def _strictly_correct(logits: jax.Array, labels: np.ndarray) -> np.ndarray:
    """The true logit exceeds every other; a tie or a NaN is an error, as for a certificate."""
    logits = np.asarray(logits)
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    others = np.arange(logits.shape[-1])[None] != labels[:, None]
    return np.all((own > logits) | ~others, axis=-1)

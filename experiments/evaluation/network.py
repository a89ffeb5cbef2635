"""A network on all local devices: its clean pass, and the attack on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import boundjax as bj
from boundjax.attacks import Descent
from experiments.data import Images
from experiments.settings.config import EvaluationConfig


class Problem(NamedTuple):
    """What is evaluated: a model in eval mode, on all of `data`, against a threat."""

    model: bj.PureModel
    data: Images
    threat: bj.Threat

    @property
    def num_classes(self) -> int:
        """How many logits the model has."""
        model, images = self.model, self.data.images[:1]
        return jax.eval_shape(model.apply, model.variables, images).shape[-1]


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
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._variables = jax.device_put(problem.model.variables, everywhere)
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
        points = (self._strongest(loss, images, labels_there, key) for loss in losses)
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

    def _strongest(
        self, loss: str, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The points of the attack on a loss: `boundjax.attacks.pgd`, its loops in Python."""

        def part(name: str, *arguments: Any) -> Any:
            return self._part(name, loss, self._variables, images, labels, arguments)

        best = part("nothing")
        for restart in range(self._config.pgd_restarts):
            iterate = part("start", key, restart)
            for _ in range(self._config.pgd_steps):
                iterate, best = part("step", iterate, best)
            best = part("end", iterate, best)
        return best.iterate

    @functools.cached_property
    def _part(self) -> Callable[..., Any]:
        problem = self._problem

        @functools.partial(jax.jit, static_argnums=(0, 1))
        @jax.default_matmul_precision("high")
        def part(name, loss, variables, images, labels, arguments):
            descent = Descent(
                lambda x: problem.model.apply(variables, x),
                images,
                labels,
                problem.threat,
                loss=loss,
            )
            return getattr(descent, name)(*arguments)

        return part


def _strictly_correct(logits: jax.Array, labels: np.ndarray) -> np.ndarray:
    """The true logit exceeds every other; a tie or a NaN is an error, as for a certificate."""
    logits = np.asarray(logits)
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    others = np.arange(logits.shape[-1])[None] != labels[:, None]
    return np.all((own > logits) | ~others, axis=-1)

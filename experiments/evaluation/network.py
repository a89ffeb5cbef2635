"""A network on all local devices: its clean pass and its attack."""

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
from experiments.evaluation.attack_points import moved_inside
from experiments.settings.config import EvaluationConfig


class Problem(NamedTuple):
    """A model in eval mode, to be evaluated on all of `data` against a threat."""

    model: bj.PureModel
    data: Images
    threat: bj.Threat

    @property
    def num_classes(self) -> int:
        """The number of the model's logits."""
        model, images = self.model, self.data.images[:1]
        return jax.eval_shape(model.apply, model.variables, images).shape[-1]


class Network:
    """The network on all local devices, which divide every batch.

    It compiles once: the variables and the images are arguments, and all batches have one shape.
    Logits that count are computed at the precision of bounds: at the accelerators' lower default, a
    verified example might look misclassified. The attack's own steps may use less.
    """

    def __init__(self, problem: Problem, config: EvaluationConfig):
        """Places the variables on the devices; computes and compiles nothing yet."""
        self._problem, self._config = problem, config
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._variables = jax.device_put(problem.model.variables, replicated)
        self.size = min(config.batch_size, len(problem.data))
        self._padded_size = -(-self.size // len(devices)) * len(devices)

    def correct(self, data: Images) -> np.ndarray:
        """Runs the clean pass and returns which images are classified correctly, bool `[N]`."""
        flags = np.zeros(len(data), bool)
        for start in range(0, len(data), self.size):
            rows = np.arange(start, min(start + self.size, len(data)))
            images, labels = data.take(np.resize(rows, self._padded_size))
            logits = self._predict(self._variables, jax.device_put(images, self._sharded))
            flags[rows] = _strictly_correct(logits, labels)[: len(rows)]
        return flags

    def resisted(
        self, batch: Images, losses: tuple[str, ...], key: jax.Array
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Attacks at most a batch.

        Returns:
          For each loss which images stay correct, bool `[B]`; and for each image a point in its
          set, float32 `[B, ...]`, that is misclassified if the image does not stay correct.
        """
        images, labels = batch.take(np.resize(np.arange(len(batch)), self._padded_size))
        sharded_images, sharded_labels = jax.device_put((images, labels), self._sharded)
        flags, kept = list[np.ndarray](), images.copy()
        for loss in losses:
            strongest = self._strongest(loss, sharded_images, sharded_labels, key)
            points = moved_inside(np.asarray(strongest), images, self._problem.threat)
            logits = self._predict(self._variables, jax.device_put(points, self._sharded))
            resisted = _strictly_correct(logits, labels)
            kept[~resisted] = points[~resisted]
            flags.append(resisted[: len(batch)])
        return flags, kept[: len(batch)]

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
        """Attacks one loss as `boundjax.attacks.pgd` does, with its loops in Python."""

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
    """Tests whether the true logit exceeds all others; a tie or NaN fails, as in a certificate."""
    values = np.asarray(logits)
    true_logits = np.take_along_axis(values, labels[:, None], axis=-1)
    is_label = np.arange(values.shape[-1])[None] == labels[:, None]
    return np.all((true_logits > values) | is_label, axis=-1)

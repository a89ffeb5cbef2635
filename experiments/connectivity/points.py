"""Losses and errors of the networks along a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from boundjax.diagnostics import spread_over_batches
from boundjax.training import margins_of
from experiments import methods
from experiments.connectivity.curve import target
from experiments.data import Images
from experiments.methods.method import PyTree, apply
from experiments.records.connection import LOSSES
from experiments.settings.errors import ContradictionError, ExperimentError
from experiments.train.mesh import BATCH, batch_sharding
from experiments.train.prepare import Prepared

# The training method of each loss.
METHOD_OF: dict[str, str] = dict(zip(LOSSES, ("ibp", "crown-ibp", "one-step"), strict=True))
BATCH_SIZE = 100


class _EvalMode(NamedTuple):
    """A network whose parameters are all of its variables.

    So the objectives of training use the statistics of batch normalisation that they are handed,
    and not those of a batch.
    """

    model: nn.Module

    def apply(self, variables: dict[str, PyTree], images: jax.Array, **options: Any) -> Any:
        return self.model.apply(variables["params"], images, **options)


def batch_size(count: int) -> int:
    """Returns the number of images in a batch: at most `BATCH_SIZE`, and at least two batches."""
    return min(BATCH_SIZE, count // 2)


class Measurement:
    """Measures networks of one architecture on the same images, with the same random slopes.

    The losses are those that the methods of `METHOD_OF` train on at `robust.eps_train`, with
    kappa 0 and beta 1. Verified errors are by the same bounds, computed as in training
    (`rounding="nearest"`).
    """

    def __init__(self, prepared: Prepared, data: Images):
        """Compiles nothing yet.

        Args:
          prepared: the training of the curve, or of any run with this network.
          data: at least two images to measure on.
        """
        self._data, self._size = data, batch_size(len(data))
        self._sharding = batch_sharding(prepared.mesh)
        parts = int(np.prod([prepared.mesh.shape[axis] for axis in BATCH]))
        self._padded_size = -(-self._size // parts) * parts
        self._of_batch = _of_batch(prepared)

    def __call__(self, variables: dict[str, PyTree]) -> dict[str, Any]:
        """Returns errors and, by the name of the loss, its mean, spread and verified error.

        Raises:
          ExperimentError: if a loss is not finite.
          ContradictionError: if an image is verified but misclassified.
        """
        columns: list[dict[str, np.ndarray]] = []
        for start in range(0, len(self._data), self._size):
            rows = np.arange(start, min(start + self._size, len(self._data)))
            batch = self._data.take(np.resize(rows, self._padded_size))
            images, labels = jax.device_put(tuple(batch), self._sharding)
            values = self._of_batch(variables, images, labels)
            columns.append({name: np.asarray(v)[: len(rows)] for name, v in values.items()})
        values = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
        correct = values["correct"]
        verified = np.zeros_like(correct)
        by_loss = {}
        for name in LOSSES:
            by_loss[name] = self._summary(name, values[f"{name} loss"])
            by_loss[name]["verified_error"] = _fraction(~values[f"{name} verified"])
            verified |= values[f"{name} verified"]
        if np.any(verified & ~correct):
            raise ContradictionError(
                f"image {np.flatnonzero(verified & ~correct)[0]} is verified but misclassified: a "
                "bound is wrong; please report this network"
            )
        return {
            "standard_error": _fraction(~correct),
            "verified_error": _fraction(~verified),
            **by_loss,
        }

    def _summary(self, name: str, losses: np.ndarray) -> dict[str, float]:
        losses = losses.astype(np.float64)
        if not np.isfinite(losses).all():
            raise ExperimentError(
                f"the {name} loss must be finite along the path, got "
                f"{losses[~np.isfinite(losses)][0]}; choose runs that are closer to each other"
            )
        count = len(losses) // self._size
        batches = losses[: count * self._size].reshape(count, self._size).mean(axis=1)
        return {"loss": losses.mean().item(), "spread": float(spread_over_batches(batches))}


def _fraction(flags: np.ndarray) -> float:
    return float(np.mean(flags))


def _of_batch(prepared: Prepared) -> Callable[..., dict[str, jax.Array]]:
    """Creates `(variables, images, labels) -> values [B]` by name."""
    config = prepared.config
    at = target(config.robust)
    model = cast("nn.Module", _EvalMode(prepared.model))
    objectives = {}
    for name, method in METHOD_OF.items():
        robust = dataclasses.replace(config.robust, method=method)
        created = methods.create(model, dataclasses.replace(config, robust=robust))
        objectives[name] = created.objectives[int(created.phase(at))]

    @jax.jit
    @jax.default_matmul_precision("highest")
    def of_batch(variables, images, labels):
        margins = margins_of(apply(prepared.model, variables, images), labels)
        values = {"correct": jnp.all(margins > 0, axis=-1)}
        for name, objective in objectives.items():
            batch = methods.Batch(images, labels)
            # The key is the same everywhere: random slopes must not differ along a path.
            _, outcome = objective(variables, {"batch_stats": {}}, batch, at, jax.random.key(0))
            values[f"{name} loss"] = outcome.bounds.robust_loss
            values[f"{name} verified"] = jnp.all(outcome.bounds.verified > 0, axis=-1)
        return values

    return of_batch

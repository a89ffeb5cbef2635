"""Population statistics of batch normalisation ("precise BN")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

BATCH_SIZE = 500


def population_statistics(
    model: nn.Module, variables: dict[str, Any], images: np.ndarray, batch_size: int = BATCH_SIZE
) -> dict[str, Any]:
    """Computes the collection `batch_stats` over all images, instead of a running average.

    Every batch is normalised by its own statistics, as in training; its means and second moments
    are averaged over the batches (Wu & Johnson 2021, "Rethinking Batch in BatchNorm"; CTBench
    evaluates the same way). Images that do not fill the last batch are left out.

    Args:
      model: a Linen module with a field `bn_momentum`.
      variables: the variables of `model`, including `batch_stats`.
      images: the training images `[N, H, W, channels]` without augmentation.
      batch_size: number of images in one pass.
    """
    return statistics_over(model, images, batch_size)(variables)


def statistics_over(
    model: nn.Module, images: np.ndarray, batch_size: int = BATCH_SIZE
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Creates `variables -> population_statistics(model, variables, images)`, compiled once."""
    size = min(batch_size, len(images))

    @jax.jit
    def moments(variables, batch):
        _, updated = model.clone(bn_momentum=0.0).apply(
            variables, batch, train=True, mutable=["batch_stats"]
        )
        # Flax gives leaves the type of any node.
        flat = cast("dict[tuple[str, ...], jax.Array]", flatten_dict(updated["batch_stats"]))
        return {
            path: value + jnp.square(flat[*path[:-1], "mean"]) if path[-1] == "var" else value
            for path, value in flat.items()
        }

    starts = range(0, len(images) - size + 1, size)

    def statistics(variables: dict[str, Any]) -> dict[str, Any]:
        # Use float64 on the host, because the second moment and the square of the mean nearly
        # cancel.
        total: dict[tuple[str, ...], np.ndarray] = {}
        for start in starts:
            for path, value in moments(variables, images[start : start + size]).items():
                total[path] = total.get(path, 0.0) + np.asarray(value, np.float64) / len(starts)
        flat = {
            path: value - total[*path[:-1], "mean"] ** 2 if path[-1] == "var" else value
            for path, value in total.items()
        }
        return unflatten_dict({path: value.astype(np.float32) for path, value in flat.items()})

    return statistics

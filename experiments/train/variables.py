"""The variables of a trained network, and the selection of an epoch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.data import Splits
from experiments.settings.config import Config
from experiments.train.batch_norm import population_statistics
from experiments.train.mesh import on_host, place


def variables_of(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables of the eval-mode model on the host; all processes must call this."""
    variables = {"params": state["params"]}
    if state["batch_stats"]:
        variables["batch_stats"] = state["batch_stats"]
    return on_host(variables)


def deployed(
    config: Config, model: nn.Module, state: dict[str, Any], splits: Splits
) -> dict[str, Any]:
    """Returns the variables to evaluate; `precise_bn` gives them the statistics of all images."""
    variables = variables_of(state)
    if config.evaluation.precise_bn and "batch_stats" in variables:
        statistics = population_statistics(model, variables, splits.train.images)
        variables["batch_stats"] = statistics
    return variables


def nothing_selected(state: dict[str, Any], selecting: bool) -> dict[str, Any]:
    """Returns what stands for a selection before the first, in the same layout."""
    selected = _scores(state, 0, np.inf, np.inf)
    if selecting:
        # Copy, because the loop donates the originals.
        selected["params"] = jax.tree.map(jnp.copy, state["params"])
        selected["batch_stats"] = jax.tree.map(jnp.copy, state["batch_stats"])
    return selected


def select(
    selected: dict[str, Any], state: dict[str, Any], epoch: int, errors: dict[str, float]
) -> dict[str, Any]:
    """Returns the better by verified, then standard validation error; the later of equals."""
    best = (float(selected["verified_error"]), float(selected["standard_error"]))
    if (errors["verified_error"], errors["standard_error"]) > best:
        return selected
    return {
        **_scores(state, epoch, errors["verified_error"], errors["standard_error"]),
        "params": jax.tree.map(jnp.copy, state["params"]),
        "batch_stats": jax.tree.map(jnp.copy, state["batch_stats"]),
    }


def _scores(state: dict[str, Any], epoch: int, verified: float, standard: float) -> dict[str, Any]:
    """Returns the scores of an epoch as scalars on the devices of the state."""
    values = {
        "epoch": np.int32(epoch),
        "verified_error": np.float32(verified),
        "standard_error": np.float32(standard),
    }
    return {key: place(value, state["step"].sharding) for key, value in values.items()}

"""Natural training: cross-entropy on clean images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.methods.method import (
    Method,
    Objective,
    Outcome,
    Setting,
    clean_metrics,
    clean_pass,
    relu_metrics,
)


def natural_objective(setting: Setting) -> Objective:
    """Returns `CE(z, y)`; also the warm-up of the robust methods, at radius 0."""

    def objective(params, collections, batch, coefficients, key) -> tuple[jax.Array, Outcome]:
        del coefficients, key
        logits, statistics = clean_pass(
            setting.model, params, collections["batch_stats"], batch.images
        )
        metrics = clean_metrics(logits, batch.labels)
        loss = metrics["natural_loss"]
        metrics["loss"] = metrics["robust_loss"] = loss
        metrics["verified_error"] = metrics["standard_error"]  # they agree at radius 0
        metrics |= relu_metrics(None)
        return loss, Outcome(metrics, statistics)

    return objective


def natural(setting: Setting) -> Method:
    """Creates the method; it has one phase."""
    return Method(objectives=(natural_objective(setting),), phase=lambda coefficients: jnp.int32(0))

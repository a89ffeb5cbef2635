"""Natural training: cross-entropy on clean images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.methods.method import Method, Outcome, clean_metrics, clean_pass


def natural_objective(
    model, threat, params, collections, batch, weights
) -> tuple[jax.Array, Outcome]:
    """`CE(z, y)`; also the warm-up of the robust methods, where the radius is 0."""
    del threat, weights
    logits, statistics = clean_pass(model, params, collections["batch_stats"], batch.images)
    metrics = clean_metrics(logits, batch.labels)
    loss = metrics["natural_loss"]
    metrics["loss"] = metrics["robust_loss"] = loss
    metrics["verified_error"] = metrics["standard_error"]  # at radius 0 they are the same
    return loss, Outcome(metrics, statistics)


NATURAL = Method(objectives=(natural_objective,), phase=lambda weights: jnp.int32(0))

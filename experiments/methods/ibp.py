"""IBP training (Gowal et al. 2018): interval bounds on the merged margins."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax.training import mixed_objective, robust_cross_entropy
from experiments.methods.method import (
    Method,
    Outcome,
    clean_metrics,
    clean_pass,
    margin_rows,
    one_example,
    verified_error,
)
from experiments.methods.natural import natural_objective


def ibp_objective(model, threat, params, collections, batch, weights) -> tuple[jax.Array, Outcome]:
    """`kappa CE(z, y) + (1 - kappa) robust CE(interval margins)`."""
    logits, statistics = clean_pass(model, params, collections["batch_stats"], batch.images)
    interval = bj.interval(one_example(model, params, statistics))

    def margins_of(image: jax.Array, specification: jax.Array) -> jax.Array:
        return interval(threat.ball(image, weights.eps), specification).lower

    margins = jax.vmap(margins_of)(batch.images, margin_rows(logits, batch.labels))
    loss = mixed_objective(logits, batch.labels, margins, margins, weights.kappa, 0.0)
    metrics = clean_metrics(logits, batch.labels)
    metrics["loss"] = loss
    metrics["robust_loss"] = jnp.mean(robust_cross_entropy(margins))
    metrics["verified_error"] = verified_error(margins)
    return loss, Outcome(metrics, statistics)


IBP = Method(
    objectives=(natural_objective, ibp_objective),
    phase=lambda weights: jnp.where(weights.eps > 0, 1, 0),
)

"""CROWN-IBP training (Zhang et al. 2020): linear bounds on IBP pre-activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax.training import mixed_objective, robust_cross_entropy
from experiments.methods.ibp import ibp_objective
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


def crown_ibp_objective(
    model, threat, params, collections, batch, weights
) -> tuple[jax.Array, Outcome]:
    """Robust CE of `(1 - beta) interval + beta linear` margins, mixed with CE by kappa."""
    logits, statistics = clean_pass(model, params, collections["batch_stats"], batch.images)
    linear = bj.linear(
        one_example(model, params, statistics),
        slopes="adaptive",
        intermediate="interval",
        sides="lower",
        has_aux=True,
    )

    def margins_of(image: jax.Array, specification: jax.Array) -> tuple[jax.Array, ...]:
        bounds, aux = linear(threat.ball(image, weights.eps), specification)
        return bounds.lower, aux.interval.lower, aux.linear.lower

    best, interval_margins, linear_margins = jax.vmap(margins_of)(
        batch.images, margin_rows(logits, batch.labels)
    )
    loss = mixed_objective(
        logits, batch.labels, interval_margins, linear_margins, weights.kappa, weights.beta
    )
    metrics = clean_metrics(logits, batch.labels)
    metrics["loss"] = loss
    metrics["robust_loss"] = jnp.mean(
        robust_cross_entropy(
            (1.0 - weights.beta) * interval_margins + weights.beta * linear_margins
        )
    )
    metrics["verified_error"] = verified_error(best)
    return loss, Outcome(metrics, statistics)


def _phase(weights) -> jax.Array:
    # Without a radius no bounds are needed, and without beta no linear walk.
    return jnp.where(weights.eps > 0, jnp.where(weights.beta > 0, 2, 1), 0)


CROWN_IBP = Method(objectives=(natural_objective, ibp_objective, crown_ibp_objective), phase=_phase)

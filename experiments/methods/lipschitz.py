"""Lipschitz-certified training: BCP (Lee, Lee & Park 2020) and LMT (Tsuzuku et al. 2018).

BCP bounds every layer by a ball and a box, LMT by the global Lipschitz constant alone. Both need
the spectral norm of every linear layer. Training estimates it from below by power iteration, one
iteration per train step, on vectors that the state keeps as the collection `spectral`; the estimate
is differentiable in the weights. Certificates use provable upper bounds instead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax.training import mixed_objective, robust_cross_entropy
from experiments.methods.method import (
    Method,
    Objective,
    Outcome,
    PyTree,
    Setting,
    clean_metrics,
    clean_pass,
    margin_rows,
    one_example,
    relu_metrics,
    verified_error,
)
from experiments.methods.natural import natural_objective

SPECTRAL = "spectral"


def lipschitz_objective(setting: Setting, *, box: bool) -> Objective:
    """Returns `kappa CE(z, y) + (1 - kappa) robust CE(margins)`; margins of BCP (`box`) or LMT."""
    model, threat = setting.model, setting.threat

    def objective(params, collections, batch, coefficients, key) -> tuple[jax.Array, Outcome]:
        del key
        clean, statistics = clean_pass(model, params, collections["batch_stats"], batch.images)
        function = one_example(model, params, statistics)
        # The norms depend on the weights only: compute them once per step, not once per image. The
        # example gives the shape.
        norms, vectors = bj.power_iteration(function, batch.images[0], collections[SPECTRAL])
        bounds = bj.lipschitz(function, box=box, norms=norms, has_aux=True)

        def margins_of(image: jax.Array, specification: jax.Array) -> tuple[jax.Array, jax.Array]:
            margins, aux = bounds(threat.within(coefficients.eps)(image), specification)
            return margins.lower, aux.output.center

        # The centre of the last ball is the logits. Using it lets XLA drop the clean pass from the
        # compiled step where no statistics are needed.
        margins, logits = jax.vmap(margins_of)(batch.images, margin_rows(clean, batch.labels))
        loss = mixed_objective(logits, batch.labels, margins, margins, coefficients.kappa, 0.0)
        metrics = clean_metrics(logits, batch.labels)
        metrics["loss"] = loss
        metrics["robust_loss"] = jnp.mean(robust_cross_entropy(margins))
        metrics["verified_error"] = verified_error(margins)
        metrics |= relu_metrics(None)
        return loss, Outcome(metrics, statistics, {SPECTRAL: vectors}, norms=norms)

    return objective


def _init(function: Callable, example: jax.ShapeDtypeStruct, key: jax.Array) -> dict[str, PyTree]:
    return {SPECTRAL: bj.power_vectors(function, jnp.zeros(example.shape, example.dtype), key)}


def lipschitz(setting: Setting, *, box: bool) -> Method:
    """Creates BCP (`box`) or LMT; both train naturally at radius 0."""
    return Method(
        objectives=(natural_objective(setting), lipschitz_objective(setting, box=box)),
        phase=lambda coefficients: jnp.where(coefficients.eps > 0, 1, 0),
        init=_init,
    )

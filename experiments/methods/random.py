"""Training of random networks: RSE, Adv-BNN, adversarial training, and GradDiv on any of them.

Every pass takes one draw, which serves the whole batch (`boundjax.stochastic`). Nothing here
certifies: these are empirical defences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from boundjax import training
from boundjax.attacks import Descent
from experiments.methods.method import (
    Batch,
    Method,
    Objective,
    Outcome,
    PyTree,
    Setting,
    apply,
    clean_metrics,
    clean_pass,
    relu_metrics,
    with_statistics,
)


def random(setting: Setting, *, attacks: bool, diverges: bool = False) -> Method:
    """Creates a method for random networks: before the ramp without GradDiv's term, then with it.

    Args:
      setting: model and configuration.
      attacks: train on attacked images instead of clean ones.
      diverges: add the divergence from the prior.
    """

    def objective(diverse: bool) -> Objective:
        return random_objective(setting, attacks=attacks, diverges=diverges, diverse=diverse)

    if not setting.config.diversity.weight:
        return Method((objective(False),), phase=lambda coefficients: jnp.int32(0))
    return Method(
        (objective(False), objective(True)),
        phase=lambda coefficients: jnp.where(coefficients.ramp > 0, 1, 0),
    )


def random_objective(
    setting: Setting, *, attacks: bool, diverges: bool, diverse: bool
) -> Objective:
    """Returns `CE(f_w(x'), y) + kl / N KL + ramp weight R`, with `x'` attacked or clean.

    The attack, the loss and GradDiv's gradients all have draws of their own. Batch normalisation
    uses the statistics of the batch `x'` in the loss, and the running averages elsewhere.

    Args:
      setting: model and configuration.
      attacks: `x'` are attacked images (Madry et al. 2018): one new draw per step.
      diverges: add the divergence from the prior (Adv-BNN, Liu et al. 2019).
      diverse: add GradDiv's measure `R` of the gradients of new draws (Lee et al. 2022).
    """
    model, random_config = setting.model, setting.config.random
    draws, diversity = random_config.draws, setting.config.diversity

    def objective(params, collections, batch, coefficients, key) -> tuple[jax.Array, Outcome]:
        attack_key, draw, diversity_key = _keys(key)
        running = with_statistics(params, collections["batch_stats"])
        images = batch.images
        if attacks:
            constant = jax.lax.stop_gradient(running)
            images = attacked(setting, constant, batch, coefficients.eps, attack_key)
        logits, statistics = clean_pass(
            model, params, collections["batch_stats"], images, draw if draws else None
        )
        robust = jnp.mean(training.cross_entropy(logits, batch.labels))
        loss = robust
        if diverges:
            divergence: Any = model.apply({"params": params}, method="kl")
            loss = loss + random_config.kl / setting.images * divergence
        if diverse:
            points = Batch(images if diversity.at == "attacked" else batch.images, batch.labels)
            gradients = input_gradients(model, running, points, diversity_key, diversity.draws)
            measure = training.gradient_diversity_loss(gradients, diversity.measure)
            loss = loss + coefficients.ramp * diversity.weight * measure
        # The same draw on clean images; without an attack these are the logits of the loss.
        clean = apply(model, running, batch.images, draw if draws else None) if attacks else logits
        metrics = clean_metrics(jax.lax.stop_gradient(clean), batch.labels)
        metrics["loss"], metrics["robust_loss"] = loss, robust
        metrics["verified_error"] = jnp.ones_like(robust)  # nothing is certified
        metrics |= relu_metrics(None)
        return loss, Outcome(metrics, statistics)

    return objective


def attacked(
    setting: Setting, variables: PyTree, batch: Batch, radius: jax.Array, key: jax.Array
) -> jax.Array:
    """Attacks the cross-entropy by PGD, `[B, H, W, channels]`; a draw per step, the last iterate.

    It is `boundjax.attacks.pgd` with `draws=1` and `keep="last"`, whose loops are in Python here:
    XLA's CPU backend runs gradients of convolutions several times slower inside a loop.
    """
    model, adversary = setting.model, setting.config.adversary
    eps = adversary.scale * radius
    draws = setting.config.random.draws
    descent = Descent(
        lambda x, *draw: apply(model, variables, x, *draw),
        batch.images,
        batch.labels,
        setting.threat.within(eps),
        step_size=adversary.step_size * eps,
        loss="cross_entropy",
        draws=1 if draws else None,
        keep="last",
    )
    best = descent.nothing()
    for restart in range(adversary.restarts):
        iterate = descent.start(key, restart)
        keys = list(descent.draw_keys(key, restart, adversary.steps))
        for draw in keys[:-1]:
            iterate, best = descent.step(iterate, best, draw if draws else None)
        best = descent.end(iterate, best, keys[-1] if draws else None)
    return jax.lax.stop_gradient(best.iterate)


def input_gradients(
    model: nn.Module,
    variables: PyTree,
    batch: Batch,
    key: jax.Array,
    draws: int,
) -> jax.Array:
    """The gradients `[n, B, H, W, channels]` of the cross-entropy of `draws` draws at images.

    They can be differentiated with respect to `variables`. The draws are unrolled, see `attacked`.
    """

    def gradient_of(draw: jax.Array) -> Callable[[jax.Array], jax.Array]:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(training.cross_entropy(apply(model, variables, x, draw), batch.labels))

        return jax.grad(loss)

    keys = list(jax.random.split(key, draws))
    return jnp.stack([gradient_of(draw)(batch.images) for draw in keys])


def gradient_measures(
    setting: Setting, variables: PyTree, batch: Batch, radius: jax.Array, key: jax.Array
) -> dict[str, jax.Array]:
    """GradDiv's measures of the gradients of a step, as its objective with `key` would take them.

    Means over the batch: `rho`, the mean resultant length, and the measures `kappa`, `mean` and
    `dpp` of `boundjax.training.gradient_diversity_loss`.
    """
    diversity = setting.config.diversity
    attack_key, _, diversity_key = _keys(key)
    if setting.config.robust.method != "rse" and diversity.at == "attacked":
        batch = batch._replace(images=attacked(setting, variables, batch, radius, attack_key))
    gradients = input_gradients(setting.model, variables, batch, diversity_key, diversity.draws)
    directions = training.gradient_directions(gradients)
    lengths = jnp.where(directions.kept, training.mean_resultant_length(directions.cosines), 0.0)
    kept = jnp.sum(directions.kept, dtype=lengths.dtype)
    measures = {
        name: training.gradient_diversity_loss(gradients, name) for name in ("kappa", "mean", "dpp")
    }
    return {"rho": jnp.sum(lengths) / jnp.maximum(kept, 1.0), **measures}


def _keys(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of a step's attack, of the draw of its loss, and of the draws of GradDiv."""
    attack_key, draw, diversity_key = jax.random.split(key, 3)
    return attack_key, draw, diversity_key

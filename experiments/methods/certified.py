"""Training on bounds: one objective for every way to bound, its phases, and the regularizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax import training
from experiments.methods import bounded
from experiments.methods.bounded import Bound, Bounded, Example
from experiments.methods.method import (
    Batch,
    Method,
    Objective,
    Outcome,
    PyTree,
    Setting,
    Weights,
    clean_metrics,
    clean_pass,
    margin_rows,
    one_example,
    relu_metrics,
    verified_error,
    with_statistics,
)
from experiments.methods.natural import natural_objective
from experiments.settings.config import RegularizerConfig

# The radius at which the regularizers of the natural warm-up are evaluated (Shi et al. 2021, code).
WARMUP_EPS = 1e-6

# (model's logits of a batch, batch, weights, key) -> attacked images.
Attack = Callable[[Callable[[jax.Array], jax.Array], Batch, Weights, jax.Array], jax.Array]


def certified_objective(
    setting: Setting,
    bound_with: Callable[[jax.Array], Bound],
    *,
    attack: Attack | None = None,
    regularized: bool = True,
) -> Objective:
    """`kappa CE(z, y) + (1 - kappa) mean robust loss + regularizers`.

    Args:
      setting: model and configuration.
      bound_with: (key of the step) -> how one image is bounded, and what its robust loss is.
      attack: what makes `Example.attacked`; None leaves the images as they are.
      regularized: with the regularizers that fall with the radius. At radius 0 (the warm-up) they
        are evaluated at `WARMUP_EPS`, and the loss is otherwise the natural one.
    """
    model, threat, weights_of = setting.model, setting.threat, setting.config.regularizers

    def objective(
        params: PyTree, collections: dict[str, PyTree], batch: Batch, weights: Weights, key: Any
    ) -> tuple[jax.Array, Outcome]:
        logits, statistics = clean_pass(model, params, collections["batch_stats"], batch.images)
        bound_key, attack_key, example_key = jax.random.split(key, 3)
        attacked = batch.images
        if attack is not None:
            variables = jax.lax.stop_gradient(with_statistics(params, statistics))
            attacked = attack(
                lambda images: model.apply(variables, images), batch, weights, attack_key
            )
        function = one_example(model, params, statistics)
        bound = bound_with(bound_key)
        eps = jnp.where(weights.eps > 0, weights.eps, WARMUP_EPS) if regularized else weights.eps

        def found_of(example: Example, rows: jax.Array) -> tuple[Bounded, Any]:
            found = bound(function, threat.within(eps)(example.image), rows, weights, example)
            return found, _relaxation_terms(weights_of, function, rows, found)

        examples = Example(
            batch.images, attacked, batch.labels, jax.random.split(example_key, len(batch.labels))
        )
        found, relaxation_terms = jax.vmap(found_of)(examples, margin_rows(logits, batch.labels))

        metrics = clean_metrics(logits, batch.labels)
        natural, robust = metrics["natural_loss"], jnp.mean(found.robust_loss)
        kappa = weights.kappa
        if regularized:  # may be the warm-up, which is natural
            kappa = jnp.where(weights.eps > 0, kappa, 1.0)
        loss = kappa * natural + (1.0 - kappa) * robust
        loss = loss + _regularization(
            setting, weights, params, found, jnp.mean(relaxation_terms), regularized
        )
        metrics["loss"] = loss
        metrics["robust_loss"] = robust
        metrics["verified_error"] = verified_error(found.verified)
        metrics |= relu_metrics(found.pre_activations)
        return loss, Outcome(metrics, statistics)

    return objective


def _relaxation_terms(
    weights_of: RegularizerConfig, function: Callable, rows: jax.Array, found: Bounded
) -> jax.Array:
    """`gap sum_t d_t + slack sum_t r_t` of one image (REG), before its schedule."""
    if not (weights_of.gap or weights_of.slack):
        return jnp.zeros_like(found.robust_loss)
    relaxed = found.relaxed

    def at(point: jax.Array, row: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, met = bj.interval(function, has_aux=True)(bj.Box(point, point), row[None])
        return value.middle[0], {label: interval.middle for label, interval in met.items()}

    attained, values = jax.vmap(at)(jax.lax.stop_gradient(relaxed.worst_input), rows)
    total = jnp.zeros_like(found.robust_loss)
    if weights_of.gap:
        gap = training.gap_to_attained(relaxed.margins, attained)
        total = total + weights_of.gap * jnp.sum(gap)
    if weights_of.slack:
        slack = training.relaxation_slack(found.pre_activations, values, relaxed.rows)
        total = total + weights_of.slack * jnp.sum(slack)
    return total


def _regularization(
    setting: Setting,
    weights: Weights,
    params: PyTree,
    found: Bounded,
    relaxation_terms: jax.Array,
    falling: bool,
) -> jax.Array:
    weights_of = setting.config.regularizers
    total = weights.ramp * relaxation_terms
    if falling:
        if weights_of.tightness:
            box = _normalised(setting, found.input_interval)
            tightness = training.tightness_loss(box, found.pre_activations, weights_of.tau)
            total = total + (1.0 - weights.ramp) * weights_of.tightness * tightness
        if weights_of.relu_balance:
            balance = training.relu_balance_loss(found.pre_activations, weights_of.tau)
            total = total + (1.0 - weights.ramp) * weights_of.relu_balance * balance
    if weights_of.relu_stability:
        stability = training.relu_stability_loss(found.pre_activations)
        total = total + weights_of.relu_stability * stability
    if weights_of.l1:
        total = total + weights_of.l1 * training.l1_norm(params)
    return total


def _normalised(setting: Setting, box: bj.Interval) -> bj.Interval:
    """The pixels' box `[B, H, W, channels]` in the units of the network's first weights.

    Shi et al. 2021 normalise the data, so widths are compared with those behind the normalization.
    """
    std = setting.config.model.std
    if not std:
        return box
    return jax.tree.map(lambda end: end / jnp.asarray(std, end.dtype).reshape(1, 1, 1, -1), box)


def certified(
    setting: Setting,
    bound_with: Callable[[jax.Array], Bound],
    *,
    attack: Attack | None = None,
    mixes_intervals: bool = False,
    after_ramp: bool = False,
) -> Method:
    """A method that trains on bounds: natural, then IBP where only intervals count, then its own.

    Args:
      setting: model and configuration.
      bound_with: (key of the step) -> its bounds.
      attack: what the bounds need, if they need attacked images.
      mixes_intervals: beta weighs its bounds against interval bounds: with beta 0 it is IBP, unless
        a regularizer needs its relaxation.
      after_ramp: it is IBP until the radius has reached its end.
    """
    regularizers = setting.config.regularizers
    falls = regularizers.tightness or regularizers.relu_balance
    needs_relaxation = regularizers.gap or regularizers.slack

    def phases(regularized: bool) -> tuple[Objective, ...]:
        ibp = certified_objective(
            setting, lambda key: bounded.interval_bound, regularized=regularized
        )
        own = certified_objective(setting, bound_with, attack=attack, regularized=regularized)
        return (ibp if regularized else natural_objective(setting)), ibp, own

    def phase(weights: Weights) -> jax.Array:
        own = jnp.asarray(True)
        if mixes_intervals and not needs_relaxation:
            own = own & (weights.beta > 0)
        if after_ramp:
            own = own & (weights.ramp >= 1)
        due = jnp.where(weights.eps > 0, jnp.where(own, 2, 1), 0)
        return jnp.where(weights.ramp < 1, due + 3, due) if falls else due

    objectives = (*phases(False), *phases(True)) if falls else phases(False)
    return Method(objectives=objectives, phase=phase)

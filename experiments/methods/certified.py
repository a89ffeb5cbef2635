"""Training on bounds: one objective for all kinds of bounds, its phases, and the regularizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax import training
from experiments.methods import bounded
from experiments.methods.bounded import Bound, Bounded, Example
from experiments.methods.method import (
    Batch,
    Coefficients,
    Method,
    Objective,
    Outcome,
    PyTree,
    Setting,
    apply,
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

# Radius at which the natural warm-up evaluates the regularizers (Shi et al. 2021, code).
WARMUP_EPS = 1e-6

# (images of a batch -> logits, batch, coefficients, key) -> attacked images.
Attack = Callable[[Callable[[jax.Array], jax.Array], Batch, Coefficients, jax.Array], jax.Array]


def certified_objective(
    setting: Setting,
    bound_with: Callable[[jax.Array], Bound],
    *,
    attack: Attack | None = None,
    regularized: bool = True,
) -> Objective:
    """Returns `kappa CE(z, y) + (1 - kappa) mean robust loss + regularizers`.

    Args:
      setting: model and configuration.
      bound_with: (key of the step) -> the bound of one image, with its robust loss.
      attack: creates `Example.attacked`; None leaves the images as they are.
      regularized: adds the regularizers that fall with the radius. At radius 0 (the warm-up) they
        are evaluated at `WARMUP_EPS`, and the rest of the loss is the natural one.
    """
    model, threat, regularizers = setting.model, setting.threat, setting.config.regularizers

    def objective(
        params: PyTree,
        collections: dict[str, PyTree],
        batch: Batch,
        coefficients: Coefficients,
        key: Any,
    ) -> tuple[jax.Array, Outcome]:
        logits, statistics = clean_pass(model, params, collections["batch_stats"], batch.images)
        bound_key, attack_key, example_key = jax.random.split(key, 3)
        attacked = batch.images
        if attack is not None:
            variables = jax.lax.stop_gradient(with_statistics(params, statistics))
            attacked = attack(
                lambda images: apply(model, variables, images), batch, coefficients, attack_key
            )
        function = one_example(model, params, statistics)
        bound = bound_with(bound_key)
        eps = coefficients.eps
        if regularized:
            eps = jnp.where(eps > 0, eps, WARMUP_EPS)

        def bound_example(example: Example, rows: jax.Array) -> tuple[Bounded, jax.Array]:
            ball = threat.within(eps)(example.image)
            bounds = bound(function, ball, rows, coefficients, example)
            return bounds, _relaxation_terms(regularizers, function, rows, bounds)

        examples = Example(
            batch.images, attacked, batch.labels, jax.random.split(example_key, len(batch.labels))
        )
        rows = margin_rows(logits, batch.labels)
        bounds, relaxation_terms = jax.vmap(bound_example)(examples, rows)

        metrics = clean_metrics(logits, batch.labels)
        natural, robust = metrics["natural_loss"], jnp.mean(bounds.robust_loss)
        kappa = coefficients.kappa
        if regularized:  # may be the warm-up, whose loss is natural
            kappa = jnp.where(coefficients.eps > 0, kappa, 1.0)
        loss = kappa * natural + (1.0 - kappa) * robust
        loss = loss + _regularization(
            setting, coefficients, params, bounds, jnp.mean(relaxation_terms), regularized
        )
        metrics["loss"] = loss
        metrics["robust_loss"] = robust
        metrics["verified_error"] = verified_error(bounds.verified)
        metrics |= relu_metrics(bounds.pre_activations)
        return loss, Outcome(metrics, statistics, bounds=bounds)

    return objective


def _relaxation_terms(
    regularizers: RegularizerConfig, function: Callable, rows: jax.Array, bounds: Bounded
) -> jax.Array:
    """Returns `gap sum_t d_t + slack sum_t r_t` of one image (REG), before the schedule."""
    if not (regularizers.gap or regularizers.slack):
        return jnp.zeros_like(bounds.robust_loss)
    relaxed = bounds.relaxed
    assert relaxed is not None  # `methods.create` refuses gap and slack without a relaxation
    propagate: Callable[..., Any] = bj.interval(function, has_aux=True)

    def at(point: jax.Array, row: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, intervals = propagate(bj.Box(point, point), row[None])
        return value.middle[0], {label: interval.middle for label, interval in intervals.items()}

    attained, values = jax.vmap(at)(jax.lax.stop_gradient(relaxed.worst_input), rows)
    total = jnp.zeros_like(bounds.robust_loss)
    if regularizers.gap:
        gap = training.gap_to_attained(relaxed.margins, attained)
        total = total + regularizers.gap * jnp.sum(gap)
    if regularizers.slack:
        slack = training.relaxation_slack(bounds.pre_activations, values, relaxed.rows)
        total = total + regularizers.slack * jnp.sum(slack)
    return total


def _regularization(
    setting: Setting,
    coefficients: Coefficients,
    params: PyTree,
    bounds: Bounded,
    relaxation_terms: jax.Array,
    falling: bool,
) -> jax.Array:
    regularizers, remaining = setting.config.regularizers, 1.0 - coefficients.ramp
    total = coefficients.ramp * relaxation_terms
    if falling:
        if regularizers.tightness:
            box = normalised(bounds.input_interval, setting.config.model.std)
            tightness = training.tightness_loss(box, bounds.pre_activations, regularizers.tau)
            total = total + remaining * regularizers.tightness * tightness
        if regularizers.relu_balance:
            balance = training.relu_balance_loss(bounds.pre_activations, regularizers.tau)
            total = total + remaining * regularizers.relu_balance * balance
    if regularizers.relu_stability:
        stability = training.relu_stability_loss(bounds.pre_activations)
        total = total + regularizers.relu_stability * stability
    if regularizers.l1:
        total = total + regularizers.l1 * training.l1_norm(params)
    return total


def normalised(box: bj.Interval, std: Sequence[float]) -> bj.Interval:
    """Scales the pixels' box `[B, H, W, channels]` to the units of the network's first weights.

    Shi et al. 2021 normalise the data, so they compare widths behind the normalisation.
    """
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
    """Creates a method on bounds: natural, then IBP while only intervals count, then its bounds.

    Args:
      setting: model and configuration.
      bound_with: (key of the step) -> the method's bound.
      attack: creates the attacked images that the bound needs, if any.
      mixes_intervals: beta weighs the bound against interval bounds, so that beta 0 is IBP, unless
        a regularizer needs the relaxation.
      after_ramp: train by IBP until the radius has reached its final value.
    """
    regularizers = setting.config.regularizers
    falls = regularizers.tightness or regularizers.relu_balance
    needs_relaxation = regularizers.gap or regularizers.slack

    def phases(regularized: bool) -> tuple[Objective, ...]:
        ibp = certified_objective(
            setting, lambda key: bounded.interval_bound, regularized=regularized
        )
        main = certified_objective(setting, bound_with, attack=attack, regularized=regularized)
        return (ibp if regularized else natural_objective(setting)), ibp, main

    def phase(coefficients: Coefficients) -> jax.Array:
        main = jnp.asarray(True)
        if mixes_intervals and not needs_relaxation:
            main = main & (coefficients.beta > 0)
        if after_ramp:
            main = main & (coefficients.ramp >= 1)
        index = jnp.where(coefficients.eps > 0, jnp.where(main, 2, 1), 0)
        return jnp.where(coefficients.ramp < 1, index + 3, index) if falls else index

    objectives = (*phases(False), *phases(True)) if falls else phases(False)
    return Method(objectives=objectives, phase=phase)

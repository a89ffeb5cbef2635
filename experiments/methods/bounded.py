"""Bounds on one image as the methods train on them: IBP, linear relaxations, CAP's estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import boundjax as bj
from boundjax.training import fused_robust_cross_entropy, robust_cross_entropy
from experiments.methods.method import Setting, Weights


class Example(NamedTuple):
    """One image: `image` and `attacked` `[H, W, channels]`, `label` int, a PRNG key of its own.

    `attacked` is the image itself where the method attacks none.
    """

    image: jax.Array
    attacked: jax.Array
    label: jax.Array
    key: jax.Array


class Relaxed(NamedTuple):
    """The relaxation behind lower bounds on `m` margins, for the regularizers of REG.

    Attributes:
      margins: the bounds `[m]`, intersected with nothing.
      rows: label -> coefficients `[m, *shape]` on the nonlinear op's output.
      worst_input: `[m, H, W, channels]`, where the relaxation attains the bounds.
    """

    margins: jax.Array
    rows: dict[str, jax.Array]
    worst_input: jax.Array


class Bounded(NamedTuple):
    """What is known of one image, or under `vmap` of a batch.

    Attributes:
      robust_loss: what is trained on, in place of the worst cross-entropy.
      verified: sound lower bounds on the margins over the whole ball, `[C - 1]`; minus infinity
        where the method has none.
      input_interval: of the set that was propagated, `[H, W, channels]`.
      pre_activations: bounds (of CAP: estimates) on the inputs of the nonlinear ops, by label.
      relaxed: None where the method has no relaxation.
    """

    robust_loss: jax.Array
    verified: jax.Array
    input_interval: bj.Interval
    pre_activations: dict[str, bj.Interval]
    relaxed: Relaxed | None = None


# (function of one image, set of its perturbations, margin rows [C - 1, C], weights, example).
Bound = Callable[[Callable, bj.InputSet, jax.Array, Weights, Example], Bounded]


def interval_bound(function, ball, rows, weights, example) -> Bounded:
    """Robust cross-entropy of the merged interval margins (Gowal et al. 2018)."""
    del weights, example
    margins, pre_activations = bj.interval(function, has_aux=True)(ball, rows)
    return Bounded(
        robust_cross_entropy(margins.lower), margins.lower, ball.interval(), pre_activations
    )


def linear_bound(slopes_of: Callable[..., Any], mesh: Mesh | None = None) -> Bound:
    """Robust cross-entropy of `(1 - beta) interval + beta linear` margins (Zhang et al. 2020).

    Args:
      slopes_of: (weights, interval margins [C - 1], key) -> what `boundjax.linear` takes as slopes.
      mesh: the devices of its axis `spec` divide the rows.
    """

    def bound(function, ball, rows, weights, example) -> Bounded:
        interval = jax.lax.stop_gradient(bj.interval(function)(ball, rows).lower)
        divided = _divided(rows, mesh)
        bounds, aux = bj.linear(
            function,
            slopes=slopes_of(weights, interval, example.key),
            sides="lower",
            has_aux=True,
        )(ball, divided)
        bounds, aux = _of_rows(len(rows), bounds, aux)
        margins = (1.0 - weights.beta) * aux.interval.lower + weights.beta * aux.linear.lower
        return _relaxed(margins, bounds.lower, ball, aux.linear.lower, aux)

    return bound


def cap_bound(mesh: Mesh | None = None) -> Bound:
    """Robust cross-entropy of the margins of CAP / Fast-Lin, exact (Wong & Kolter 2018).

    The devices of the axis `spec` of `mesh` divide the rows of the margins.
    """

    def bound(function, ball, rows, weights, example) -> Bounded:
        del weights, example
        divided = _divided(rows, mesh)
        bounds, aux = bj.linear(
            function,
            slopes="parallel",
            intermediate="linear",
            sides="lower",
            intersect=False,
            has_aux=True,
        )(ball, divided)
        bounds, aux = _of_rows(len(rows), bounds, aux)
        return _relaxed(aux.linear.lower, bounds.lower, ball, aux.linear.lower, aux)

    return bound


def _divided(rows: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The rows, divided between the devices of `spec`; the last is repeated for equal parts."""
    size = 1 if mesh is None else mesh.shape["spec"]
    if size == 1:
        return rows
    rows = jnp.concatenate([rows, jnp.repeat(rows[-1:], -len(rows) % size, axis=0)])
    # Under `vmap` this leaves open how the images lie: they stay where they are.
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec("spec")))


def _of_rows(count: int, bounds: bj.Interval, aux: Any) -> tuple[bj.Interval, Any]:
    """What `boundjax.linear` found, of the first `count` rows: without the repeated ones."""
    if len(bounds.lower) == count:
        return bounds, aux
    bounds, interval, linear, rows, worst = jax.tree.map(
        lambda leaf: leaf[:count],
        (bounds, aux.interval, aux.linear, aux.rows, aux.worst_input),
    )
    return bounds, aux._replace(interval=interval, linear=linear, rows=rows, worst_input=worst)


def _relaxed(margins, verified, ball, linear, aux) -> Bounded:
    return Bounded(
        robust_cross_entropy(margins),
        verified,
        ball.interval(),
        aux.pre_activations,
        Relaxed(linear, aux.rows, aux.worst_input),
    )


def fused_bound(function, ball, rows, weights, example) -> Bounded:
    """CROWN-IBP with loss fusion (Xu et al. 2020): one row per image instead of one per class.

    `(1 - beta)` of the interval margins' robust cross-entropy and `beta` of the fused one, both
    upper bounds on the worst cross-entropy.
    """
    del example
    # One walk for both: two would go back through the intervals twice.
    relaxation = bj.relax(function, sides="lower")(ball)
    margins = relaxation.interval(rows)

    def lower_bound(combination: jax.Array) -> jax.Array:
        return relaxation.bounds((combination @ rows)[None]).lower[0]

    fused = fused_robust_cross_entropy(margins, lower_bound)
    loss = (1.0 - weights.beta) * robust_cross_entropy(margins.lower) + weights.beta * fused
    return Bounded(loss, margins.lower, ball.interval(), relaxation.pre_activations)


def estimated_bound(projections: int, key: jax.Array) -> Bound:
    """CAP by random projections (Wong et al. 2018): an estimate, the same for the whole batch.

    What counts as verified are interval bounds.
    """

    def bound(function, ball, rows, weights, example) -> Bounded:
        del weights, example
        estimate, aux = bj.estimate(
            function, key, projections=projections, sides="lower", has_aux=True
        )(ball, rows)
        margins = estimate.lower_estimate
        return _relaxed(margins, bj.interval(function)(ball, rows).lower, ball, margins, aux)

    return bound


def one_step_slopes(setting: Setting) -> Callable[..., Any]:
    """Slopes by signed-gradient steps on the training loss, from random ones (Lee et al. 2021)."""
    relaxation = setting.config.relaxation

    def slopes_of(weights: Weights, interval: jax.Array, key: jax.Array) -> Any:
        def objective(margins: jax.Array) -> jax.Array:
            margins = margins[: len(interval)]  # without rows that only fill up
            return robust_cross_entropy((1.0 - weights.beta) * interval + weights.beta * margins)

        return bj.optimized(
            relaxation.steps,
            learning_rate=relaxation.step_size,
            start=bj.slopes.uniform(key),
            objective=objective,
        )

    return slopes_of


def fixed_slopes(slopes: Any) -> Callable[..., Any]:
    """The same policy for every image."""
    return lambda weights, interval, key: slopes


def drawn_slopes(policy: Callable[[jax.Array], Any]) -> Callable[..., Any]:
    """A policy that draws, from a new key at every image and step."""
    return lambda weights, interval, key: policy(key)


def no_certificate(margins: jax.Array) -> jax.Array:
    """Minus infinity for every margin: nothing is verified."""
    return jnp.full_like(margins, -jnp.inf)

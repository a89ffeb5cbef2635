"""Bounds on one image as the methods train on them: IBP, linear relaxations, CAP's estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

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
        walk = bj.linear(
            function,
            slopes=slopes_of(weights, interval, example.key),
            sides="lower",
            has_aux=True,
        )
        found = _over_rows(lambda part: walk(ball, part), rows, mesh)
        margins = (1.0 - weights.beta) * found.interval + weights.beta * found.linear
        return _relaxed(margins, ball, found)

    return bound


def cap_bound(mesh: Mesh | None = None) -> Bound:
    """Robust cross-entropy of the margins of CAP / Fast-Lin, exact (Wong & Kolter 2018).

    The devices of the axis `spec` of `mesh` divide the rows of the margins.
    """

    def bound(function, ball, rows, weights, example) -> Bounded:
        del weights, example
        walk = bj.linear(
            function,
            slopes="parallel",
            intermediate="linear",
            sides="lower",
            intersect=False,
            has_aux=True,
        )
        found = _over_rows(lambda part: walk(ball, part), rows, mesh)
        return _relaxed(found.linear, ball, found)

    return bound


class _Found(NamedTuple):
    """What a linear walk found of `m` rows, in the words of `boundjax.linear`."""

    lower: jax.Array
    interval: jax.Array
    linear: jax.Array
    rows: dict[str, jax.Array]
    worst_input: jax.Array
    pre_activations: dict[str, bj.Interval]


def _over_rows(walk: Callable, rows: jax.Array, mesh: Mesh | None) -> _Found:
    """`walk(rows) -> (bounds, aux)`, every device of the axis `spec` with its part of the rows.

    Left to XLA the walk would not stay divided: it flattens images and rows to one axis, of which
    no device has a contiguous part.
    """

    def found_of(part: jax.Array) -> _Found:
        bounds, aux = walk(part)
        lower = bounds.lower, aux.interval.lower, aux.linear.lower
        return _Found(*lower, aux.rows, aux.worst_input, aux.pre_activations)

    size = 1 if mesh is None else mesh.shape["spec"]
    if size == 1:
        return found_of(rows)
    count = len(rows)
    # The last row is repeated for equal parts.
    rows = jnp.concatenate([rows, jnp.repeat(rows[-1:], -count % size, axis=0)])
    divided, same = PartitionSpec("spec"), PartitionSpec()
    found = jax.shard_map(
        found_of,
        mesh=mesh,
        in_specs=divided,
        out_specs=_Found(*(divided,) * 5, pre_activations=same),
        axis_names={"spec"},
        check_vma=False,  # what is traced on one image knows nothing of meshes
    )(rows)
    of_rows = jax.tree.map(lambda leaf: leaf[:count], found[:-1])
    return _Found(*of_rows, found.pre_activations)


def _relaxed(margins: jax.Array, ball: bj.InputSet, found: _Found) -> Bounded:
    return Bounded(
        robust_cross_entropy(margins),
        found.lower,
        ball.interval(),
        found.pre_activations,
        Relaxed(found.linear, found.rows, found.worst_input),
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
        verified, margins = bj.interval(function)(ball, rows).lower, estimate.lower_estimate
        found = _Found(verified, verified, margins, aux.rows, aux.worst_input, aux.pre_activations)
        return _relaxed(margins, ball, found)

    return bound


def one_step_slopes(setting: Setting) -> Callable[..., Any]:
    """Slopes by signed-gradient steps on the training loss, from random ones (Lee et al. 2021)."""
    relaxation = setting.config.relaxation

    def slopes_of(weights: Weights, interval: jax.Array, key: jax.Array) -> Any:
        def objective(margins: jax.Array) -> jax.Array:
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

"""Bounds on one image to train on: IBP, linear relaxations, CAP's estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

import boundjax as bj
from boundjax.training import fused_robust_cross_entropy, robust_cross_entropy
from experiments.methods.method import Coefficients, Setting


class Example(NamedTuple):
    """One image: `image` and `attacked` `[H, W, channels]`, `label` int, and a PRNG key.

    `attacked` is the image itself for methods without an attack.
    """

    image: jax.Array
    attacked: jax.Array
    label: jax.Array
    key: jax.Array


class Relaxed(NamedTuple):
    """The relaxation behind lower bounds on `m` margins, for REG's regularizers and diagnostics.

    Attributes:
      margins: the bounds `[m]`, not intersected with others.
      rows: label -> coefficients `[m, *shape]` on the nonlinear op's output.
      worst_input: `[m, H, W, channels]`, where the relaxation attains the bounds.
      slopes: label -> positions of the free slopes; empty for estimates.
      coefficients: the relaxed gradients, `[m, H, W, channels]`; None for estimates.
    """

    margins: jax.Array
    rows: dict[str, jax.Array]
    worst_input: jax.Array
    slopes: dict[str, jax.Array] = {}  # noqa: RUF012
    coefficients: jax.Array | None = None


class Bounded(NamedTuple):
    """Loss and bounds of one image, or under `vmap` of a batch.

    Attributes:
      robust_loss: the loss to train on, in place of the worst cross-entropy.
      verified: sound lower bounds on the margins over the whole ball, `[C - 1]`; minus infinity
        where the method has none.
      input_interval: interval of the propagated set, `[H, W, channels]`.
      pre_activations: bounds (of CAP: estimates) on the inputs of the nonlinear ops, by label.
      relaxed: None where the method has no relaxation.
    """

    robust_loss: jax.Array
    verified: jax.Array
    input_interval: bj.Interval
    pre_activations: dict[str, bj.Interval]
    relaxed: Relaxed | None = None


# (function of one image, set of its perturbations, margin rows [C - 1, C], coefficients, example).
Bound = Callable[[Callable, bj.InputSet, jax.Array, Coefficients, Example], Bounded]


def interval_bound(function, ball, rows, coefficients, example) -> Bounded:
    """Bounds the robust cross-entropy by the merged interval margins (Gowal et al. 2018)."""
    del coefficients, example
    propagate: Callable[..., Any] = bj.interval(function, has_aux=True)
    margins, pre_activations = propagate(ball, rows)
    return Bounded(
        robust_cross_entropy(margins.lower), margins.lower, ball.interval(), pre_activations
    )


def linear_bound(slopes_of: Callable[..., Any], mesh: Mesh | None = None) -> Bound:
    """Takes the margins `(1 - beta) interval + beta linear` (Zhang et al. 2020).

    Args:
      slopes_of: (coefficients, interval margins [C - 1], key) -> `slopes` for `boundjax.linear`.
      mesh: the devices of its axis `spec` divide the rows.
    """

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        interval = jax.lax.stop_gradient(bj.interval(function)(ball, rows).lower)
        walk = bj.linear(
            function,
            slopes=slopes_of(coefficients, interval, example.key),
            sides="lower",
            has_aux=True,
        )
        result = _over_rows(lambda part: walk(ball, part), rows, mesh)
        margins = (1.0 - coefficients.beta) * result.interval + coefficients.beta * result.linear
        return _relaxed(margins, ball, result)

    return bound


def cap_bound(mesh: Mesh | None = None) -> Bound:
    """Takes the exact margins of CAP / Fast-Lin (Wong & Kolter 2018).

    The devices of the axis `spec` of `mesh` divide the rows of the margins.
    """

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        del coefficients, example
        walk = bj.linear(
            function,
            slopes="parallel",
            intermediate="linear",
            sides="lower",
            intersect=False,
            has_aux=True,
        )
        result = _over_rows(lambda part: walk(ball, part), rows, mesh)
        return _relaxed(result.linear, ball, result)

    return bound


class _WalkResult(NamedTuple):
    """Lower bounds of `m` rows and their auxiliary values, named as in `boundjax.linear`."""

    lower: jax.Array
    interval: jax.Array
    linear: jax.Array
    rows: dict[str, jax.Array]
    worst_input: jax.Array
    coefficients: jax.Array | None
    pre_activations: dict[str, bj.Interval]
    slopes: dict[str, jax.Array]


def _over_rows(walk: Callable, rows: jax.Array, mesh: Mesh | None) -> _WalkResult:
    """Runs `walk(rows) -> (bounds, aux)`; each device of the axis `spec` walks a part of the rows.

    Sharding constraints alone would not keep the walk divided: XLA flattens images and rows to one
    axis, of which no device has a contiguous part.
    """

    def walk_part(part: jax.Array) -> _WalkResult:
        bounds, aux = walk(part)
        return _WalkResult(
            bounds.lower,
            aux.interval.lower,
            aux.linear.lower,
            aux.rows,
            aux.worst_input,
            aux.coefficients.lower_coefficients,
            aux.pre_activations,
            aux.slopes,
        )

    size = 1 if mesh is None else mesh.shape["spec"]
    if size == 1:
        return walk_part(rows)
    count = len(rows)
    # Repeat the last row, so that all parts have equal size.
    rows = jnp.concatenate([rows, jnp.repeat(rows[-1:], -count % size, axis=0)])
    divided: Any = PartitionSpec("spec")
    same: Any = PartitionSpec()
    result = jax.shard_map(
        walk_part,
        mesh=mesh,
        in_specs=divided,
        out_specs=_WalkResult(*(divided,) * 6, pre_activations=same, slopes=same),
        axis_names={"spec"},
        check_vma=False,  # the walk is traced on one image, without reference to a mesh
    )(rows)
    of_rows = result._replace(pre_activations={}, slopes={})
    trimmed = jax.tree.map(lambda leaf: leaf[:count], of_rows)
    return trimmed._replace(pre_activations=result.pre_activations, slopes=result.slopes)


def _relaxed(margins: jax.Array, ball: bj.InputSet, result: _WalkResult) -> Bounded:
    return Bounded(
        robust_cross_entropy(margins),
        result.lower,
        ball.interval(),
        result.pre_activations,
        Relaxed(result.linear, result.rows, result.worst_input, result.slopes, result.coefficients),
    )


def fused_bound(function, ball, rows, coefficients, example) -> Bounded:
    """Bounds by CROWN-IBP with loss fusion (Xu et al. 2020): one row per image, not per class.

    The loss is `(1 - beta)` times the robust cross-entropy of the interval margins plus `beta`
    times the fused one; both are upper bounds on the worst cross-entropy.
    """
    del example
    # Share one relaxation: two would propagate the intervals twice.
    relaxation = bj.relax(function, sides="lower")(ball)
    margins = relaxation.interval(rows)

    def lower_bound(combination: jax.Array) -> jax.Array:
        return relaxation.bounds((combination @ rows)[None]).lower[0]

    fused = fused_robust_cross_entropy(margins, lower_bound)
    loss = (1.0 - coefficients.beta) * robust_cross_entropy(
        margins.lower
    ) + coefficients.beta * fused
    return Bounded(loss, margins.lower, ball.interval(), relaxation.pre_activations)


def estimated_bound(projections: int, key: jax.Array) -> Bound:
    """Estimates CAP by random projections (Wong et al. 2018), the same ones for the whole batch.

    The verified margins are interval bounds.
    """

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        del coefficients, example
        estimate, aux = bj.estimate(
            function, key, projections=projections, sides="lower", has_aux=True
        )(ball, rows)
        verified, margins = bj.interval(function)(ball, rows).lower, estimate.lower_estimate
        result = _WalkResult(
            verified,
            verified,
            margins,
            aux.rows,
            aux.worst_input,
            coefficients=None,
            pre_activations=aux.pre_activations,
            slopes={},
        )
        return _relaxed(margins, ball, result)

    return bound


def one_step_slopes(setting: Setting) -> Callable[..., Any]:
    """Optimises random slopes by signed-gradient steps on the training loss (Lee et al. 2021)."""
    relaxation = setting.config.relaxation

    def slopes_of(coefficients: Coefficients, interval: jax.Array, key: jax.Array) -> Any:
        def objective(margins: jax.Array) -> jax.Array:
            return robust_cross_entropy(
                (1.0 - coefficients.beta) * interval + coefficients.beta * margins
            )

        return bj.optimized(
            relaxation.steps,
            learning_rate=relaxation.step_size,
            start=bj.slopes.uniform(key),
            objective=objective,
        )

    return slopes_of


def fixed_slopes(slopes: Any) -> Callable[..., Any]:
    """Uses the same policy for every image."""
    return lambda coefficients, interval, key: slopes


def drawn_slopes(policy: Callable[[jax.Array], Any]) -> Callable[..., Any]:
    """Uses a policy that draws slopes, from a new key for every image and step."""
    return lambda coefficients, interval, key: policy(key)


def no_certificate(margins: jax.Array) -> jax.Array:
    """Returns minus infinity for every margin, so that none is verified."""
    return jnp.full_like(margins, -jnp.inf)

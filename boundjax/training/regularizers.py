"""Regularizers of certified training: functions of bounds, of margins and of parameters.

`pre_activations` maps the label of an op to bounds on its input, as the transforms return them with
`has_aux`. Every function treats all of its labels as ReLUs, so leave out those of other ops.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from boundjax.sets.interval import Interval

PreActivations = Mapping[str, Interval]


class RELUStates(NamedTuple):
    """The fractions of a network's ReLUs in each state; they add up to 1."""

    active: Float[Array, ""]
    unstable: Float[Array, ""]
    dead: Float[Array, ""]


def _layers(pre_activations: PreActivations) -> list[Interval]:
    if not pre_activations:
        raise ValueError("pre_activations must hold the bounds of at least one ReLU, got none")
    return list(pre_activations.values())


def _sum(values: Array) -> Array:
    """The sum of all elements as a matrix product: XLA's CPU backend is far slower at sums."""
    rows = values.reshape(len(values), math.prod(values.shape[1:]))
    return jnp.sum(rows @ jnp.ones((rows.shape[1],), rows.dtype))


def _total(terms: Sequence[Array]) -> Array:
    """The sum of at least one array."""
    return functools.reduce(operator.add, terms)


def _mean(values: Array) -> Array:
    return _sum(values) / values.size


def _require_tolerance(tau: float) -> None:
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")


def _shortfall(part: Array, whole: Array, tau: float) -> Array:
    """`relu(tau - part / whole) / tau` for `part, whole >= 0`; 0 for `0 / 0`, NaN for NaN."""
    # Divide only where the penalty is positive, and by numbers near 1: 0 * inf would spoil the
    # gradient.
    short = ~(part >= tau * whole)
    whole = jnp.where(short, whole, 1.0)
    scale = jax.lax.stop_gradient(whole)
    return jnp.where(short, 1.0 - (part / scale) / (tau * (whole / scale)), 0.0)


def tightness_loss(
    input_interval: Interval, pre_activations: PreActivations, tau: float = 0.5
) -> Float[Array, ""]:
    """Penalty on bounds that widen from the input to the ReLUs.

        (1 / n) sum_i relu(tau - Delta_0 / Delta_i) / tau

    Here `Delta_0` is the mean half-width of the input box and `Delta_i` the mean half-width before
    ReLU `i`, over the batch and all units. A layer whose bounds are points adds nothing, so the
    value at radius 0 is 0; the authors evaluate it at radius 1e-6 before their ramp begins.

    Args:
      input_interval: the input box, cut to the valid range, `[B, *input]`; in the units that the
        first layer reads, that is after a normalization.
      pre_activations: label -> bounds `[B, *shape]`.
      tau: tolerance in `(0, 1]`; bounds may widen by `1 / tau` without penalty.

    Returns:
      A scalar in `[0, 1]`. NaN where a bound is NaN.

    Raises:
      ValueError: for a `tau` outside `(0, 1]`, or no ReLUs.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", eq. 7.
    """
    _require_tolerance(tau)
    layers = _layers(pre_activations)
    input_radius = _mean(input_interval.radius)
    terms = [_shortfall(input_radius, _mean(layer.radius), tau) for layer in layers]
    return jnp.mean(jnp.stack(terms))


def relu_balance_loss(pre_activations: PreActivations, tau: float = 0.5) -> Float[Array, ""]:
    """Penalty on ReLUs that are nearly all active or nearly all inactive.

        (1 / n) sum_i [relu(tau - min(alpha_i, 1 / alpha_i)) + relu(tau - min(beta_i, 1 / beta_i))]
                      / tau

    Let `c = (l + u) / 2` over the whole batch and all units of layer `i`. Then `alpha_i` is the sum
    of `c` over active units (`l > 0`) divided by the sum of `-c` over inactive units (`u < 0`), and
    `beta_i` is the same ratio of the sums of `(c - mean c)^2`. A layer without an active or without
    an inactive unit adds nothing.

    Args:
      pre_activations: label -> bounds `[B, *shape]`.
      tau: tolerance in `(0, 1]`; ratios between `tau` and `1 / tau` have no penalty.

    Returns:
      A scalar in `[0, 2]`. NaN where a bound is NaN.

    Raises:
      ValueError: for a `tau` outside `(0, 1]`, or no ReLUs.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", eq. 8.
    """
    _require_tolerance(tau)
    terms = []
    for lower, upper in _layers(pre_activations):
        active, inactive = lower > 0, upper < 0
        center = 0.5 * (lower + upper)
        mean = _mean(center)
        deviation = jnp.square(center - mean)
        penalty = [
            _imbalance(values, active, inactive, tau) for values in (jnp.abs(center), deviation)
        ]
        both = jnp.any(active) & jnp.any(inactive)
        otherwise = jnp.where(jnp.isnan(mean), jnp.nan, 0.0)
        terms.append(jnp.where(both, penalty[0] + penalty[1], otherwise))
    return jnp.mean(jnp.stack(terms))


def _imbalance(values: Array, active: Array, inactive: Array, tau: float) -> Array:
    """`relu(tau - min(ratio, 1 / ratio)) / tau` of the sums over active and inactive units."""
    first = _sum(jnp.where(active, values, 0.0))
    second = _sum(jnp.where(inactive, values, 0.0))
    return _shortfall(jnp.minimum(first, second), jnp.maximum(first, second), tau)


def relu_stability_loss(pre_activations: PreActivations) -> Float[Array, ""]:
    """Penalty on unstable ReLUs: the sum over units of `-tanh(1 + l u)`, averaged over the batch.

    `l u` is negative exactly at unstable units.

    Args:
      pre_activations: label -> bounds `[B, *shape]`.

    Returns:
      A scalar, in absolute value at most the number of units. NaN where a bound is NaN.

    Raises:
      ValueError: for no ReLUs.

    Source: Xiao et al. 2019, "Training for Faster Adversarial Robustness Verification via Inducing
    ReLU Stability" (RS loss).
    """
    layers = _layers(pre_activations)
    total = _total([_sum(-jnp.tanh(1.0 + lower * upper)) for lower, upper in layers])
    return total / layers[0].lower.shape[0]


def gap_to_attained(
    margins: Float[Array, "*B m"], attained: Float[Array, "*B m"]
) -> Float[Array, "*B m"]:
    """How far a lower bound on a margin lies below the network's margin: REG's `d`.

    `d = c^T f(x + delta_0) - p`, where `p` is the relaxation's lower bound on the margin `c^T f`
    and `x + delta_0` the input at which the relaxation attains it (`worst_input` of
    `linear(..., has_aux=True)`). It is nonnegative up to rounding, as `p` bounds the margin of
    every input, and 0 where the relaxation is tight.

    Args:
      margins: `[..., m]`, lower bounds of one relaxation (`aux.linear.lower`).
      attained: `[..., m]`, the network's margins at the worst input of each.

    Returns:
      `[..., m]`.

    Raises:
      ValueError: if the shapes differ.

    Source: "Improved Training of Certifiably Robust Models" (ICLR 2020 submission), eq. 2.
    """
    if margins.shape != attained.shape:
        raise ValueError(
            "margins and attained must have one shape [..., m], got "
            f"{margins.shape} and {attained.shape}"
        )
    return attained - margins


def relaxation_slack(
    pre_activations: PreActivations,
    values: Mapping[str, Float[Array, "m ..."]],
    rows: Mapping[str, Float[Array, "m ..."]],
) -> Float[Array, " m"]:
    """How far the network's pre-activations lie from where its relaxation is exact: REG's `r`.

    Fast-Lin relaxes an unstable ReLU to `z = s x + delta` with `s = u / (u - l)` and `0 <= delta <=
    -s l`. A lower bound minimises `row * z + ...`. Where the row is `>= 0` it takes `delta = 0`,
    the line through the origin, which meets the ReLU at `x = 0` only. Where the row is negative it
    takes `delta = -s l`, the chord, which meets the ReLU at `l` and `u`. (An upper bound is the
    lower bound of the negated rows.) With `x'` the network's pre-activations at the worst input of
    margin `t`,

        r_t = [sum_(row >= 0) |x'| + sum_(row < 0) min(|x' - l|, |x' - u|)] / #unstable

    over the unstable units of all layers; stable units are exact and add nothing. The bound is
    tight if `r_t = 0`.

    Gradients flow through `values` and, at the chords, through the bounds `l` and `u`. The set of
    unstable units, its size and the signs of the rows are constants.

    Args:
      pre_activations: label -> bounds `[*shape]`, of one example.
      values: label -> `[m, *shape]`, pre-activations at the worst input of each of the m margins.
      rows: label -> `[m, *shape]`, the coefficients of margin `t`'s lower bound on the ReLU's
        output, `c_t^T W_(L:i+1)`.

    Returns:
      `[m]`; 0 without unstable units.

    Raises:
      ValueError: if the labels or the shapes do not match, or there are no ReLUs.

    Source: "Improved Training of Certifiably Robust Models" (ICLR 2020 submission), eq. 3.
    """
    _layers(pre_activations)
    if not set(pre_activations) == set(values) == set(rows):
        raise ValueError(
            "pre_activations, values and rows must have the same labels, got "
            f"{sorted(pre_activations)}, {sorted(values)} and {sorted(rows)}"
        )
    totals, counts = [], []
    for label, (lower, upper) in pre_activations.items():
        x, row = values[label], rows[label]
        if x.shape != row.shape or x.shape[1:] != lower.shape:
            raise ValueError(
                f"{label}: values and rows must have the shape [m, *{lower.shape}] of its bounds, "
                f"got {x.shape} and {row.shape}"
            )
        stable = (lower >= 0) | (upper <= 0)
        on_chord = jnp.minimum(_size(x - lower[None]), _size(x - upper[None]))
        distance = jnp.where(row < 0, on_chord, _size(x))
        # A NaN bound or row must show even where the distance does not depend on it.
        unknown = jnp.isnan(row) | jnp.isnan(lower + upper)[None]
        distance = jnp.where(unknown, jnp.nan, distance)
        distance = jnp.where(stable[None], 0.0, distance)
        totals.append(jnp.sum(distance, axis=tuple(range(1, x.ndim))))
        counts.append(jnp.sum(~stable))
    total = _total(totals)
    return total / jnp.maximum(_total(counts), 1).astype(total.dtype)


def l1_norm(params: PyTree, kernels_only: bool = True) -> Float[Array, ""]:
    """The sum of the absolute values of a model's weights.

    Args:
      params: a pytree of parameters.
      kernels_only: count only the leaves named `kernel` (of dense and convolution layers), no
        biases or scales.

    Returns:
      A scalar.

    Raises:
      ValueError: if there is no weight to count.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    counted = [leaf for path, leaf in leaves if not kernels_only or _is_kernel(path)]
    if not counted:
        raise ValueError(
            f"params hold no {'kernel' if kernels_only else 'leaf'}, "
            f"got {[jax.tree_util.keystr(path) for path, _ in leaves]}"
        )
    return _total([jnp.sum(_size(leaf)) for leaf in counted])


def _size(values: Array) -> Array:
    """`|values|`, with derivative 0 at 0, so that optimal values stay (`jnp.abs` has 1)."""
    return values * jax.lax.stop_gradient(jnp.sign(values))


def _is_kernel(path: tuple[Any, ...]) -> bool:
    # NNX variables add an attribute `value` after the name.
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1:] == ["kernel"]


def relu_states(pre_activations: PreActivations, dead_margin: float = 0.0) -> RELUStates:
    """Fractions of all ReLUs, over the batch and all layers, that are active, unstable or dead.

    A ReLU is dead if `u <= dead_margin`, otherwise active if `l >= 0`, otherwise unstable; NaN
    counts as unstable.

    Args:
      pre_activations: label -> bounds of any shape.
      dead_margin: upper bounds up to this value count as 0, in units of the pre-activation.

    Returns:
      Three scalars that add up to 1.

    Raises:
      ValueError: for no ReLUs, or a `dead_margin` that is negative or NaN.
    """
    if not dead_margin >= 0:
        raise ValueError(f"dead_margin must be >= 0, got {dead_margin}")
    layers = _layers(pre_activations)
    dtype = layers[0].lower.dtype
    size = sum(layer.lower.size for layer in layers)
    dead = _total([_sum((upper <= dead_margin).astype(dtype)) for _, upper in layers]) / size
    active = _total(
        [_sum(((lower >= 0) & (upper > dead_margin)).astype(dtype)) for lower, upper in layers]
    )
    active = active / size
    return RELUStates(active, 1.0 - active - dead, dead)

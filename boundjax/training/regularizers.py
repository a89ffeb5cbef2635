"""Regularizers of certified training: functions of bounds, of margins and of parameters.

`pre_activations` is what the transforms' `has_aux` returns: label of an op -> bounds on its input.
Every function takes all labels that it is given for ReLUs; leave out those of other ops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from boundjax.sets.interval import Interval

PreActivations = Mapping[str, Interval]


class RELUStates(NamedTuple):
    """The parts of a network's ReLUs in each state; they add up to 1."""

    active: jax.Array
    unstable: jax.Array
    dead: jax.Array


def _layers(pre_activations: PreActivations) -> list[Interval]:
    if not pre_activations:
        raise ValueError("pre_activations must hold the bounds of at least one ReLU, got none")
    return list(pre_activations.values())


def _sum(values: jax.Array) -> jax.Array:
    """Of all elements, as a matrix product: XLA's CPU backend is far slower at sums."""
    rows = values.reshape(len(values), math.prod(values.shape[1:]))
    return jnp.sum(rows @ jnp.ones((rows.shape[1],), rows.dtype))


def _mean(values: jax.Array) -> jax.Array:
    return _sum(values) / values.size


def _require_tolerance(tau: float) -> None:
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")


def _shortfall(part: jax.Array, whole: jax.Array, tau: float) -> jax.Array:
    """`relu(tau - part / whole) / tau` for `part, whole >= 0`; 0 for `0 / 0`, NaN for NaN."""
    # Dividing only where the penalty is positive, and by numbers near 1, keeps the gradient free of
    # 0 * inf.
    short = ~(part >= tau * whole)
    whole = jnp.where(short, whole, 1.0)
    scale = jax.lax.stop_gradient(whole)
    return jnp.where(short, 1.0 - (part / scale) / (tau * (whole / scale)), 0.0)


def tightness_loss(
    input_interval: Interval, pre_activations: PreActivations, tau: float = 0.5
) -> jax.Array:
    """Penalty on bounds that widen from the input to the ReLUs.

        (1 / n) sum_i relu(tau - Delta_0 / Delta_i) / tau

    with `Delta_0` the mean half-width of the input box and `Delta_i` the mean half-width before
    ReLU `i`, over the batch and all units. A layer whose bounds are points adds nothing, so the
    value at radius 0 is 0; the authors evaluate it at radius 1e-6 before their ramp begins.

    Args:
      input_interval: the input box, cut to the valid range, `[B, *input]`; in the units of the
        first layer's weights, that is behind a normalization.
      pre_activations: label -> bounds `[B, *shape]`.
      tau: tolerance in `(0, 1]`; bounds may widen by `1 / tau` free of charge.

    Returns:
      A scalar in `[0, 1]`. NaN where a bound is NaN.

    Raises:
      ValueError: for a `tau` outside `(0, 1]`, or no ReLUs.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", eq. 7.
    """
    _require_tolerance(tau)
    layers = _layers(pre_activations)
    given = _mean(input_interval.radius)
    terms = [_shortfall(given, _mean(layer.radius), tau) for layer in layers]
    return jnp.mean(jnp.stack(terms))


def relu_balance_loss(pre_activations: PreActivations, tau: float = 0.5) -> jax.Array:
    """Penalty on ReLUs that are nearly all active or nearly all inactive.

        (1 / n) sum_i [relu(tau - min(alpha_i, 1 / alpha_i)) + relu(tau - min(beta_i, 1 / beta_i))]
                      / tau

    With `c = (l + u) / 2` over the whole batch and all units of layer `i`, `alpha_i` is the sum of
    `c` over active units (`l > 0`) divided by the sum of `-c` over inactive ones (`u < 0`), and
    `beta_i` the same ratio of the sums of `(c - mean c)^2`. A layer without an active or without
    an inactive unit adds nothing.

    Args:
      pre_activations: label -> bounds `[B, *shape]`.
      tau: tolerance in `(0, 1]`; ratios between `tau` and `1 / tau` are free of charge.

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


def _imbalance(values: jax.Array, active: jax.Array, inactive: jax.Array, tau: float) -> jax.Array:
    """`relu(tau - min(ratio, 1 / ratio)) / tau` of the sums over active and inactive units."""
    first = _sum(jnp.where(active, values, 0.0))
    second = _sum(jnp.where(inactive, values, 0.0))
    return _shortfall(jnp.minimum(first, second), jnp.maximum(first, second), tau)


def relu_stability_loss(pre_activations: PreActivations) -> jax.Array:
    """Penalty on unstable ReLUs: the sum over units of `-tanh(1 + l u)`, averaged over the batch.

    `l u` is negative exactly at unstable units.

    Args:
      pre_activations: label -> bounds `[B, *shape]`.

    Returns:
      A scalar between minus and plus the number of units. NaN where a bound is NaN.

    Raises:
      ValueError: for no ReLUs.

    Source: Xiao et al. 2019, "Training for Faster Adversarial Robustness Verification via Inducing
    ReLU Stability" (RS loss).
    """
    layers = _layers(pre_activations)
    total = sum(_sum(-jnp.tanh(1.0 + lower * upper)) for lower, upper in layers)
    return total / layers[0].lower.shape[0]


def gap_to_attained(margins: jax.Array, attained: jax.Array) -> jax.Array:
    """How far a lower bound on a margin lies below what the network attains: REG's `d`.

    `d = c^T f(x + delta_0) - p`, with `p` the relaxation's lower bound on the margin `c^T f` and
    `x + delta_0` the input where the relaxation attains it (`worst_input` of
    `linear(..., has_aux=True)`). Not negative but for rounding, as `p` bounds the margin of every
    input; 0 where the relaxation is tight.

    Args:
      margins: `[..., m]`, lower bounds, one relaxation's (`aux.linear.lower`).
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
    values: Mapping[str, jax.Array],
    rows: Mapping[str, jax.Array],
) -> jax.Array:
    """How far the network's pre-activations lie from where its relaxation is exact: REG's `r`.

    Fast-Lin relaxes an unstable ReLU to `z = s x + delta` with `s = u / (u - l)` and `0 <= delta <=
    -s l`. A lower bound minimises `row * z + ...`, so it takes `delta = 0` where the row is `>= 0`:
    the line through the origin, which meets the ReLU at `x = 0` only; and `delta = -s l` where the
    row is negative: the chord, which meets it at `l` and `u`. (An upper bound is the lower bound of
    the negated rows.) With `x'` the network's own pre-activations at the worst input of margin `t`,

        r_t = [sum_(row >= 0) |x'| + sum_(row < 0) min(|x' - l|, |x' - u|)] / #unstable

    over the unstable units of all layers; stable units are exact and add nothing. `r_t = 0` makes
    the bound tight.

    Gradients flow through `values` and, at the chords, through the bounds `l` and `u`; which
    units are unstable, the signs of the rows and the number of units are constants.

    Args:
      pre_activations: label -> bounds `[*shape]`, of one example.
      values: label -> `[m, *shape]`, pre-activations at the worst input of each of the m margins.
      rows: label -> `[m, *shape]`, the coefficients of the lower bound of margin `t` on the ReLU's
        output, `c_t^T W_(L:i+1)`.

    Returns:
      `[m]`; 0 without unstable units.

    Raises:
      ValueError: if the labels or the shapes do not belong together, or there are no ReLUs.

    Source: "Improved Training of Certifiably Robust Models" (ICLR 2020 submission), eq. 3.
    """
    _layers(pre_activations)
    if not set(pre_activations) == set(values) == set(rows):
        raise ValueError(
            "pre_activations, values and rows must have the same labels, got "
            f"{sorted(pre_activations)}, {sorted(values)} and {sorted(rows)}"
        )
    total, count = 0.0, 0
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
        # Where nothing is compared with a bound or a row, its NaN must show all the same.
        unknown = jnp.isnan(row) | jnp.isnan(lower + upper)[None]
        distance = jnp.where(unknown, jnp.nan, distance)
        distance = jnp.where(stable[None], 0.0, distance)
        total = total + jnp.sum(distance, axis=tuple(range(1, x.ndim)))
        count = count + jnp.sum(~stable)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def l1_norm(params: Any, kernels_only: bool = True) -> jax.Array:
    """The sum of the absolute values of a model's weights.

    Args:
      params: a pytree of parameters.
      kernels_only: count the leaves named `kernel` only (of dense and convolution layers), and not
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
    return sum(jnp.sum(_size(leaf)) for leaf in counted)


def _size(values: jax.Array) -> jax.Array:
    """`|values|`, with derivative 0 at 0: what is where it should be stays (`jnp.abs` has 1)."""
    return values * jax.lax.stop_gradient(jnp.sign(values))


def _is_kernel(path: tuple[Any, ...]) -> bool:
    # The variables of NNX add an attribute `value` after the name.
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1:] == ["kernel"]


def relu_states(pre_activations: PreActivations, dead_margin: float = 0.0) -> RELUStates:
    """The parts of all ReLUs, over the batch and all layers, that are active, unstable or dead.

    Dead: `u <= dead_margin`; else active: `l >= 0`; else unstable, which is also where NaN counts.

    Args:
      pre_activations: label -> bounds of any shape.
      dead_margin: upper bounds up to here count as 0, in units of the pre-activation.

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
    dead = sum(_sum((upper <= dead_margin).astype(dtype)) for _, upper in layers) / size
    active = sum(
        _sum(((lower >= 0) & (upper > dead_margin)).astype(dtype)) for lower, upper in layers
    )
    active = active / size
    return RELUStates(active, 1.0 - active - dead, dead)

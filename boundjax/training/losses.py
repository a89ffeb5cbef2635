"""Losses of certified training: functions of logits and of bounds on the margins."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from boundjax.numerics import with_derivative_of
from boundjax.sets.interval import Interval


def cross_entropy(logits: Float[Array, "*B C"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Cross-entropy `log sum_m exp(z_m) - z_y` of each example.

    Args:
      logits: `[..., C]`.
      labels: int `[...]`, in `[0, C)`.

    Returns:
      `[...]`.

    Raises:
      ValueError: if the shapes do not match.
    """
    _require_labels(logits, labels)
    label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - label_logit


def margins_of(logits: Float[Array, "*B C"], labels: Int[Array, "*B"]) -> Float[Array, "*B C-1"]:
    """The margins `z_y - z_m` of each example over the other classes.

    Args:
      logits: `[..., C]`.
      labels: int `[...]`, in `[0, C)`.

    Returns:
      `[..., C - 1]`, for `m = y + 1, ..., y + C - 1 (mod C)`: the order of the rows of
      `boundjax.margin_specification(labels, C, rows="others")`, and so of bounds on them.

    Raises:
      ValueError: if the shapes do not match.
    """
    _require_labels(logits, labels)
    classes = logits.shape[-1]
    steps = jnp.arange(1, classes, dtype=labels.dtype).reshape((1,) * labels.ndim + (-1,))
    rival_logits = jnp.take_along_axis(logits, (labels[..., None] + steps) % classes, axis=-1)
    return jnp.take_along_axis(logits, labels[..., None], axis=-1) - rival_logits


def _require_labels(logits: Array, labels: Array) -> None:
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits [..., C] and labels [...] must agree, got {logits.shape} and {labels.shape}"
        )


def robust_cross_entropy(margins: Float[Array, "*B C-1"]) -> Float[Array, "*B"]:
    """Upper bound on the worst cross-entropy, `log(1 + sum_{m != y} exp(-margin_m))`.

    Cross-entropy grows with every difference `z_m - z_y`, so lower bounds on the margins `z_y -
    z_m` over the input set give an upper bound on its maximum there.

    Args:
      margins: `[..., C - 1]`, lower bounds on `z_y - z_m` over `m != y`.

    Returns:
      `[...]`. NaN where a margin is NaN.

    Raises:
      ValueError: if `margins` is a scalar.
    """
    if margins.ndim == 0:
        raise ValueError("margins must have the shape [..., C - 1], got a scalar")
    zero = jnp.zeros((*margins.shape[:-1], 1), margins.dtype)  # the true class against itself
    return jax.nn.logsumexp(jnp.concatenate([zero, -margins], axis=-1), axis=-1)


def fused_robust_cross_entropy(
    margins: Interval, lower_bound: Callable[[Float[Array, " C-1"]], Float[Array, ""]]
) -> Float[Array, ""]:
    """Upper bound on the worst cross-entropy from one backward row instead of one per class.

    On the interval of every `s_m = -margin_m` the exponential lies below its chord, `exp(s) <= k_m
    s + d_m`. The sum of the exponentials is thus bounded by one linear function of the margins,
    whose bound needs one row (loss fusion, Xu et al. 2020, "Automatic Perturbation Analysis").
    The bound is cheaper than `robust_cross_entropy` by the number of classes. It is looser, the
    more so the wider the intervals are, but never below the true worst case.

    Args:
      margins: interval bounds `[m]` on the margins of one example (`boundjax.interval`).
      lower_bound: weights `[m]` -> a lower bound (a scalar) on `<weights, margins>` over the input
        set, for example `lambda w: linear(f, sides="lower")(ball, (w @ rows)[None]).lower[0]`.

    Returns:
      A scalar. NaN where a bound is NaN.
    """
    low, high = -margins.upper, -margins.lower
    shift = jnp.maximum(jnp.max(high, initial=0.0), 0.0)
    at_low, at_high = jnp.exp(low - shift), jnp.exp(high - shift)
    width = high - low
    narrow = width < 1e-4
    # Any slope is sound with the larger of the two ends' intercepts, so rounding only loosens it.
    slopes = jnp.where(narrow, at_high, (at_high - at_low) / jnp.where(narrow, 1.0, width))
    at_ends = at_low - slopes * low, at_high - slopes * high
    intercepts = with_derivative_of(jnp.maximum(*at_ends), at_ends[1])
    total = jnp.exp(-shift) + jnp.sum(intercepts) - lower_bound(slopes)
    return shift + jnp.log(total)


def mixed_objective(
    logits: Float[Array, "B C"],
    labels: Int[Array, " B"],
    interval_margins: Float[Array, "B C-1"],
    linear_margins: Float[Array, "B C-1"],
    kappa: Float[Array, ""] | float,
    beta: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """The objective of CROWN-IBP (Zhang et al. 2020) and its successors, averaged over the batch.

        kappa CE(z, y) + (1 - kappa) robust CE((1 - beta) interval margins + beta linear margins).

    With kappa = beta = 0 this is IBP training; with kappa = 0 and beta = 1 it trains on the linear
    bounds alone.

    Args:
      logits: `[B, C]`, on the clean inputs.
      labels: int `[B]`.
      interval_margins: `[B, C - 1]`, lower bounds on the margins by interval propagation.
      linear_margins: `[B, C - 1]`, lower bounds on the same margins by linear bounds, not
        intersected.
      kappa: weight of the natural loss, in `[0, 1]`.
      beta: weight of the linear margins, in `[0, 1]`.

    Returns:
      A scalar.

    Raises:
      ValueError: if the shapes do not match.
    """
    if interval_margins.shape != linear_margins.shape:
        raise ValueError(
            "interval and linear margins must have one shape, got "
            f"{interval_margins.shape} and {linear_margins.shape}"
        )
    if interval_margins.ndim == 0 or interval_margins.shape[:-1] != labels.shape:
        raise ValueError(
            "margins [B, C - 1] and labels [B] must agree, got "
            f"{interval_margins.shape} and {labels.shape}"
        )
    margins = (1.0 - beta) * interval_margins + beta * linear_margins
    natural = jnp.mean(cross_entropy(logits, labels))
    robust = jnp.mean(robust_cross_entropy(margins))
    return kappa * natural + (1.0 - kappa) * robust

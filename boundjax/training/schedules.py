"""Schedules of the training radius and of the weights that follow it.

Every schedule is a pure function of the global step, so that a resumed run continues exactly where
it stopped. `step` may be a Python integer or a traced int32 scalar; the result is a float32 scalar.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Num

Scalar = Num[Array, ""] | float | int


def _check_ramp(start: int, end: int, eps_max: float) -> None:
    if not 0 <= start <= end:
        raise ValueError(f"a ramp needs 0 <= start <= end (steps), got start={start}, end={end}")
    if not eps_max >= 0:
        raise ValueError(f"eps_max must be >= 0, got {eps_max}")


def _ramp_fraction(step: Scalar, start: int, end: int) -> Array:
    """`clip((step - start) / (end - start), 0, 1)`; an empty ramp jumps at `start`."""
    # Subtracting the integers first keeps the difference exact for steps beyond 2**24.
    passed = (jnp.asarray(step, jnp.int32) - start).astype(jnp.float32)
    if end == start:
        return (passed >= 0.0).astype(jnp.float32)
    return jnp.clip(passed / float(end - start), 0.0, 1.0)


def linear_schedule(step: Scalar, start: int, end: int, eps_max: float) -> Float32[Array, ""]:
    """Linear ramp `eps(t) = eps_max * clip((t - start) / (end - start), 0, 1)`.

    Args:
      step: global step `t`.
      start: last step with radius 0; an empty ramp, `start == end`, jumps at `start`.
      end: first step with radius `eps_max`.
      eps_max: the final radius, in the units of the input.

    Returns:
      The radius at `step`, a float32 scalar.

    Raises:
      ValueError: if not `0 <= start <= end`, or `eps_max` is negative or NaN.
    """
    _check_ramp(start, end, eps_max)
    return eps_max * _ramp_fraction(step, start, end)


def smoothed_schedule(
    step: Scalar,
    start: int,
    end: int,
    eps_max: float,
    mid: float = 0.25,
    exponent: int = 4,
) -> Float32[Array, ""]:
    """Ramp that follows a power of `t` up to `mid` and then its tangent line.

    With `m = start + int(mid * (end - start))` and `e = exponent`,

        eps(t) = eps_m ((t - start) / (m - start))**e                          for t < m,
        eps(t) = eps_m + (eps_max - eps_m) (t - m) / (end - m)                 for m <= t < end,
        eps_m  = eps_max (m - start) / (e (end - m) + (m - start)).

    This is the schedule of "Fast Certified Robust Training with Short Warmup" (and of the large
    models of CROWN-IBP), with the powers of large step counts cancelled.

    Args:
      step: global step `t`.
      start: last step with radius 0.
      end: first step with radius `eps_max`.
      eps_max: the final radius, in the units of the input.
      mid: fraction of the ramp that follows the power, in `[0, 1)`.
      exponent: the power `e >= 1`.

    Returns:
      The radius at `step`, a float32 scalar.

    Raises:
      ValueError: if the ramp is malformed, `mid` is outside `[0, 1)` or `exponent < 1`.
    """
    _check_ramp(start, end, eps_max)
    if not 0.0 <= mid < 1.0:
        raise ValueError(f"mid must lie in [0, 1), got {mid}")
    if not exponent >= 1:
        raise ValueError(f"exponent must be >= 1, got {exponent}")
    middle = start + int(mid * (end - start))
    if middle == start:  # no room for the curved part
        return linear_schedule(step, start, end, eps_max)
    eps_middle = eps_max * (middle - start) / (exponent * (end - middle) + (middle - start))
    curved = eps_middle * _ramp_fraction(step, start, middle) ** exponent
    straight = (eps_max - eps_middle) * _ramp_fraction(step, middle, end)
    # The sum may miss eps_max by a rounding, but callers compare with eps_max to detect the end of
    # the ramp.
    return jnp.where(jnp.asarray(step, jnp.int32) >= end, jnp.float32(eps_max), curved + straight)


def stairs_schedule(
    step: Scalar, steps_per_epoch: int, epochs: int, eps_start: float, eps_max: float
) -> Float32[Array, ""]:
    """One radius per epoch: `epochs` evenly spaced values from `eps_start` to `eps_max` inclusive.

    This is the schedule of CAP (Wong & Kolter 2018) and of "Improved Training of Certifiably Robust
    Models". There is no epoch at radius 0, and epoch `epochs - 1` already has `eps_max`.

    Args:
      step: global step.
      steps_per_epoch: length of an epoch, `>= 1`.
      epochs: number of epochs of the ramp, `>= 0`; after them the radius is `eps_max`.
      eps_start: the radius of the first epoch, in the units of the input.
      eps_max: the final radius.

    Returns:
      The radius at `step`, a float32 scalar.

    Raises:
      ValueError: if a length is out of bounds, or not `0 <= eps_start <= eps_max`.
    """
    if not (steps_per_epoch >= 1 and epochs >= 0):
        raise ValueError(
            "stairs_schedule needs steps_per_epoch >= 1 and epochs >= 0, got "
            f"steps_per_epoch={steps_per_epoch}, epochs={epochs}"
        )
    if not 0 <= eps_start <= eps_max:
        raise ValueError(
            f"stairs_schedule needs 0 <= eps_start <= eps_max, got {eps_start} and {eps_max}"
        )
    radii = np.append(np.linspace(eps_start, eps_max, epochs), eps_max)
    epoch = jnp.asarray(step, jnp.int32) // steps_per_epoch
    return jnp.asarray(radii, jnp.float32)[jnp.clip(epoch, 0, epochs)]


def eps_dependent(eps: Scalar, eps_max: float, initial: float, final: float) -> Float32[Array, ""]:
    """A weight that follows the radius: `initial - (eps / eps_max) (initial - final)`.

    CROWN-IBP and its successors use it for kappa (weight of the natural loss) and beta (weight of
    the linear bounds against the interval bounds). Shi et al. 2021 use it for weights of
    regularizers, from `initial` to 0; so does "Improved Training of Certifiably Robust Models",
    from 0 to `final`. With `eps_max == 0` the weight stays at `initial`.

    Args:
      eps: current radius, between 0 and `eps_max`.
      eps_max: the final radius.
      initial: the weight at radius 0.
      final: the weight at `eps_max`, returned exactly there.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: if `eps_max` is negative or NaN.
    """
    if not eps_max >= 0:
        raise ValueError(f"eps_max must be >= 0, got {eps_max}")
    eps = jnp.asarray(eps, jnp.float32)
    if eps_max == 0:
        return jnp.full_like(eps, initial)
    weight = initial - (eps / eps_max) * (initial - final)
    # At the end of the ramp beta must be exactly 0: the train step then skips the linear walk.
    return jnp.where(eps >= jnp.float32(eps_max), jnp.float32(final), weight)

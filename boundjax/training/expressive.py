"""Losses between an attack's lower and interval bounds' upper bound on the worst case.

`alpha` weighs the interval bounds: 0 is adversarial training, 1 is IBP.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from boundjax.sets.box import Box
from boundjax.sets.checks import require_clip, require_radius


def _require_one_shape(first: tuple[str, jax.Array], second: tuple[str, jax.Array]) -> None:
    if first[1].shape != second[1].shape:
        raise ValueError(
            f"{first[0]} and {second[0]} must have one shape, got "
            f"{first[1].shape} and {second[1].shape}"
        )


def mtl_ibp_loss(
    adversarial_ce: jax.Array, ibp_ce: jax.Array, alpha: jax.Array | float
) -> jax.Array:
    """MTL-IBP: `(1 - alpha) CE_adv + alpha CE_IBP`, per example.

    Args:
      adversarial_ce: `[B]`, the cross-entropy at adversarial (or natural) inputs.
      ibp_ce: `[B]`, `robust_cross_entropy` of interval margins.
      alpha: weight of the interval bounds, in `[0, 1]`.

    Returns:
      `[B]`.

    Raises:
      ValueError: if the shapes differ.

    Source: De Palma et al. 2024, "Expressive Losses for Verified Robustness via Convex
    Combinations".
    """
    _require_one_shape(("adversarial_ce", adversarial_ce), ("ibp_ce", ibp_ce))
    return (1.0 - alpha) * adversarial_ce + alpha * ibp_ce


def exp_ibp_loss(
    adversarial_ce: jax.Array, ibp_ce: jax.Array, alpha: jax.Array | float
) -> jax.Array:
    """EXP-IBP: `CE_adv^(1 - alpha) CE_IBP^alpha`, per example, computed in logarithms.

    A cross-entropy that underflowed to 0 makes the product 0 (unless its exponent is 0), and there
    the gradient, of which powers below 1 have none at 0, is 0: the example has been learned.

    Args:
      adversarial_ce: `[B]`, the cross-entropy at adversarial inputs, `>= 0`.
      ibp_ce: `[B]`, `robust_cross_entropy` of interval margins, `>= 0`.
      alpha: weight of the interval bounds, in `[0, 1]`.

    Returns:
      `[B]`. NaN where a loss is NaN or negative.

    Raises:
      ValueError: if the shapes differ.

    Source: De Palma et al. 2024, "Expressive Losses for Verified Robustness via Convex
    Combinations".
    """
    _require_one_shape(("adversarial_ce", adversarial_ce), ("ibp_ce", ibp_ce))

    def log_power(base: jax.Array, exponent: jax.Array | float) -> jax.Array:
        # Subnormals count as 0: the derivative divides by the base.
        zero = jnp.abs(base) < jnp.finfo(base.dtype).tiny
        of_zero = jnp.where(jnp.asarray(exponent, base.dtype) > 0, -jnp.inf, 0.0)
        return jnp.where(zero, of_zero, exponent * jnp.log(jnp.where(zero, 1.0, base)))

    return jnp.exp(log_power(adversarial_ce, 1.0 - alpha) + log_power(ibp_ce, alpha))


def cc_ibp_margins(
    adversarial_margins: jax.Array, ibp_margins: jax.Array, alpha: jax.Array | float
) -> jax.Array:
    """CC-IBP: the margins `(1 - alpha) z_adv + alpha z_IBP`, whose robust cross-entropy is trained.

    Args:
      adversarial_margins: `[..., C - 1]`, `z_y - z_m` at adversarial inputs (`margins_of`).
      ibp_margins: `[..., C - 1]`, lower bounds on the same margins.
      alpha: weight of the interval bounds, in `[0, 1]`.

    Returns:
      `[..., C - 1]`, for `robust_cross_entropy`.

    Raises:
      ValueError: if the shapes differ.

    Source: De Palma et al. 2024, "Expressive Losses for Verified Robustness via Convex
    Combinations".
    """
    _require_one_shape(("adversarial_margins", adversarial_margins), ("ibp_margins", ibp_margins))
    return (1.0 - alpha) * adversarial_margins + alpha * ibp_margins


def small_box(
    adversarial: jax.Array,
    center: jax.Array,
    eps: ArrayLike,
    fraction: float,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    of_clipped: bool = False,
) -> Box:
    """SABR: a box of radius `fraction * eps` near an adversarial input, inside the ball around x.

    The box's middle is the adversarial input, projected to the l-infinity ball of radius
    `(1 - fraction) eps` around the center. No gradient flows to the adversarial input.

    Args:
      adversarial: an input, any shape.
      center: the unperturbed input, of the same shape.
      eps: radius in the units of the input, a scalar or an array of the input's shape.
      fraction: `lambda` of the paper, in `[0, 1]`; 0 is the adversarial input, 1 the whole ball.
      clip: `None` or `(low, high)`, the range of valid inputs, scalars or arrays of its shape.
      of_clipped: cut the ball to the clip range first, and take the fraction of the radii that are
        left, feature by feature, as the authors' code does; else the small box is cut at last.
        That differs at features within eps of the range's ends, so for most pixels of MNIST.

    Returns:
      A `Box` inside the ball and the clip range.

    Raises:
      ValueError: for different shapes, or a fraction, radius or clip range out of bounds.

    Source: Mueller et al. 2023, "Certified Training: Small Boxes are All You Need".
    """
    adversarial, center = jnp.asarray(adversarial), jnp.asarray(center)
    _require_one_shape(("adversarial", adversarial), ("center", center))
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    require_radius(eps)
    require_clip(clip)
    eps = _of_shape("eps", eps, center)
    low, high = (-jnp.inf, jnp.inf) if clip is None else clip
    low, high = _of_shape("clip[0]", low, center), _of_shape("clip[1]", high, center)
    lower, upper = center - eps, center + eps
    radius = fraction * eps
    if of_clipped:
        lower, upper = jnp.clip(lower, low, high), jnp.clip(upper, low, high)
        radius = (0.5 * fraction) * (upper - lower)
    adversarial = jax.lax.stop_gradient(adversarial)
    middle = jnp.clip(adversarial, lower + radius, upper - radius)
    # Rounding may lead past the ball's ends.
    ends = jnp.clip(middle - radius, lower, upper), jnp.clip(middle + radius, lower, upper)
    return Box(*(jnp.clip(end, low, high) for end in ends))


def _of_shape(name: str, value: ArrayLike, like: jax.Array) -> jax.Array:
    array = jnp.asarray(value, like.dtype)
    if array.ndim and array.shape != like.shape:
        raise ValueError(
            f"{name} must be a scalar or have the input's shape {like.shape}, got {array.shape}"
        )
    return jnp.broadcast_to(array, like.shape)


def rectified_link(
    latent: jax.Array, lower: jax.Array, upper: jax.Array, c: float = 0.5
) -> jax.Array:
    """TAPS: an attacked point of a latent box, with a gradient to the box's bounds.

    The value is `latent`, found by an attack that is not differentiated through. Its gradient is an
    estimator, not the derivative of any function: the weights of the two bounds fall linearly with
    the distance from them,

        d latent / d lower = max(0, 1 - |latent - lower| / (c (upper - lower))),
        d latent / d upper = max(0, 1 - |latent - upper| / (c (upper - lower))).

    Both are 1 / 2 where the box is a point. Nothing flows to `latent` itself.

    Args:
      latent: points of the box, any shape.
      lower: the box's lower bounds, of that shape.
      upper: its upper bounds, of that shape.
      c: the part of the width at which a bound's weight reaches 0, in `(0, 1]`; at most one of the
        bounds has a weight for `c <= 1 / 2`.

    Returns:
      `latent`. NaN where a bound is not finite.

    Raises:
      ValueError: for different shapes, or a `c` out of bounds.

    Source: Mao et al. 2023, "Connecting Certified and Adversarial Training".
    """
    _require_one_shape(("latent", latent), ("lower", lower))
    _require_one_shape(("latent", latent), ("upper", upper))
    if not 0.0 < c <= 1.0:
        raise ValueError(f"c must lie in (0, 1], got {c}")
    latent = jax.lax.stop_gradient(latent)
    at = jax.lax.stop_gradient((lower, upper))
    reach = c * (at[1] - at[0])
    a_point = ~(reach > 0)

    def term(bound: jax.Array, end: jax.Array) -> jax.Array:
        weight = 1.0 - jnp.abs(latent - end) / jnp.where(a_point, 1.0, reach)
        weight = jnp.where(a_point, 0.5, jnp.maximum(weight, 0.0))
        return weight * (bound - end)  # 0, but for its derivative

    return latent + term(lower, at[0]) + term(upper, at[1])


def scaled_product(ibp_loss: jax.Array, taps_loss: jax.Array, scale: float) -> jax.Array:
    """TAPS: the product `L_IBP L_TAPS`, whose gradient leans to the TAPS loss.

        grad = (2 - 2 a) L_TAPS grad L_IBP + 2 a L_IBP grad L_TAPS,   scale = a / (1 - a)

    so that `scale` is the weight of the TAPS path relative to the IBP path and 1 the ordinary
    gradient of the product. The authors' code uses the weights 1 and `scale` instead: the same
    direction, `(1 + scale) / 2` times as long, which matters beside other terms (an L1 norm, a
    natural loss) and to gradient clipping; multiply by that factor to have it.

    Args:
      ibp_loss: any shape; the authors multiply the means over the batch.
      taps_loss: the same shape.
      scale: `>= 0`.

    Returns:
      The product. NaN where a loss is not finite.

    Raises:
      ValueError: for different shapes, or a scale that is negative or not finite.

    Source: Mao et al. 2023, "Connecting Certified and Adversarial Training".
    """
    _require_one_shape(("ibp_loss", ibp_loss), ("taps_loss", taps_loss))
    if not 0.0 <= scale < float("inf"):
        raise ValueError(f"scale must be >= 0 and finite, got {scale}")

    def with_gradient_times(loss: jax.Array, weight: float) -> jax.Array:
        constant = jax.lax.stop_gradient(loss)
        return constant + weight * (loss - constant)

    return with_gradient_times(ibp_loss, 2.0 / (1.0 + scale)) * with_gradient_times(
        taps_loss, 2.0 * scale / (1.0 + scale)
    )

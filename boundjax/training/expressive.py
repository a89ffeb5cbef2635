"""Losses between an attack's lower bound and interval bounds' upper bound on the worst case.

`alpha` is the weight of the interval bounds: 0 gives adversarial training, 1 gives IBP.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from boundjax.sets.box import Box
from boundjax.sets.checks import require_clip, require_radius


def _require_one_shape(first: tuple[str, Array], second: tuple[str, Array]) -> None:
    if first[1].shape != second[1].shape:
        raise ValueError(
            f"{first[0]} and {second[0]} must have one shape, got "
            f"{first[1].shape} and {second[1].shape}"
        )


def mtl_ibp_loss(
    adversarial_ce: Float[Array, "*B"], ibp_ce: Float[Array, "*B"], alpha: Float[Array, ""] | float
) -> Float[Array, "*B"]:
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
    adversarial_ce: Float[Array, "*B"], ibp_ce: Float[Array, "*B"], alpha: Float[Array, ""] | float
) -> Float[Array, "*B"]:
    """EXP-IBP: `CE_adv^(1 - alpha) CE_IBP^alpha`, per example, computed in logarithms.

    A cross-entropy that underflowed to 0 makes the product 0 (unless its exponent is 0). The
    gradient is then set to 0, since powers below 1 have none at 0: the example has been learned.

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

    def log_power(base: Array, exponent: Array | float) -> Array:
        # Subnormals count as 0, because the derivative divides by the base.
        zero = jnp.abs(base) < jnp.finfo(base.dtype).tiny
        of_zero = jnp.where(jnp.asarray(exponent, base.dtype) > 0, -jnp.inf, 0.0)
        return jnp.where(zero, of_zero, exponent * jnp.log(jnp.where(zero, 1.0, base)))

    return jnp.exp(log_power(adversarial_ce, 1.0 - alpha) + log_power(ibp_ce, alpha))


def cc_ibp_margins(
    adversarial_margins: Float[Array, "*B C-1"],
    ibp_margins: Float[Array, "*B C-1"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, "*B C-1"]:
    """CC-IBP: margins `(1 - alpha) z_adv + alpha z_IBP`, to train on their robust cross-entropy.

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
    adversarial: Float[Array, "*shape"],
    center: Float[Array, "*shape"],
    eps: ArrayLike,
    fraction: float,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    of_clipped: bool = False,
) -> Box:
    """SABR: a box of radius `fraction * eps` near an adversarial input, inside the ball around x.

    The box is centred at the adversarial input, projected to the l-infinity ball of radius
    `(1 - fraction) eps` around the center. No gradient flows to the adversarial input.

    Args:
      adversarial: an input, any shape.
      center: the unperturbed input, of the same shape.
      eps: radius in the units of the input, a scalar or an array of the input's shape.
      fraction: `lambda` of the paper, in `[0, 1]`; 0 is the adversarial input, 1 the whole ball.
      clip: `None` or `(low, high)`, the valid range: scalars or arrays of the input's shape.
      of_clipped: cut the ball to the clip range first and take the fraction of the remaining radii,
        feature by feature, as the authors' code does; otherwise, cut the small box at the end. The
        two differ at features within eps of the range's ends, that is for most pixels of MNIST.

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
    # Rounding may pass the ball's ends.
    ends = jnp.clip(middle - radius, lower, upper), jnp.clip(middle + radius, lower, upper)
    lower, upper = (jnp.clip(end, low, high) for end in ends)
    return Box(lower, upper)


def _of_shape(name: str, value: ArrayLike, like: Array) -> Array:
    array = jnp.asarray(value, like.dtype)
    if array.ndim and array.shape != like.shape:
        raise ValueError(
            f"{name} must be a scalar or have the input's shape {like.shape}, got {array.shape}"
        )
    return jnp.broadcast_to(array, like.shape)


def rectified_link(
    latent: Float[Array, "*shape"],
    lower: Float[Array, "*shape"],
    upper: Float[Array, "*shape"],
    c: float = 0.5,
) -> Float[Array, "*shape"]:
    """TAPS: an attacked point of a latent box, with a gradient to the box's bounds.

    The value is `latent`, the result of an attack that is not differentiated through. Its gradient
    is an estimator, not the derivative of a function: the weights of the two bounds fall linearly
    with the distance from them,

        d latent / d lower = max(0, 1 - |latent - lower| / (c (upper - lower))),
        d latent / d upper = max(0, 1 - |latent - upper| / (c (upper - lower))).

    Both are 1 / 2 where the box is a point. No gradient flows to `latent` itself.

    Args:
      latent: points of the box, any shape.
      lower: the box's lower bounds, of that shape.
      upper: its upper bounds, of that shape.
      c: fraction of the width at which a bound's weight reaches 0, in `(0, 1]`; with `c <= 1 / 2`
        at most one of the bounds has a positive weight.

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
    ends = jax.lax.stop_gradient((lower, upper))
    reach = c * (ends[1] - ends[0])
    is_point = ~(reach > 0)

    def term(bound: Array, end: Array) -> Array:
        weight = 1.0 - jnp.abs(latent - end) / jnp.where(is_point, 1.0, reach)
        weight = jnp.where(is_point, 0.5, jnp.maximum(weight, 0.0))
        return weight * (bound - end)  # the value is 0, the derivative is the weight

    return latent + term(lower, ends[0]) + term(upper, ends[1])


def scaled_product(
    ibp_loss: Float[Array, "*shape"], taps_loss: Float[Array, "*shape"], scale: float
) -> Float[Array, "*shape"]:
    """TAPS: the product `L_IBP L_TAPS`, with a gradient that weighs the two paths.

        grad = (2 - 2 a) L_TAPS grad L_IBP + 2 a L_IBP grad L_TAPS,   scale = a / (1 - a)

    Here `scale` is the weight of the TAPS path relative to the IBP path; 1 gives the ordinary
    gradient of the product. The authors' code uses the weights 1 and `scale` instead: the same
    direction, but `(1 + scale) / 2` times as long. The length matters beside other terms (an L1
    norm, a natural loss) and to gradient clipping; multiply by that factor to reproduce theirs.

    Args:
      ibp_loss: any shape; the authors multiply means over the batch.
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

    def with_gradient_times(loss: Array, weight: float) -> Array:
        constant = jax.lax.stop_gradient(loss)
        return constant + weight * (loss - constant)

    return with_gradient_times(ibp_loss, 2.0 / (1.0 + scale)) * with_gradient_times(
        taps_loss, 2.0 * scale / (1.0 + scale)
    )

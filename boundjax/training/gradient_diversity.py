"""How far the gradients of a random network point the same way (GradDiv, Lee et al. 2022).

EOT follows the mean gradient over draws, so it gains little where the gradients of different draws
point to different sides. All measures are functions of the cosines between the gradients.
Equations are those of chapter 2 of the thesis ("Robustness of deep neural networks to adversarial
attack: from heuristic methods to certified methods").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

Measure = Literal["kappa", "mean", "dpp", "max", "smoothmax"]
# Gradients that are shorter have no direction.
_SHORTEST = 1e-12
# The smallest 1 - rho^2, and what is added to the diagonal of the cosines for a determinant.
_DISPERSED = 1e-6
_JITTER = 1e-6


class GradientDirections(NamedTuple):
    """GradientDirections of gradients.

    Attributes:
      cosines: `[B, n, n]`, between the gradients of `n` draws at each of `B` examples.
      kept: `[B]`, whether every gradient of an example has a direction: a norm of at least 1e-12.
      size: `p`, the size of one example.
    """

    cosines: Float[Array, "B n n"]
    kept: Bool[Array, " B"]
    size: int


def gradient_directions(gradients: Float[Array, "n B ..."]) -> GradientDirections:
    """The cosines between the gradients of several draws, `[n, B, ...]`.

    Raises:
      ValueError: for fewer than two draws.
    """
    if gradients.ndim < 2 or gradients.shape[0] < 2:
        raise ValueError(
            "gradients must be [n, B, ...] of at least two draws, got shape "
            f"{tuple(gradients.shape)}"
        )
    count, batch = gradients.shape[:2]
    flat = gradients.reshape(count, batch, -1)
    squares = jnp.sum(flat * flat, axis=-1, keepdims=True)
    has_direction = squares >= _SHORTEST**2
    # The inner `where` keeps the derivative of the root finite.
    lengths = jnp.sqrt(jnp.where(has_direction, squares, 1.0))
    units = jnp.where(has_direction, flat / lengths, 0.0)
    cosines = jnp.einsum("ibp,jbp->bij", units, units)
    return GradientDirections(
        cosines, jnp.all(has_direction, axis=(0, 2)), math.prod(flat.shape[2:])
    )


def mean_resultant_length(cosines: Float[Array, "B n n"]) -> Float[Array, " B"]:
    """`rho = ||(1 / n) sum_i e_i|| = sqrt(sum_ij cos_ij) / n`, in [0, 1]."""
    total = jnp.sum(cosines, axis=(-2, -1))
    positive = total > 0  # rounding may leave a little less than 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1.0)), 0.0) / cosines.shape[-1]


def concentration(cosines: Float[Array, "B n n"], size: int) -> Float[Array, " B"]:
    """`R_kappa = rho (p - rho^2) / (1 - rho^2) / p`: estimate of a von Mises-Fisher distribution.

    (2.2.16) prints `p - rho`; the estimator that it cites (Banerjee et al. 2005) has the square.
    `1 - rho^2` is at least 1e-6.
    """
    rho = mean_resultant_length(cosines)
    return rho * (size - rho**2) / jnp.maximum(1.0 - rho**2, _DISPERSED) / size


def mean_cosine(cosines: Float[Array, "B n n"]) -> Float[Array, " B"]:
    """`R_mean`, the mean cosine of two different draws (2.2.17)."""
    count = cosines.shape[-1]
    return jnp.sum(_off_diagonal(cosines, 0.0), axis=(-2, -1)) / (count * (count - 1))


def negative_log_volume(cosines: Float[Array, "B n n"]) -> Float[Array, " B"]:
    """`R_DPP = -log det(cos)` (2.2.19), with 1e-6 added to the diagonal."""
    jitter = _JITTER * jnp.eye(cosines.shape[-1], dtype=cosines.dtype)
    return -jnp.linalg.slogdet(cosines + jitter[None])[1]


def largest_cosine(cosines: Float[Array, "B n n"]) -> Float[Array, " B"]:
    """`R_max`, the largest cosine of two different draws (appendix A.2)."""
    return jnp.max(_off_diagonal(cosines, -jnp.inf), axis=(-2, -1))


def smooth_largest_cosine(cosines: Float[Array, "B n n"]) -> Float[Array, " B"]:
    """`R_smoothmax = log sum_{i != j} exp(cos_ij)` over ordered pairs (appendix A.2)."""
    return jnp.log(jnp.sum(_off_diagonal(jnp.exp(cosines), 0.0), axis=(-2, -1)))


def gradient_diversity_loss(
    gradients: Float[Array, "n B ..."], measure: Measure
) -> Float[Array, ""]:
    """The regularizer of GradDiv (2.2.20): a measure of concentration, mean over the batch.

    GradDiv adds `lambda` times this to the loss of a random network, with three draws. Gradients
    with respect to weights are second derivatives of the network.

    Args:
      gradients: `[n, B, ...]`, the input gradients of the loss of each draw.
      measure: `"kappa"`, `"mean"`, `"dpp"`, `"max"` or `"smoothmax"`.

    Returns:
      A scalar. Examples with a gradient shorter than 1e-12 are left out; 0 if none is left.

    Raises:
      ValueError: for fewer than two draws or an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}: use one of {', '.join(MEASURES)}")
    directions = gradient_directions(gradients)
    identity = jnp.eye(directions.cosines.shape[-1], dtype=directions.cosines.dtype)[None]
    # Derivatives of what is left out have to be finite, too.
    cosines = jnp.where(directions.kept[:, None, None], directions.cosines, identity)
    values = jnp.where(directions.kept, MEASURES[measure](cosines, directions.size), 0.0)
    return jnp.sum(values) / jnp.maximum(jnp.sum(directions.kept, dtype=values.dtype), 1.0)


def loss_increase_bound(
    gradients: Float[Array, "n B ..."], step: ArrayLike, length: ArrayLike | None = None
) -> Float[Array, " B"]:
    """Bounds how much the expected loss grows along the mean gradient, to first order in `step`.

    Theorem 2.2.1 of the thesis, corrected. It claims `alpha M rho + O(alpha^2)`, from
    `||E g|| <= M ||E g / ||g||||`, which does not hold: `g` may be `(1, 0)` and `(-0.01, 0)` with
    probability 1/2, where `||E g|| = 0.495` and `rho = 0`. For any `m >= 0`,

        Delta(E g / ||E g||) <= alpha (m rho + E | ||g|| - m |) + O(alpha^2),

    because `E g = m E e + E (||g|| - m) e` for the directions `e`. It is an equality, `m rho`, if
    all norms are `m`: diversity of directions bounds the increase as far as the norms are alike.

    Args:
      gradients: `[n, B, ...]`, the input gradients of the draws, over which the means are taken.
      step: `alpha`, the l2 length of the step.
      length: `m`, a scalar or `[B]`; by default the mean norm.

    Returns:
      `[B]`.

    Raises:
      ValueError: for fewer than two draws.
    """
    rho = mean_resultant_length(gradient_directions(gradients).cosines)
    flat = gradients.reshape(*gradients.shape[:2], -1)
    norms = jnp.sqrt(jnp.sum(flat * flat, axis=-1))
    m = jnp.mean(norms, axis=0) if length is None else jnp.asarray(length, norms.dtype)
    m = jnp.broadcast_to(m, rho.shape)
    return jnp.asarray(step, norms.dtype) * (m * rho + jnp.mean(jnp.abs(norms - m[None]), axis=0))


MEASURES: dict[Measure, Callable[[Array, int], Array]] = {
    "kappa": concentration,
    "mean": lambda cosines, size: mean_cosine(cosines),
    "dpp": lambda cosines, size: negative_log_volume(cosines),
    "max": lambda cosines, size: largest_cosine(cosines),
    "smoothmax": lambda cosines, size: smooth_largest_cosine(cosines),
}


def _off_diagonal(matrix: Array, diagonal: float) -> Array:
    """`[B, n, n]` with this value on the diagonals."""
    return jnp.where(jnp.eye(matrix.shape[-1], dtype=bool)[None], diagonal, matrix)

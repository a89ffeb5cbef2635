"""The fast gradient sign method: one step as long as the radius (Goodfellow et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from boundjax.attacks.arguments import check_arguments
from boundjax.attacks.objective import Loss
from boundjax.attacks.pgd import Descent
from boundjax.sets.threat import Threat


def fgsm(
    f: Callable[..., Float[Array, "B C"]],
    x: Float[Array, "B ..."],
    labels: Int[Array, " B"],
    eps: ArrayLike,
    *,
    key: Array | None = None,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None = None,
    loss: Loss = "cross_entropy",
    draws: int | None = None,
) -> Float[Array, "B ..."]:
    """Moves `x` by `eps` along the sign of the gradient, or along the gradient for `norm=2`.

    A random network `f(x, key)` is attacked along the mean of the gradients of `draws` draws:
    EOT-FGSM of Lee et al. 2022 (GradDiv) has 20. A pure function, like `pgd`.

    Args:
      f, x, labels, eps, norm, clip, draws: as for `pgd`.
      key: PRNG key of the draws; a deterministic network needs none.
      loss: the step ascends the `"cross_entropy"` or descends the `"margin"`.

    Returns:
      `[B, ...]`, points of the set; `x` where the gradient is 0 or not a number.

    Raises:
      ValueError: as `pgd`, and for draws without a key.
    """
    check_arguments("fgsm", f, x, labels, eps, norm, clip, loss, draws, key)
    descent = Descent(f, x, labels, Threat(eps, norm, clip), eps, loss, draws, keep="last")
    moved, _ = descent.step(x, descent.nothing(), key)
    return jnp.where(jnp.isnan(moved), x, moved)

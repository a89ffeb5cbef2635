"""What attacks descend: margins or losses, and their gradients over the draws of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from boundjax.stochastic import each_draw, require_draws
from boundjax.training.losses import cross_entropy

Loss = Literal["margin", "cross_entropy"]
LOSSES: tuple[Loss, ...] = ("margin", "cross_entropy")


def expected_gradient(
    f: Callable[[Array, Array], Float[Array, "B C"]],
    x: Float[Array, "B ..."],
    labels: Int[Array, " B"],
    *,
    key: Array,
    draws: int,
    loss: Loss = "cross_entropy",
) -> Float[Array, "B ..."]:
    """The gradient that EOT follows: the mean over draws of the gradients of the loss at `x`.

    `(1 / n) sum_i grad_x L(f_{w_i}(x), y)` (Athalye et al. 2018; (2.2.8) of the thesis behind
    GradDiv, Lee et al. 2022). It is not the gradient at the mean prediction.

    Args:
      f: `(x, key) -> logits [B, C]`; each example's logits depend on that example alone.
      x: `[B, ...]`.
      labels: int `[B]`.
      key: split into one key per draw.
      draws: number of draws, at least 1.
      loss: `"cross_entropy"`, or the `"margin"` `z_y - max_{m != y} z_m`.

    Returns:
      `[B, ...]`.

    Raises:
      ValueError: for `draws < 1` or an unknown loss.
    """
    require_draws(draws)
    require_loss(loss)
    gradient, _ = descent_gradient(f, x, labels, loss, jax.random.split(key, draws))
    return gradient if loss == "margin" else -gradient


def descent_gradient(
    f: Callable[..., Array], x: Array, labels: Array, loss: Loss, keys: Array | None
) -> tuple[Array, Array]:
    """The gradient `[B, ...]` of what an attack descends, and the margins `[B]`.

    With `keys` `[n]`, both are means over the draws of a random network.
    """

    def objective(x: Array, *key: Array) -> tuple[Array, Array]:
        logits = f(x, *key)
        margins = margins_of_label(logits, labels)
        descended = margins if loss == "margin" else -cross_entropy(logits, labels)
        return jnp.sum(descended), margins

    gradient = jax.grad(objective, has_aux=True)
    if keys is None:
        return gradient(x)
    return jax.tree.map(
        lambda each: jnp.mean(each, axis=0), each_draw(lambda key: gradient(x, key), keys)
    )


def mean_margins(f: Callable[..., Array], x: Array, labels: Array, keys: Array | None) -> Array:
    """The margins `[B]`; with `keys` `[n]`, their means over the draws of a random network."""
    if keys is None:
        return margins_of_label(f(x), labels)
    margins = each_draw(lambda key: margins_of_label(f(x, key), labels), keys)
    return jnp.mean(margins, axis=0)


def margins_of_label(logits: Array, labels: Array) -> Array:
    """`z_y - max_{m != y} z_m`, `[B]`."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return label_logit - jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)


def require_loss(loss: str) -> None:
    """Checks the name of a loss.

    Raises:
      ValueError: for a name that is not in `LOSSES`.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}")

"""Attacks on one draw of a random network, tried on other draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from boundjax.stochastic import each_draw, require_draws


class Attack(Protocol):
    """An attack on a deterministic network, such as `functools.partial(pgd, eps=0.3)`."""

    def __call__(
        self, f: Callable[[Array], Array], x: Array, labels: Array, /, *, key: Array
    ) -> Array:
        """Points `[B, ...]` of the set around `x`."""
        ...


def transfer_accuracy(
    f: Callable[[Array, Array], Float[Array, "B C"]],
    x: Float[Array, "B ..."],
    labels: Int[Array, " B"],
    attack: Attack,
    *,
    key: Array,
    draws: int,
) -> Float[Array, "n n"]:
    """How accurate each draw is on the points that an attack finds for each other draw.

    Every draw is a deterministic network. Low values off the diagonal mean that attacks transfer,
    so that EOT works. GradDiv (Lee et al. 2022, Figure 2.8 of the thesis) attacks 50 draws by
    `functools.partial(pgd, eps=0.4, clip=(0.0, 1.0), steps=20, loss="cross_entropy")`. A pure
    function: `jit` it with `f`, `attack` and `draws` static.

    Args:
      f: `(x, key) -> logits [B, C]`.
      x: `[B, ...]`.
      labels: int `[B]`.
      attack: `(g, x, labels, key=) -> points [B, ...]` on a deterministic `g`.
      key: of the draws and of the attacks.
      draws: `n`, at least 1.

    Returns:
      `[n, n]`: row `i`, column `j` is the share of the points found for draw `i` that draw `j`
      classifies as `labels`.

    Raises:
      ValueError: for `draws < 1`.
    """
    require_draws(draws)
    of_draws, of_attacks = (jax.random.split(each, draws) for each in jax.random.split(key))

    def row(source: tuple[Array, Array]) -> Array:
        draw, attack_key = source
        points = attack(lambda x: f(x, draw), x, labels, key=attack_key)
        return each_draw(
            lambda key: jnp.mean(jnp.argmax(f(points, key), axis=-1) == labels, dtype=x.dtype),
            of_draws,
        )

    return jax.lax.map(row, (of_draws, of_attacks))

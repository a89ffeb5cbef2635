"""Projected gradient descent on the margin, inside an l2 or l-infinity ball (Madry et al. 2018).

On random networks it is EOT-PGD (Athalye et al. 2018): each step follows the mean of the gradients
of several draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from boundjax.attacks.arguments import check_arguments
from boundjax.attacks.objective import Loss, descent_gradient, mean_margins
from boundjax.sets.threat import Threat

Keep = Literal["best", "last"]
# Draws of random networks get keys that no restart has.
_DRAWS = 0x454F54


def pgd(
    f: Callable[..., Float[Array, "B C"]],
    x: Float[Array, "B ..."],
    labels: Int[Array, " B"],
    eps: Float[ArrayLike, ""],
    *,
    key: Array,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None = None,
    steps: int = 40,
    step_size: Float[ArrayLike, ""] | None = None,
    restarts: int = 1,
    loss: Loss = "margin",
    draws: int | None = None,
    keep: Keep | None = None,
) -> Float[Array, "B ..."]:
    """Returns the input of smallest margin `z_y - max_{m != y} z_m` that the attack meets.

    The first restart starts at `x` itself, the others at random points of the ball. Each step moves
    along the sign of the gradient (`norm=inf`) or along the normalised gradient (`norm=2`) of the
    loss and is projected back onto the ball and the clip box. The attack keeps the best iterate of
    each example, the start included, so the result is never less adversarial than `x`. This is a
    pure function: `jit` it with `f`, `norm`, `clip`, `steps`, `restarts`, `loss`, `draws` and
    `keep` static.

    A random network `f(x, key)` is attacked with `draws` draws (expectation over transformation,
    Athalye et al. 2018): gradients are means over the draws of the gradients of the loss, and every
    step draws anew. The margins of one step are a sample, so the last iterate is returned. EOT-PGD
    of Lee et al. 2022 (GradDiv) has 20 steps, `loss="cross_entropy"` and 5, 10 or 20 draws.

    Args:
      f: maps a batch, with `draws` a batch and a PRNG key, to logits `[B, C]`, `C >= 2`.
      x: `[B, ...]`, the centres of the balls, inside the clip box if there is one.
      labels: int `[B]`.
      eps: radius, a scalar in the units of `x`. With radius 0 the result is `x`.
      key: PRNG key of the random starts and the draws.
      norm: `jnp.inf` or `2`.
      clip: `(lowest, highest)` input value, or None.
      steps: gradient steps per restart.
      step_size: length of a step in `norm`, a scalar; `eps / 4` by default.
      restarts: number of starts, at least 1.
      loss: the steps descend the `"margin"` or ascend the `"cross_entropy"`.
      draws: draws per gradient of a random network; None for a deterministic one.
      keep: `"best"`, the iterate of smallest margin, which on random networks is the mean over the
        draws of that step; or `"last"`, of several restarts the best of their last iterates. By
        default `"best"` without draws and `"last"` with them.

    Returns:
      `[B, ...]`, one point of the set for each example.

    Raises:
      ValueError: for a negative or NaN `eps`, a norm other than 2 and inf, an unknown loss, a
        number of steps, restarts or draws out of range, a random network without `draws` or `draws`
        of a function that takes no key, or shapes that do not match.
    """
    check_arguments("pgd", f, x, labels, eps, norm, clip, loss, draws, key)
    if steps < 0 or restarts < 1:
        raise ValueError(
            f"pgd needs steps >= 0 and restarts >= 1, got steps={steps}, restarts={restarts}"
        )
    if keep not in (None, "best", "last"):
        raise ValueError(f"keep must be 'best' or 'last', got {keep!r}")
    descent = Descent(f, x, labels, Threat(eps, norm, clip), step_size, loss, draws, keep)

    def step(carry: tuple[Array, Best], key: Array | None) -> tuple[tuple[Array, Best], None]:
        return descent.step(*carry, key), None

    def restart(best: Best, index: Array) -> tuple[Best, None]:
        start = descent.start(key, index)
        keys = None if draws is None else descent.draw_keys(key, index, steps)
        of_steps, of_end = (None, None) if keys is None else (keys[:-1], keys[-1])
        (last, best), _ = jax.lax.scan(step, (start, best), of_steps, length=steps)
        return descent.end(last, best, of_end), None

    best, _ = jax.lax.scan(restart, descent.nothing(), jnp.arange(restarts))
    return best.iterate


class Best(NamedTuple):
    """The iterates `[B, ...]` with the smallest margins `[B]` so far."""

    iterate: Float[Array, "B ..."]
    margins: Float[Array, " B"]


class Descent:
    """The parts of `pgd`, for loops outside of compiled programs.

    XLA's CPU backend runs gradients of convolutions several times slower inside a loop, where a
    Python loop over a compiled `step` is faster:

        best = descent.nothing()
        for index in range(restarts):
            iterate = descent.start(key, index)
            for _ in range(steps):
                iterate, best = descent.step(iterate, best)
            best = descent.end(iterate, best)

    The draws of a random network can be in a Python loop as well: the direction of a step is the
    mean over `draws` of `gradient(iterate, draw)`, which `move` follows.
    """

    def __init__(
        self,
        f: Callable[..., Float[Array, "B C"]],
        x: Float[Array, "B ..."],
        labels: Int[Array, " B"],
        threat: Threat,
        step_size: Float[ArrayLike, ""] | None = None,
        loss: Loss = "margin",
        draws: int | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Takes the arguments of `pgd` without checking them; `threat` has eps, norm and clip."""
        self._f, self._x, self._labels = f, x, labels
        self._threat, self._draws = threat, draws
        self._loss: Loss = loss
        self._keeps_last = keep == "last" or (keep is None and draws is not None)
        self._eps = jnp.asarray(threat.eps, x.dtype)
        self._step_size = self._eps / 4 if step_size is None else jnp.asarray(step_size, x.dtype)

    def nothing(self) -> Best:
        """The best before the first start: `x`, with infinite margins."""
        return Best(self._x, jnp.full(self._labels.shape, jnp.inf, self._x.dtype))

    def start(self, key: Array, index: Int[Array, ""] | int) -> Float[Array, "B ..."]:
        """The starting points `[B, ...]` of restart number `index`; the first is `x` itself."""
        key = jax.random.fold_in(key, index)
        noise = _random_offset(key, self._x, self._eps, self._threat.norm)
        return jnp.where(index == 0, self._x, self._project(self._x + noise))

    def draw_keys(self, key: Array, index: Array | int, steps: int) -> Array:
        """Keys `[steps + 1]` of a random network: one for each step of a restart, one for `end`."""
        key = jax.random.fold_in(jax.random.fold_in(key, _DRAWS), index)
        return jax.random.split(key, steps + 1)

    def step(
        self, iterate: Float[Array, "B ..."], best: Best, key: Array | None = None
    ) -> tuple[Float[Array, "B ..."], Best]:
        """Returns the next iterate, and the best including this one; `key` is that of the draws."""
        direction, margins = descent_gradient(
            self._f, iterate, self._labels, self._loss, self._keys(key)
        )
        if not self._keeps_last:
            best = self._better(iterate, margins, best)
        return self.move(iterate, direction), best

    def gradient(self, iterate: Float[Array, "B ..."], draw: Array) -> Float[Array, "B ..."]:
        """The gradient of what the attack descends, of one draw; `draw` is its key."""
        return descent_gradient(self._f, iterate, self._labels, self._loss, draw[None])[0]

    def move(
        self, iterate: Float[Array, "B ..."], direction: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """The next iterate, a step against `direction` and back into the set."""
        moved = iterate - self._step_size * _steepest(direction, self._threat.norm)
        return self._project(moved)

    def end(self, iterate: Float[Array, "B ..."], best: Best, key: Array | None = None) -> Best:
        """Returns the best including the last iterate of a restart; `key` is that of the draws."""
        margins = mean_margins(self._f, iterate, self._labels, self._keys(key))
        return self._better(iterate, margins, best)

    def _keys(self, key: Array | None) -> Array | None:
        """The keys of the draws `[n]`; None for a deterministic network."""
        if self._draws is None:
            return None
        assert key is not None, "a random network needs a key for every step"
        return jax.random.split(key, self._draws)

    def _project(self, points: Array) -> Array:
        return jax.vmap(self._threat.project)(points, self._x)

    def _better(self, iterate: Array, margins: Array, best: Best) -> Best:
        better = margins < best.margins
        selection = better.reshape(better.shape + (1,) * (self._x.ndim - 1))
        return Best(
            jnp.where(selection, iterate, best.iterate), jnp.where(better, margins, best.margins)
        )


def _example_norm(x: Array) -> Array:
    """The l2 norm of each example, `[B, 1, ..., 1]`; nothing differentiates it."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def _steepest(gradient: Array, norm: float) -> Array:
    """The direction of norm 1 in which a linear function rises fastest."""
    if norm == jnp.inf:
        return jnp.sign(gradient)
    length = _example_norm(gradient)
    return jnp.where(length > 0, gradient / jnp.where(length > 0, length, 1.0), 0.0)


def _random_offset(key: jax.Array, x: jax.Array, eps: jax.Array, norm: float) -> jax.Array:
    """A uniformly distributed point of the ball around 0, per example."""
    if norm == jnp.inf:
        return eps * jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
    direction_key, radius_key = jax.random.split(key)
    direction = _steepest(jax.random.normal(direction_key, x.shape, x.dtype), norm)
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    radius = jax.random.uniform(radius_key, shape, x.dtype)
    return eps * radius ** (1.0 / max(1, math.prod(x.shape[1:]))) * direction

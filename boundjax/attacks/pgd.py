"""Projected gradient descent on the margin, inside an l2 or l-infinity ball (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from boundjax.sets.threat import Threat
from boundjax.training.losses import cross_entropy

Loss = Literal["margin", "cross_entropy"]
LOSSES: tuple[Loss, ...] = ("margin", "cross_entropy")


def pgd(
    f: Callable[[Float[Array, "B ..."]], Float[Array, "B C"]],
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
) -> Float[Array, "B ..."]:
    """Returns the input of smallest margin `z_y - max_{m != y} z_m` that the attack meets.

    The first restart starts at `x` itself, the others at random points of the ball. Each step moves
    along the sign of the gradient (`norm=inf`) or along the normalised gradient (`norm=2`) of the
    loss and is projected back onto the ball and the clip box. The attack keeps the best iterate of
    each example, the start included, so the result is never less adversarial than `x`. This is a
    pure function: `jit` it with `f`, `norm`, `clip`, `steps`, `restarts` and `loss` static.

    Args:
      f: maps a batch to logits `[B, C]`, `C >= 2`.
      x: `[B, ...]`, the centres of the balls, inside the clip box if there is one.
      labels: int `[B]`.
      eps: radius, a scalar in the units of `x`. With radius 0 the result is `x`.
      key: PRNG key of the random starts.
      norm: `jnp.inf` or `2`.
      clip: `(lowest, highest)` input value, or None.
      steps: gradient steps per restart.
      step_size: length of a step in `norm`, a scalar; `eps / 4` by default.
      restarts: number of starts, at least 1.
      loss: the steps descend the `"margin"` or ascend the `"cross_entropy"`.

    Returns:
      `[B, ...]`, the best iterate of each example.

    Raises:
      ValueError: for a negative or NaN `eps`, a norm other than 2 and inf, an unknown loss, a step
        or restart count out of range, or shapes that do not match.
    """
    _check_arguments(f, x, labels, eps, norm, clip, steps, restarts, loss)
    descent = Descent(f, x, labels, Threat(eps, norm, clip), step_size, loss)

    def step(carry: tuple[Array, Best], _: None) -> tuple[tuple[Array, Best], None]:
        return descent.step(*carry), None

    def restart(best: Best, index: Array) -> tuple[Best, None]:
        start = descent.start(key, index)
        (last, best), _ = jax.lax.scan(step, (start, best), length=steps)
        return descent.end(last, best), None

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
    """

    def __init__(
        self,
        f: Callable[[Float[Array, "B ..."]], Float[Array, "B C"]],
        x: Float[Array, "B ..."],
        labels: Int[Array, " B"],
        threat: Threat,
        step_size: Float[ArrayLike, ""] | None = None,
        loss: Loss = "margin",
    ) -> None:
        """Takes the arguments of `pgd` without checking them; `threat` has eps, norm and clip."""
        self._f, self._x, self._labels = f, x, labels
        self._threat, self._loss = threat, loss
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

    def step(
        self, iterate: Float[Array, "B ..."], best: Best
    ) -> tuple[Float[Array, "B ..."], Best]:
        """Returns the next iterate, and the best including this one."""
        direction, margins = jax.grad(self._objective, has_aux=True)(iterate)
        best = self._better(iterate, margins, best)
        moved = iterate - self._step_size * _steepest(direction, self._threat.norm)
        return self._project(moved), best

    def end(self, iterate: Float[Array, "B ..."], best: Best) -> Best:
        """Returns the best including the last iterate of a restart."""
        return self._better(iterate, _margins(self._f(iterate), self._labels), best)

    def _project(self, points: Array) -> Array:
        return jax.vmap(self._threat.project)(points, self._x)

    def _objective(self, iterate: Array) -> tuple[Array, Array]:
        """The objective to descend, summed over the batch, and the margins `[B]`."""
        logits = self._f(iterate)
        margins = _margins(logits, self._labels)
        descended = margins if self._loss == "margin" else -cross_entropy(logits, self._labels)
        return jnp.sum(descended), margins

    def _better(self, iterate: Array, margins: Array, best: Best) -> Best:
        better = margins < best.margins
        selection = better.reshape(better.shape + (1,) * (self._x.ndim - 1))
        return Best(
            jnp.where(selection, iterate, best.iterate), jnp.where(better, margins, best.margins)
        )


def _margins(logits: Array, labels: Array) -> Array:
    """`z_y - max_{m != y} z_m`, `[B]`."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return label_logit - jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)


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


def _check_arguments(
    f: Callable[[Array], Array],
    x: Array,
    labels: Array,
    eps: ArrayLike,
    norm: float,
    clip: tuple[float, float] | None,
    steps: int,
    restarts: int,
    loss: str,
) -> None:
    if norm not in (2, jnp.inf):
        raise ValueError(f"pgd expects norm=2 or norm=inf, got norm={norm}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}")
    if steps < 0 or restarts < 1:
        raise ValueError(
            f"pgd needs steps >= 0 and restarts >= 1, got steps={steps}, restarts={restarts}"
        )
    if clip is not None and not clip[0] <= clip[1]:
        raise ValueError(f"clip must be (lowest, highest) with lowest <= highest, got {clip}")
    if x.ndim == 0 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"pgd expects x [B, ...] and labels [B], got shapes {x.shape} and {labels.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"pgd expects floating-point inputs, got x of type {x.dtype}")
    if jnp.ndim(eps) != 0:
        raise ValueError(f"pgd expects a scalar eps, got shape {jnp.shape(eps)}")
    try:
        value = float(np.asarray(eps))
    except jax.errors.TracerArrayConversionError:
        value = 0.0  # a tracer has no value to check
    if not value >= 0.0:
        raise ValueError(f"eps must be >= 0, got {value}")
    logits = jax.eval_shape(f, x)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"pgd expects f to return logits [B, C] with B={x.shape[0]} and C >= 2, "
            f"got shape {logits.shape}"
        )

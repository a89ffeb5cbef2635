"""Projected gradient descent on the margin, inside an l2 or l-infinity ball (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.training.losses import cross_entropy

LOSSES = ("margin", "cross_entropy")


def pgd(
    f: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    labels: jax.Array,
    eps: jax.Array | float,
    *,
    key: jax.Array,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None = None,
    steps: int = 40,
    step_size: jax.Array | float | None = None,
    restarts: int = 1,
    loss: str = "margin",
) -> jax.Array:
    """The input of smallest margin `z_y - max_{m != y} z_m` that the attack met in the ball.

    The first restart starts at `x` itself, the others at random points of the ball. Each step moves
    along the sign of the gradient (`norm=inf`) or along the normalised gradient (`norm=2`) of the
    loss and is projected back onto the ball and the clip box. The best iterate is kept per example,
    the start included, so the result is never less adversarial than `x`. A pure function: `jit` it
    with `f`, `norm`, `clip`, `steps`, `restarts` and `loss` static.

    Args:
      f: batch in, logits `[B, C]` out, `C >= 2`.
      x: `[B, ...]`, the centres of the balls; inside the clip box if there is one.
      labels: int `[B]`.
      eps: radius, a scalar in the units of `x`. With 0 the answer is `x`.
      key: PRNG key of the random starts.
      norm: `jnp.inf` or `2`.
      clip: `(lowest, highest)` input value, or None.
      steps: gradient steps per restart.
      step_size: length of a step in `norm`, a scalar; `eps / 4` by default.
      restarts: number of starts, at least 1.
      loss: what the steps descend: `"margin"`, or ascend: `"cross_entropy"`.

    Returns:
      `[B, ...]`, the best iterate of each example.

    Raises:
      ValueError: for a negative or NaN `eps`, a norm other than 2 and inf, an unknown loss, a step
        or restart count out of range, or shapes that do not belong together.
    """
    _check_arguments(f, x, labels, eps, norm, clip, steps, restarts, loss)
    eps = jnp.asarray(eps, x.dtype)
    step_size = eps / 4 if step_size is None else jnp.asarray(step_size, x.dtype)
    project = _projection(x, eps, norm, clip)

    def objective(iterate: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum over the batch of what is descended, and the margins `[B]`."""
        logits = f(iterate)
        margins = _margins(logits, labels)
        descended = margins if loss == "margin" else -cross_entropy(logits, labels)
        return jnp.sum(descended), margins

    gradient = jax.grad(objective, has_aux=True)

    def keep_best(best: tuple, iterate: jax.Array, margins: jax.Array) -> tuple:
        best_iterate, best_margins = best
        better = margins < best_margins
        selection = better.reshape(better.shape + (1,) * (x.ndim - 1))
        return jnp.where(selection, iterate, best_iterate), jnp.where(better, margins, best_margins)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        iterate, best = carry
        direction, margins = gradient(iterate)
        best = keep_best(best, iterate, margins)
        iterate = project(iterate - step_size * _steepest(direction, norm))
        return (iterate, best), None

    def restart(best: tuple, index: jax.Array) -> tuple[tuple, None]:
        noise = _random_offset(jax.random.fold_in(key, index), x, eps, norm)
        start = jnp.where(index == 0, x, project(x + noise))
        (last, best), _ = jax.lax.scan(step, (start, best), length=steps)
        return keep_best(best, last, _margins(f(last), labels)), None

    first = (x, jnp.full(labels.shape, jnp.inf, x.dtype))
    (best, _), _ = jax.lax.scan(restart, first, jnp.arange(restarts))
    return best


def _margins(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`z_y - max_{m != y} z_m`, `[B]`."""
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return label_logit - jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)


def _example_norm(x: jax.Array) -> jax.Array:
    """l2 norm of each example, `[B, 1, ..., 1]`; its gradient is never taken."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def _steepest(gradient: jax.Array, norm: float) -> jax.Array:
    """The direction of norm 1 in which a linear function falls fastest, negated."""
    if norm == jnp.inf:
        return jnp.sign(gradient)
    length = _example_norm(gradient)
    return jnp.where(length > 0, gradient / jnp.where(length > 0, length, 1.0), 0.0)


def _projection(
    x: jax.Array, eps: jax.Array, norm: float, clip: tuple[float, float] | None
) -> Callable[[jax.Array], jax.Array]:
    lowest, highest = (-jnp.inf, jnp.inf) if clip is None else clip
    if norm == jnp.inf:
        # The very interval ends that the bounds start from, so the attack cannot leave by a
        # rounding.
        lower, upper = jnp.maximum(x - eps, lowest), jnp.minimum(x + eps, highest)
        return lambda iterate: jnp.clip(iterate, lower, upper)

    def project(iterate: jax.Array) -> jax.Array:
        offset = iterate - x
        length = _example_norm(offset)
        scale = jnp.where(length > eps, eps / jnp.where(length > 0, length, 1.0), 1.0)
        # Clipping moves every pixel towards x, which lies in the box: the norm only shrinks.
        return jnp.clip(x + scale * offset, lowest, highest)

    return project


def _random_offset(key: jax.Array, x: jax.Array, eps: jax.Array, norm: float) -> jax.Array:
    """A uniformly distributed point of the ball around 0, per example."""
    if norm == jnp.inf:
        return eps * jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
    direction_key, radius_key = jax.random.split(key)
    direction = _steepest(jax.random.normal(direction_key, x.shape, x.dtype), norm)
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    radius = jax.random.uniform(radius_key, shape, x.dtype)
    return eps * radius ** (1.0 / max(1, math.prod(x.shape[1:]))) * direction


def _check_arguments(f, x, labels, eps, norm, clip, steps, restarts, loss) -> None:
    if norm not in (2, jnp.inf):
        raise ValueError(f"pgd knows the norms 2 and inf, got norm={norm}")
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
        value = 0.0  # traced: its value is not known here
    if not value >= 0.0:
        raise ValueError(f"eps must be >= 0, got {value}")
    logits = jax.eval_shape(f, x)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"pgd expects f to return logits [B, C] with B={x.shape[0]} and C >= 2, "
            f"got shape {logits.shape}"
        )

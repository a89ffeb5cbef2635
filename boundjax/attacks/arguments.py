"""Checks of what attacks are given."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from boundjax.attacks.objective import require_loss
from boundjax.stochastic import require_draws, use_of_key


def check_arguments(
    attack: str,
    f: Callable[..., Array],
    x: Array,
    labels: Array,
    eps: ArrayLike,
    norm: float,
    clip: tuple[float, float] | None,
    loss: str,
    draws: int | None,
    key: Array | None,
) -> None:
    """Checks the arguments that all attacks share; `attack` is the name of this one.

    Raises:
      ValueError: as `pgd`.
    """
    if norm not in (2, jnp.inf):
        raise ValueError(f"{attack} expects norm=2 or norm=inf, got norm={norm}")
    require_loss(loss)
    if clip is not None and not clip[0] <= clip[1]:
        raise ValueError(f"clip must be (lowest, highest) with lowest <= highest, got {clip}")
    if x.ndim == 0 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"{attack} expects x [B, ...] and labels [B], got shapes {x.shape} and {labels.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{attack} expects floating-point inputs, got x of type {x.dtype}")
    if jnp.ndim(eps) != 0:
        raise ValueError(f"{attack} expects a scalar eps, got shape {jnp.shape(eps)}")
    try:
        value = float(np.asarray(eps))
    except jax.errors.TracerArrayConversionError:
        value = 0.0  # a tracer has no value to check
    if not value >= 0.0:
        raise ValueError(f"eps must be >= 0, got {value}")
    _check_draws(attack, f, draws, key)
    logits = jax.eval_shape(f, x) if draws is None else jax.eval_shape(f, x, key)
    # Untyped callers may return anything.
    if not hasattr(logits, "ndim"):  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError(
            f"{attack} expects f to return logits [B, C], one array, got "
            f"{type(logits).__name__}; pick them, as in lambda x: f(x)[0]"
        )
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"{attack} expects f to return logits [B, C] with B={x.shape[0]} and C >= 2, "
            f"got shape {logits.shape}"
        )


def _check_draws(
    attack: str, f: Callable[..., Array], draws: int | None, key: Array | None
) -> None:
    use = use_of_key(f)
    if draws is None:
        if use == "required":
            raise ValueError(
                f"f takes a batch and a PRNG key: give {attack} draws=n, the number of draws of "
                "each gradient"
            )
        return
    require_draws(draws)
    if use == "none":
        raise ValueError(
            f"{attack} with draws expects f(x, key), got a function of a batch alone; leave out "
            "draws for a deterministic network"
        )
    if key is None:
        raise ValueError(f"{attack} with draws expects a PRNG key, got None")

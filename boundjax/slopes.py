"""Policies for the free slope of a relaxation: which lower line an unstable ReLU gets.

A policy maps bounds ``lower < 0 < upper`` around a kink at 0 to the free slope's position in
``[0, 1]`` (for a ReLU: the lower slope itself). Any position is sound; stable units do not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import jax.numpy as jnp
from chex import Array

SlopePolicy = Callable[[Array, Array], Array]


def adaptive(lower: Array, upper: Array) -> Array:
    """1 where ``upper > -lower``, else 0: the least area (Zhang et al. 2018, CROWN)."""
    return (upper > -lower).astype(lower.dtype)


def parallel(lower: Array, upper: Array) -> Array:
    """``upper / (upper - lower)``, parallel to the upper line.

    The choice of Fast-Lin (Weng et al. 2018) and of CAP (Wong & Kolter 2018).
    """
    unstable = (lower < 0) & (upper > 0)
    return jnp.where(unstable, upper / jnp.where(unstable, upper - lower, 1.0), 0.0)


def zero(lower: Array, upper: Array) -> Array:
    """0: the ReLU's lower line is ``y >= 0``."""
    return jnp.zeros_like(lower)


def one(lower: Array, upper: Array) -> Array:
    """1: the ReLU's lower line is ``y >= x``."""
    return jnp.ones_like(lower)


class _Constant:
    """Both lines constant, the ends of the op's image: interval bounds as a relaxation."""


CONSTANT = _Constant()

POLICIES: Mapping[str, SlopePolicy | _Constant] = {
    "adaptive": adaptive,
    "parallel": parallel,
    "zero": zero,
    "one": one,
    "constant": CONSTANT,
}


def resolve(
    slopes: str | SlopePolicy | Mapping[str, Array],
) -> Callable[[str], SlopePolicy | _Constant]:
    """From what a user gives as ``slopes=`` to the policy for the op of a given label.

    Args:
      slopes: a name in ``POLICIES``; a function of ``(lower, upper)``; or slopes by label (as
        returned under ``aux.slopes``), arrays that broadcast to the op's shape with values in
        ``[0, 1]``.

    Raises:
      ValueError: for an unknown name.
      KeyError: when an op has no slope in the mapping.
      TypeError: for anything else.
    """
    if isinstance(slopes, str):
        if slopes not in POLICIES:
            raise ValueError(f"slopes must be one of {', '.join(POLICIES)}, got {slopes!r}")
        policy = POLICIES[slopes]
        return lambda label: policy
    if isinstance(slopes, Mapping):
        return lambda label: _given(slopes, label)
    if callable(slopes):
        return lambda label: slopes
    raise TypeError(
        "slopes must be a policy's name, a function of (lower, upper) or a dict of arrays, "
        f"got {type(slopes).__name__}"
    )


def require_known(slopes: Mapping[str, Any], labels: Set[str]) -> None:
    """Raises KeyError where a key of ``slopes`` belongs to none of the function's ops."""
    unknown = sorted(key for key in slopes if key.removesuffix(":below") not in labels)
    if unknown:
        known = ", ".join(sorted(label for label in labels if label))
        raise KeyError(f"slopes has an entry {unknown[0]!r} for no op; known: {known}")


def _given(slopes: Mapping[str, Any], label: str) -> SlopePolicy:
    def position(lower: Array, upper: Array) -> Array:
        # Asked here: an op without a free slope (a max pool, a tanh) needs no entry.
        if label not in slopes:
            raise KeyError(f"slopes need an entry for {label!r}, got {sorted(slopes)}")
        # Outside [0, 1] a line would not bound the function; NaN stays NaN.
        value = jnp.asarray(slopes[label], lower.dtype)
        return jnp.broadcast_to(jnp.clip(value, 0.0, 1.0), lower.shape)

    return position

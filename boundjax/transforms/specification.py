"""Specifications: which linear functions of the output are bounded."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array


def margin_specification(
    labels: Array,
    num_classes: int,
    *,
    rows: Literal["others", "all"] = "others",
    dtype: jnp.dtype = jnp.float32,
) -> Array:
    """The coefficients of the margins `z_y - z_m` on the logits `z`.

    Args:
      labels: integer classes `y`, any shape `[...]`.
      num_classes: number of logits C.
      rows: `"others"`: one row per class but the label's, for
        `m = y + 1, ..., y + C - 1 (mod C)`; `"all"`: one per class, in order; row y is zero.
      dtype: of the result.

    Returns:
      `[..., C - 1, C]` or `[..., C, C]`; row `m` is `e_y - e_m`.

    Raises:
      ValueError: for another value of `rows`.
    """
    labels = jnp.asarray(labels)
    if rows == "others":
        steps = jnp.arange(1, num_classes, dtype=labels.dtype)
        others = (labels[..., None] + steps.reshape((1,) * labels.ndim + (-1,))) % num_classes
    elif rows == "all":
        classes = jnp.arange(num_classes, dtype=labels.dtype)
        others = jnp.broadcast_to(classes, (*labels.shape, num_classes))
    else:
        raise ValueError(f"rows must be 'others' or 'all', got {rows!r}")
    own = jax.nn.one_hot(labels, num_classes, dtype=dtype)[..., None, :]
    return own - jax.nn.one_hot(others, num_classes, dtype=dtype)

"""Specifications: the linear functions of the output to bound."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int


def margin_specification(
    labels: Int[ArrayLike, " ..."],
    num_classes: int,
    *,
    rows: Literal["others", "all"] = "others",
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "... m C"]:
    """The coefficients of the margins `z_y - z_m` on the logits `z`.

    Args:
      labels: integer classes `y`, any shape `[...]`.
      num_classes: number of logits C.
      rows: `"others"` for one row per class except the label's, for
        `m = y + 1, ..., y + C - 1 (mod C)`; `"all"` for one row per class, in order, where row y is
        zero.
      dtype: the dtype of the result.

    Returns:
      `[..., C - 1, C]` or `[..., C, C]`; row `m` is `e_y - e_m`.

    Raises:
      ValueError: for another value of `rows`.
    """
    labels = jnp.asarray(labels)
    if rows == "others":
        steps = jnp.arange(1, num_classes, dtype=labels.dtype)
        classes = (labels[..., None] + steps.reshape((1,) * labels.ndim + (-1,))) % num_classes
    elif rows == "all":
        classes = jnp.arange(num_classes, dtype=labels.dtype)
        classes = jnp.broadcast_to(classes, (*labels.shape, num_classes))
    else:
        raise ValueError(f"rows must be 'others' or 'all', got {rows!r}")
    correct = jax.nn.one_hot(labels, num_classes, dtype=dtype)[..., None, :]
    return correct - jax.nn.one_hot(classes, num_classes, dtype=dtype)

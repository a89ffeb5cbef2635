"""Measures of the tightness of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from boundjax.sets.input_set import InputTree, enclosing_ball
from boundjax.sets.inputs import inputs_of
from boundjax.transforms.lipschitz import lipschitz


def mean_translation(
    function: Callable[[Any], Float[Array, " C"]], input_set: InputTree, *, box: bool = True
) -> Float[Array, ""]:
    """Bounds how much the difference of two logits can grow, averaged over all pairs.

    `tau(x) = sum_(i != j) t(x; i, j) / (C (C - 1))`, where `t(x; i, j)` bounds the growth of
    `z_i - z_j` from the centre of the set's l2 ball. The difference between the values of LMT and
    of BCP measures what the boxes are worth.

    Args:
      function: maps one input to logits `[C]`.
      input_set: the perturbed inputs, or a pytree of sets and of constants.
      box: use the bounds of BCP, otherwise those of LMT (`boundjax.lipschitz`).

    Returns:
      A scalar `tau >= 0`, in units of logits.

    Source: Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound".
    """
    inputs = inputs_of(input_set)
    function, flat = inputs.applied(function), inputs.input_set
    center, _ = enclosing_ball(flat)
    logits = function(center)
    identity = np.eye(len(logits), dtype=logits.dtype)
    pairs = (identity[None, :, :] - identity[:, None, :])[~np.eye(len(logits), dtype=bool)]
    rows = jnp.asarray(pairs)
    # z_i - z_j grows from minus the clean value of a row to minus its lower bound.
    return jnp.mean(rows @ logits - lipschitz(function, box=box)(flat, rows).lower)

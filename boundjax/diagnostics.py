"""Measures of how tight bounds are."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.sets.input_set import InputSet
from boundjax.transforms.balls import enclosing_ball
from boundjax.transforms.lipschitz import lipschitz


def mean_translation(
    function: Callable[[Array], Array], input_set: InputSet, *, box: bool = True
) -> Array:
    """By how much the difference of two logits can grow, at most, on average over all pairs.

    ``tau(x) = sum_(i != j) t(x; i, j) / (C (C - 1))``, where ``t(x; i, j)`` bounds the growth of
    ``z_i - z_j`` from the centre of the set's l2 ball. What BCP takes away of LMT's value is how
    much the boxes are worth.

    Args:
      function: one input in, logits ``[C]`` out.
      input_set: the perturbed inputs.
      box: bounds by BCP, else by LMT (``boundjax.lipschitz``).

    Returns:
      A scalar ``tau >= 0``, in units of logits.

    Source: Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound".
    """
    center, _ = enclosing_ball(input_set)
    logits = function(center)
    identity = np.eye(len(logits), dtype=logits.dtype)
    pairs = (identity[None, :, :] - identity[:, None, :])[~np.eye(len(logits), dtype=bool)]
    rows = jnp.asarray(pairs)
    # z_i - z_j grows from minus the clean value of a row to minus its lower bound.
    return jnp.mean(rows @ logits - lipschitz(function, box=box)(input_set, rows).lower)

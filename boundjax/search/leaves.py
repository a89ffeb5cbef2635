"""Domains with nothing left to split, on which the network is affine: linear programs.

A solver proposes the weights of the rows and the multipliers of the splits; whatever it proposes is
only a start of a bound that holds by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, sparse

# Bounds on the sum of multipliers, tried in turn. On an empty domain it could be any.
MOST = (1e1, 1e3, 1e5)
_TOLERANCE = 1e-6  # of the solver


class Affine(NamedTuple):
    """Functions `coefficients x + bias` of the input.

    Attributes:
      coefficients: `[K, n]`.
      bias: `[K]`.
    """

    coefficients: Float[np.ndarray, "K n"]
    bias: Float[np.ndarray, " K"]


class Solution(NamedTuple):
    """What the solver proposes.

    Attributes:
      mix: `[R]`, weights of the rows, which sum to 1.
      multipliers: `[S]`, of the splits.
      point: `[n]`, where the largest of the rows is least.
      value: the largest row there.
      inside: whether the point lies in the domain; otherwise the domain is empty, up to tolerances.
    """

    mix: Float[np.ndarray, " R"]
    multipliers: Float[np.ndarray, " S"]
    point: Float[np.ndarray, " n"]
    value: float
    inside: bool


def solve(
    rows: Affine,
    splits: Affine,
    lower: Float[np.ndarray, " n"],
    upper: Float[np.ndarray, " n"],
    most: float,
) -> Solution | None:
    """Maximises the least value of `mix rows + multipliers splits` over a box, by HiGHS.

    That is the dual of: the least `t + most e` where all rows are at most `t` and all splits at
    most `e >= 0`.

    Args:
      rows: those of a conjunction.
      splits: at most 0 on the domain.
      lower, upper: the ends of the box.
      most: the largest sum of multipliers.

    Returns:
      None if the solver gives up.
    """
    count, size = len(rows.bias), len(rows.bias) + len(splits.bias)
    bound = np.zeros((size, 2))
    bound[:count, 0] = bound[count:, 1] = -1.0
    matrix = np.concatenate([np.concatenate([rows.coefficients, splits.coefficients]), bound], 1)
    limits = -np.concatenate([rows.bias, splits.bias])
    if not (np.isfinite(matrix).all() and np.isfinite(limits).all()):
        return None
    answer = optimize.linprog(
        np.append(np.zeros(len(lower)), [1.0, most]),
        sparse.csr_array(matrix),
        limits,
        bounds=[*zip(lower, upper, strict=True), (None, None), (0.0, None)],
        method="highs",
    )
    if answer.status != 0:
        return None
    dual = np.maximum(-np.asarray(answer.ineqlin.marginals), 0.0)
    *point, value, violation = answer.x
    return Solution(dual[:count], dual[count:], np.array(point), value, violation <= _TOLERANCE)

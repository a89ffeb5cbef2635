"""Linear constraints between the inputs of a property, and where a search meets them.

Bounds on a part of the box are those on the part's inputs that satisfy the constraints. A part
without such inputs needs none, and a counterexample must be one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Float64

from boundjax.search.leaves import Affine
from boundjax.sets.box import Box
from boundjax.sets.constrained import Constrained
from boundjax.sets.input_set import InputSet

# From the ends of a box to the inputs in it that count.
SetOf: TypeAlias = Callable[[Array, Array], InputSet]

# Passes over the rows: to tighten a part of the box, and to move a point.
_ROUNDS = 3
_MOVES = 8
# The relative error of a sum of products of float32 numbers in float64, per term, generously.
_LOST = 2.0**-50


@dataclasses.dataclass(frozen=True, eq=False)
class Constraints:
    """`lower <= rows x <= upper`, exactly these numbers.

    Attributes:
      rows: `[k, n]`.
      lower, upper: `[k]`, may be infinite.
    """

    rows: Float32[np.ndarray, "k n"]
    lower: Float32[np.ndarray, " k"]
    upper: Float32[np.ndarray, " k"]

    @classmethod
    def of(cls, input_set: Constrained) -> Constraints:
        """Those of a set of float32 numbers, the limits rounded outwards.

        Raises:
          ValueError: for rows that are no float32 numbers.
        """
        rows, *limits = map(np.asarray, input_set.outwards().constraints())
        lower, upper = (np.broadcast_to(limit, rows.shape[:1]) for limit in limits)
        return cls(rows.reshape(len(rows), -1), lower, upper)

    def cut(self, lower: Array, upper: Array) -> InputSet:
        """The part of a box `[n]` that satisfies them."""
        limits = jnp.asarray(self.upper), jnp.asarray(self.lower)
        return Constrained(Box(lower, upper), jnp.asarray(self.rows), *limits)

    def contain(self, x: Float32[np.ndarray, " n"]) -> bool:
        """Whether an input satisfies them, in exact arithmetic."""
        for row, low, high in zip(self.rows, self.lower, self.upper, strict=True):
            terms = (Fraction(float(row[i])) * Fraction(float(x[i])) for i in np.flatnonzero(row))
            value = sum(terms, Fraction(0))
            if (np.isfinite(high) and value > Fraction(float(high))) or (
                np.isfinite(low) and value < Fraction(float(low))
            ):
                return False
        return True

    def hold_at_middle(
        self, lower: Float32[np.ndarray, "N n"], upper: Float32[np.ndarray, "N n"]
    ) -> Bool[np.ndarray, " N"]:
        """Whether the middles of boxes satisfy them, up to the rounding of float64."""
        middle = np.clip(0.5 * lower + 0.5 * upper, lower, upper).astype(np.float64)
        values = middle @ self.rows.T.astype(np.float64)
        return np.asarray(((self.lower <= values) & (values <= self.upper)).all(axis=1))

    def after(self, splits: Affine) -> Affine:
        """Functions that are at most 0 on a domain, and after them those of the constraints."""
        parts = [(1.0, self.upper), (-1.0, self.lower)]
        coefficients, bias = [splits.coefficients], [splits.bias]
        for sign, limit in parts:
            finite = np.isfinite(limit)
            coefficients.append(sign * self.rows[finite].astype(np.float64))
            bias.append(-sign * limit[finite].astype(np.float64))
        return Affine(np.concatenate(coefficients), np.concatenate(bias))

    def exclude(
        self, lower: Float32[np.ndarray, "N n"], upper: Float32[np.ndarray, "N n"]
    ) -> Bool[np.ndarray, " N"]:
        """Which boxes surely hold no point, by tightening their ends with all errors charged."""
        low, high = lower.astype(np.float64), upper.astype(np.float64)
        rows = self.rows.astype(np.float64)
        empty = np.zeros(len(low), bool)
        for _ in range(_ROUNDS):
            for row, least, most in zip(rows, self.lower, self.upper, strict=True):
                ends = row * low, row * high
                size = np.maximum(*map(np.abs, ends)).sum(axis=1)
                lost = (len(row) + 4) * _LOST * size + np.finfo(np.float32).tiny
                up = np.float64(most) - np.minimum(*ends).sum(axis=1) + lost
                down = np.maximum(*ends).sum(axis=1) - np.float64(least) + lost
                empty |= (up < 0) | (down < 0)
                used = row != 0
                sizes = np.abs(row[used])
                up, down = (
                    np.maximum(room, 0.0)[:, None] / sizes * (1.0 + _LOST) for room in (up, down)
                )
                rises, falls = np.where(row[used] > 0, (up, down), (down, up))
                above, below = low[:, used] + rises, high[:, used] - falls
                above += _LOST * (np.abs(low[:, used]) + rises)
                below -= _LOST * (np.abs(high[:, used]) + falls)
                high[:, used] = np.minimum(high[:, used], above)
                low[:, used] = np.maximum(low[:, used], below)
            empty |= (low > high).any(axis=1)
        return empty

    def nearest(
        self,
        x: Float32[np.ndarray, " n"],
        lower: Float32[np.ndarray, " n"],
        upper: Float32[np.ndarray, " n"],
    ) -> Float32[np.ndarray, " n"]:
        """A point of the box near `x` that satisfies them, if a few projections lead to one."""
        point: Float64[np.ndarray, " n"] = x.astype(np.float64)
        rows = self.rows.astype(np.float64)
        for move in range(_MOVES):
            beyond = 4.0**move * 2.0**-24  # further, until rounding to float32 stays inside
            for row, low, high in zip(rows, self.lower, self.upper, strict=True):
                margin = beyond * (np.abs(row) @ np.abs(point))
                margin = min(margin, 0.5 * (float(high) - float(low)))
                value, square = row @ point, row @ row
                target = np.clip(value, low + margin, high - margin)
                if square > 0 and target != value:
                    point += row * ((target - value) / square)
            point = np.clip(point, lower, upper)
            rounded = point.astype(np.float32)
            if self.contain(rounded):
                return rounded
        return x

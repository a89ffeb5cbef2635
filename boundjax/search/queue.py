"""The domains of a tree that are not refuted yet."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from boundjax.search.leaves import Solution


@dataclasses.dataclass(frozen=True, eq=False)
class Queue:
    """Domains that are not refuted yet, in arrays with a leading axis.

    Attributes:
      member: the conjunction of each.
      signs: int8 `[N, A]`, of the units that are unstable on the whole box.
      positions: float16 `[N, B]`, of the free lines that matter.
      multipliers: `[N, A]`.
      mix: `[N, R]`.
      value: the lower bounds, float64.
      candidates, scores: see `Evaluated`; the candidates number the `A` units.
      node: their numbers in the record of the tree.
    """

    member: np.ndarray
    signs: np.ndarray
    positions: np.ndarray
    multipliers: np.ndarray
    mix: np.ndarray
    value: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray
    node: np.ndarray

    def __len__(self) -> int:
        return len(self.member)

    def take(self, indices: Any) -> Queue:
        """Some of the domains."""
        return Queue(*(array[indices] for array in self._arrays()))

    def followed_by(self, other: Queue) -> Queue:
        """These domains and then others."""
        pairs = zip(self._arrays(), other._arrays(), strict=True)
        return Queue(*map(np.concatenate, pairs))

    def with_parameters(
        self, positions: np.ndarray, multipliers: np.ndarray, mix: np.ndarray
    ) -> Queue:
        """These domains with other parameters."""
        return dataclasses.replace(self, positions=positions, multipliers=multipliers, mix=mix)

    def with_bounds(self, value: np.ndarray, candidates: np.ndarray, scores: np.ndarray) -> Queue:
        """These domains with the larger of two bounds each, and what to split."""
        value = np.fmax(self.value, value)
        return dataclasses.replace(self, value=value, candidates=candidates, scores=scores)

    @property
    def nbytes(self) -> int:
        """The memory of all arrays."""
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def at(leaf: Queue, solution: Solution) -> Queue:
    """A domain with the parameters of a solution."""
    mix, multipliers = np.zeros_like(leaf.mix), np.zeros_like(leaf.multipliers)
    mix[0, : len(solution.mix)] = solution.mix
    multipliers[0, leaf.signs[0] != 0] = solution.multipliers
    return dataclasses.replace(leaf, mix=mix, multipliers=multipliers)

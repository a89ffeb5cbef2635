"""Rows of a property, and when a bound on one proves that it is positive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from boundjax.properties import Conjunction

# The relative error of weights that are rounded to float64, and of sums in float64.
FLOAT64 = 2.0**-50
# Points with a row at most this far above 0 are shown to the runtime that decides.
NEARLY_UNSAFE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of all conjunctions of a case, stacked; the last one is repeated to make up `R`."""

    weights: np.ndarray  # float64 [R, m]
    single: np.ndarray  # float32 [R, m], the weights with which bounds are computed
    errors: np.ndarray  # float64 [R, m], at least the distance of `single` from the exact weights
    offset: np.ndarray  # float64 [R]
    member: np.ndarray  # int32 [R], the index of the row's conjunction

    @classmethod
    def of(cls, conjunctions: Sequence[Conjunction], rows: int) -> Rows:
        """The rows of these conjunctions; `rows` is at least their number."""
        counts = [len(c.offset) for c in conjunctions]
        index = np.minimum(np.arange(rows), sum(counts) - 1)
        weights = np.concatenate([c.weights for c in conjunctions])[index].astype(np.float64)
        with np.errstate(over="ignore"):  # an infinite weight proves nothing
            single = weights.astype(np.float32)
        single[np.abs(single) < np.finfo(np.float32).tiny] = 0.0  # XLA treats subnormals as 0
        return cls(
            weights,
            single,
            np.abs(weights - single) + FLOAT64 * np.abs(weights),
            np.concatenate([c.offset for c in conjunctions])[index],
            np.repeat(np.arange(len(counts), dtype=np.int32), counts)[index],
        )

    def alone(self, row: int, count: int) -> np.ndarray:
        """The weights `[count]` of the rows of a conjunction of which only `row` counts."""
        only = (np.arange(len(self.member)) == row).astype(np.float32)
        return self.of_conjunction(only, int(self.member[row]), count)

    def of_conjunction(self, mix: np.ndarray, conjunction: int, count: int) -> np.ndarray:
        """Weights of all rows, `[R]`, as those of the rows of one conjunction, `[count]`.

        Weights of repeated rows are added up, and rows that it does not have weigh nothing.
        """
        of_it, result = mix[self.member == conjunction], np.zeros(count, mix.dtype)
        np.add.at(result, np.minimum(np.arange(len(of_it)), count - 1), of_it)
        return result


def lost_of(errors: np.ndarray, offset: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Bounds what the rounding of the rows may change, `[..., R]`.

    Args:
      errors: `[..., R, m]`, of the weights.
      offset: `[..., R]`.
      largest: `[..., m]`, the largest magnitude of each output; one that is not finite makes the
        rows infinite in which that output has a weight.
    """
    finite = np.isfinite(largest)
    sizes = np.where(finite, largest, 0.0).astype(np.float64)
    unknown = ((errors != 0) & ~finite[..., None, :]).any(axis=-1)
    lost = (errors @ sizes[..., None])[..., 0] + FLOAT64 * np.abs(offset)
    return np.where(unknown, np.inf, lost)


def proved_values(
    lower: np.ndarray,
    weights: np.ndarray,
    offset: np.ndarray,
    outputs: np.ndarray,
    lost: np.ndarray | float = 0.0,
    inside: np.ndarray | bool = True,
) -> np.ndarray:
    """Proved lower bounds of the rows, `[..., R]`; -inf where nothing is proved.

    Args:
      lower: `[..., R]`, lower bounds of `weights @ y`.
      weights: `[..., R, m]`.
      offset: `[..., R]`.
      outputs: `[..., m]` at a point of the box.
      lost: `[..., R]`, errors that the bounds do not include yet.
      inside: whether that point is one of those for which the bounds are to hold.
    """
    lower, outputs = lower.astype(np.float64), outputs.astype(np.float64)
    value = lower + offset
    attained = (weights @ outputs[..., None])[..., 0] + offset
    # A lower bound above an attained value is wrong. NaN compares as False.
    with np.errstate(invalid="ignore"):
        proved = np.isfinite(lower) & ((value <= attained + lost) | np.logical_not(inside))
        return np.where(proved, value - lost, -np.inf)

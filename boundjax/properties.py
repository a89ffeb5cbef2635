"""Properties of a network: which inputs are asked about, and which outputs would be unsafe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Conjunction:
    """Unsafe outputs: all ``y`` with ``weights @ y + offset <= 0`` in every row. Ties are unsafe.

    Attributes:
      weights: float64 ``[k, m]`` for ``k`` rows and ``m`` outputs.
      offset: float64 ``[k]``.
      exact: per row the weights that are not 0, by output, and the offset, before both were rounded
        to float64. None where the arrays are the exact numbers.
    """

    weights: np.ndarray
    offset: np.ndarray
    exact: tuple[tuple[dict[int, Fraction], Fraction], ...] | None = dataclasses.field(
        default=None, repr=False
    )

    def contains(self, outputs: np.ndarray) -> bool:
        """Whether outputs ``[m]`` are unsafe, decided in exact arithmetic on these very numbers.

        An infinite output is larger than any number. One that is NaN is no value, nor is a row in
        which infinities cancel: then the outputs are not unsafe.

        Raises:
          ValueError: for another number of outputs than the rows have weights.
        """
        outputs = np.asarray(outputs).reshape(-1)
        weights, offset = np.asarray(self.weights), np.asarray(self.offset)
        if len(outputs) != weights.shape[1]:
            raise ValueError(f"expected {weights.shape[1]} outputs, got {len(outputs)}")
        if np.isnan(outputs).any():
            return False
        if np.isinf(outputs).any():
            return all(_holds(row, constant, outputs) for row, constant in self._exact_rows())
        # Most outputs are so far from unsafe that float64 cannot be wrong about it.
        with np.errstate(all="ignore"):
            sizes = np.abs(outputs).astype(np.float64)
            values = weights @ outputs.astype(np.float64) + offset
            terms = np.abs(weights) @ sizes + np.abs(offset)
            if (values > (len(outputs) + 8) * 2.0**-50 * terms + 1e-290).any():
                return False
        return all(_holds(row, constant, outputs) for row, constant in self._exact_rows())

    def _exact_rows(self) -> Iterator[tuple[dict[int, Fraction], Fraction]]:
        if self.exact is not None:
            yield from self.exact
            return
        for row, constant in zip(self.weights, self.offset, strict=True):
            terms = {int(i): Fraction(row[i].item()) for i in np.flatnonzero(row)}
            yield terms, Fraction(constant.item())


def _holds(row: dict[int, Fraction], constant: Fraction, outputs: np.ndarray) -> bool:
    """Whether the weights of a row times outputs that are not NaN, and a constant, are <= 0."""
    infinite = {
        np.sign(outputs[i]) * (1 if w > 0 else -1) for i, w in row.items() if np.isinf(outputs[i])
    }
    if infinite:
        return infinite == {-1}
    return sum((w * Fraction(outputs[i].item()) for i, w in row.items()), constant) <= 0


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs and the unsafe sets of outputs; one input that reaches one is unsafe.

    Attributes:
      lower, upper: float32 ``[n]``; the box of the file with its decimals rounded outward, so that
        no input is lost: what is proved of it holds for the file's box.
      inner_lower, inner_upper: float32 ``[n]``; the same rounded inward, in which counterexamples
        are looked for. An input without a float32 between its bounds (both ``0.1``, say) is fixed
        at the float32 nearest to their middle, the only meaning that a float32 network can give it.
      conjunctions: an output is unsafe if it lies in any of them.
    """

    lower: np.ndarray
    upper: np.ndarray
    inner_lower: np.ndarray
    inner_upper: np.ndarray
    conjunctions: tuple[Conjunction, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """What a file asserts: the network is unsafe if it is so in any of the cases.

    Attributes:
      input_size: inputs ``X_0, ...``: the input tensor flattened in C order.
      output_size: outputs ``Y_0, ...``, likewise.
      cases: at least one, with different boxes.
    """

    input_size: int
    output_size: int
    cases: tuple[Case, ...]

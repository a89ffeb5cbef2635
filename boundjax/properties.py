"""Properties of a network: boxes of inputs, and the outputs that would be unsafe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import Float32, Float64, Num


@dataclasses.dataclass(frozen=True, eq=False)
class Conjunction:
    """The unsafe outputs `y` with `weights @ y + offset <= 0` in every row; ties are unsafe.

    Attributes:
      weights: float64 `[k, m]` for `k` rows and `m` outputs.
      offset: float64 `[k]`.
      exact: for each row the nonzero weights by output, and the offset, before rounding to float64.
        None if the arrays are the exact numbers.
    """

    weights: Float64[np.ndarray, "k m"]
    offset: Float64[np.ndarray, " k"]
    exact: tuple[tuple[dict[int, Fraction], Fraction], ...] | None = dataclasses.field(
        default=None, repr=False
    )

    def contains(self, outputs: Num[np.ndarray, " m"]) -> bool:
        """Whether outputs `[m]` are unsafe, decided in exact arithmetic on these very numbers.

        An infinite output is larger than any number. Outputs are not unsafe if one of them is NaN,
        or if infinities cancel in a row, because the row then has no value.

        Raises:
          ValueError: if the number of outputs is not that of the weights in a row.
        """
        outputs = np.asarray(outputs).reshape(-1)
        weights, offset = np.asarray(self.weights), np.asarray(self.offset)
        if len(outputs) != weights.shape[1]:
            raise ValueError(f"expected {weights.shape[1]} outputs, got {len(outputs)}")
        if np.isnan(outputs).any():
            return False
        if np.isinf(outputs).any():
            return all(_holds(row, constant, outputs) for row, constant in self._exact_rows())
        # Most outputs are too far from unsafe for float64 to be wrong.
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
    """Whether a row of weights times outputs, plus a constant, is <= 0; no output is NaN."""
    infinite = {
        np.sign(outputs[i]) * (1 if w > 0 else -1) for i, w in row.items() if np.isinf(outputs[i])
    }
    if infinite:
        return infinite == {-1}
    return sum((w * Fraction(outputs[i].item()) for i, w in row.items()), constant) <= 0


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs and the unsafe outputs; the case is unsafe if an input reaches one of them.

    Attributes:
      lower, upper: float32 `[n]`; the file's box with its decimals rounded outward, so that it
        loses no input and proofs hold for the file's box.
      inner_lower, inner_upper: float32 `[n]`; the box rounded inward, in which counterexamples are
        searched. An input without a float32 between its bounds (both `0.1`, say) is fixed at the
        float32 nearest to their middle, the only meaning that a float32 network can give it.
      conjunctions: an output is unsafe if any of them contains it.
    """

    lower: Float32[np.ndarray, " n"]
    upper: Float32[np.ndarray, " n"]
    inner_lower: Float32[np.ndarray, " n"]
    inner_upper: Float32[np.ndarray, " n"]
    conjunctions: tuple[Conjunction, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """The assertion of a file; the network is unsafe if any of the cases is.

    Attributes:
      input_size: number of inputs `X_0, ...`, the input tensor flattened in C order.
      output_size: number of outputs `Y_0, ...`, flattened likewise.
      cases: one or more, with different boxes.
    """

    input_size: int
    output_size: int
    cases: tuple[Case, ...]

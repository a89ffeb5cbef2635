"""What a search answers."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Num

from boundjax.search.proof import Proof
from boundjax.typing import PyTree

Verdict = Literal["sat", "unsat", "unknown", "timeout"]


@dataclasses.dataclass(frozen=True, eq=False)
class Counterexample:
    """An unsafe input and its outputs.

    Attributes:
      inputs: in the shape of the input; `[n]`, flattened in C order, where a file asks; a pytree
        where the function takes one.
      outputs: likewise.
    """

    inputs: Float32[np.ndarray, ...] | PyTree
    outputs: Num[np.ndarray, ...]


class Round(NamedTuple):
    """How far a branch and bound was after one of its rounds.

    Attributes:
      seconds: since the search began.
      domains: how many domains had been bounded.
      still_open: how many were not refuted.
      least: the least of their lower bounds; everything is refuted above 0.
    """

    seconds: float
    domains: int
    still_open: int
    least: float


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The answer to one property.

    Attributes:
      verdict: `"unsat"`: it is proved that no input is unsafe; `"sat"`: the counterexample is
        unsafe; `"unknown"`: everything was tried; `"timeout"`: time ran out before that.
      counterexample: an unsafe input if the verdict is `"sat"`, else None.
      seconds: wall-clock time, including compilation.
      note: one line about anything that failed in the search, such as the attack, or about what
        `"complete"` left open; else empty. The verdict holds nevertheless.
      margins: float64, for each conjunction in order (of all cases): a number that the largest of
        its rows is proved to reach at every input; positive if the conjunction is refuted, else
        -inf. Searches stop at what suffices, so the least value may be much larger.
      proof: what `boundjax.save_proof` writes, if the verdict is `"unsat"` and a proof was asked
        for; None also if it was too large to be kept.
      rounds: how a search that split units came to its end.
    """

    verdict: Verdict
    counterexample: Counterexample | None
    seconds: float
    note: str = ""
    margins: Float64[np.ndarray, " K"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    proof: Proof | None = dataclasses.field(default=None, repr=False)
    rounds: tuple[Round, ...] = dataclasses.field(default=(), repr=False)

    @property
    def proved(self) -> bool:
        """Whether the property is proved: no input is unsafe."""
        return self.verdict == "unsat"

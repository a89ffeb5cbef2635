"""Branch and bound over boxes: a box is cut in halves until every part of it is refuted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from boundjax.properties import Case
from boundjax.search import limits
from boundjax.search.boxes import Halves, halve
from boundjax.search.method import Method
from boundjax.search.programs import Programs
from boundjax.search.proof import Case as ProvedCase
from boundjax.search.proof import Leaf, Recorder
from boundjax.search.rows import FLOAT64, NEARLY_UNSAFE, Rows, lost_of, proved_values

_ATTACK_EVERY = 16  # batches of sub-boxes


class Search(Protocol):
    """What the splits ask of the search that they are a part of; methods may end the search.

    Attributes:
      cases, programs: what is decided, and the compiled functions of the network.
      rows: those of each case.
      max_queue_bytes: memory of the open boxes at which the splits end.
    """

    cases: tuple[Case, ...]
    programs: Programs
    rows: list[Rows]
    max_queue_bytes: int

    @property
    def open(self) -> list[np.ndarray]:
        """For each case, which of its conjunctions are not refuted yet."""
        ...

    def check_time(self) -> None:
        """Ends the search when its time is over."""
        ...

    def confirm(self, case: Case, x: np.ndarray) -> None:
        """Ends the search if an input is unsafe."""
        ...

    def descend(
        self,
        pairs: Sequence[tuple[int, int]],
        lower: np.ndarray,
        upper: np.ndarray,
        start: np.ndarray,
    ) -> np.ndarray:
        """Attacks pairs of a case and a conjunction."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Boxes:
    """Boxes that are open for some conjunctions, in arrays with a leading axis.

    Attributes:
      lower, upper: `[N, n]`.
      source: the case of each.
      open: bool `[N, C]`, the conjunctions that are not refuted.
      node: their numbers in the record of their case.
    """

    lower: np.ndarray
    upper: np.ndarray
    source: np.ndarray
    open: np.ndarray
    node: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: Any) -> _Boxes:
        """Some of the boxes."""
        return _Boxes(*(array[indices] for array in self._arrays()))

    def followed_by(self, *parts: _Boxes) -> _Boxes:
        """These boxes and then others."""
        arrays = zip(self._arrays(), *(other._arrays() for other in parts), strict=True)
        return _Boxes(*map(np.concatenate, arrays))

    @property
    def nbytes(self) -> int:
        """The memory of all arrays."""
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


class InputSplits:
    """The search on the boxes of all cases at once.

    Attributes:
      least: `[cases, C]`, the least positive bounds of conjunctions on the boxes where they are
        refuted, see `Result.margins`; after the search -inf unless that is everywhere.
      reason: why the search ended without an answer; empty before.
    """

    def __init__(self, search: Search, with_proof: bool = False) -> None:
        """Stacks the rows of the cases."""
        self._search, self._cases = search, search.cases
        self._programs, self._constraints = search.programs, search.programs.constraints
        rows = search.rows
        self._weights, self._single, self._errors, self._offset, self._member = (
            np.stack([getattr(r, name) for r in rows])
            for name in ("weights", "single", "errors", "offset", "member")
        )
        conjunctions = [c for case in self._cases for c in case.conjunctions]
        self._joint = any(len(c.offset) > 1 for c in conjunctions)
        # The relative error of a mean of rows in float32, in any order of its sum.
        self._mixing = (self._member.shape[1] + 1) * 2.0**-23 if self._joint else 0.0
        self._width = np.stack([case.inner_upper - case.inner_lower for case in self._cases])
        self._records = [Recorder(off=not with_proof) for _ in self._cases]
        self._roots = np.concatenate([record.roots(1) for record in self._records])
        self.least = np.full((len(self._cases), max(map(len, search.open))), np.inf)
        self.reason = ""

    def decide(self, method: Method) -> Literal["unsat", "unknown"]:
        """Bounds sub-boxes and halves those that stay open, until none is left or time is up.

        Both halves of a box contain the float32 at which it is cut, so they cover it. The answer is
        unknown, with a `reason`, if an open box has no float32 left between the ends of any input,
        or if the open boxes take too much memory.
        """
        still_open = np.zeros(self.least.shape, bool)
        for index, flags in enumerate(self._search.open):
            still_open[index, : len(flags)] = flags
        lower = np.stack([case.lower for case in self._cases])
        upper = np.stack([case.upper for case in self._cases])
        boxes = _Boxes(lower, upper, np.arange(len(self._cases)), still_open, self._roots)
        undecided = batches = 0
        while len(boxes):
            self._search.check_time()
            few = self._programs.few_boxes
            size = few if len(boxes) <= 2 * few else self._programs.boxes
            first = max(0, len(boxes) - size)
            rest, taken = boxes.take(slice(0, first)), boxes.take(slice(first, None))
            if self._constraints is not None:
                taken = taken.take(~self._constraints.exclude(taken.lower, taken.upper))
                if not len(taken):
                    boxes = rest
                    continue
            taken, influence, points, outputs = self._bounded(taken, size, method)
            looked = self._look(taken, points, outputs)
            batches += 1
            if batches % _ATTACK_EVERY == 0:
                self._look_closer(taken, points, looked)
            kept = np.any(taken.open, axis=1)
            taken = taken.take(kept)
            halves, stuck = halve(
                taken.lower, taken.upper, influence[kept], self._width[taken.source]
            )
            undecided += int(stuck.sum())
            self._give_up(taken.take(stuck))
            taken = taken.take(~stuck)
            parts = self._record_cuts(taken, halves)
            boxes = rest.followed_by(
                *(
                    dataclasses.replace(taken, lower=half[0], upper=half[1], node=part)
                    for half, part in zip(halves, parts, strict=True)
                )
            )
            if boxes.nbytes > self._search.max_queue_bytes:
                kept = boxes.nbytes, self._search.max_queue_bytes
                self.reason = limits.full(len(boxes), "boxes", *kept)
                self._give_up(boxes)
                return "unknown"
        if undecided:
            self.reason = f"{undecided} boxes are undecided and hold no float32 to be cut at"
        return "unknown" if undecided else "unsat"

    def _give_up(self, boxes: _Boxes) -> None:
        """Notes what these boxes leave open."""
        box, conjunction = np.nonzero(boxes.open)
        self.least[boxes.source[box], conjunction] = -np.inf

    def proof(self) -> list[ProvedCase]:
        """The trees of all cases, once every conjunction is refuted."""
        return [
            ProvedCase(record, dict.fromkeys(range(len(case.conjunctions)), 0))
            for record, case in zip(self._records, self._cases, strict=True)
        ]

    def _bounded(
        self, boxes: _Boxes, size: int, method: Method
    ) -> tuple[_Boxes, np.ndarray, np.ndarray, np.ndarray]:
        """Refutes conjunctions by bounds on boxes, in a batch that copies fill up.

        Returns:
          The boxes, and influence, points and outputs of `SubBoxes`.
        """
        source, count = boxes.source, len(boxes)
        fill, offset = np.minimum(np.arange(size), count - 1), self._offset[source]
        arguments = (
            boxes.lower,
            boxes.upper,
            self._single[source],
            offset.astype(np.float32),
            self._member[source],
            boxes.open,
        )
        split = self._programs.split(method, self._joint)
        results = split(*(self._programs.parts(a[fill]) for a in arguments))
        mixes, bounds, largest, influence, points, outputs = (
            np.asarray(a)[:count] for a in results
        )
        mix = mixes.astype(np.float64)
        weights, offset = mix @ self._weights[source], (mix @ offset[..., None])[..., 0]
        errors = mix @ (self._errors[source] + self._mixing * np.abs(self._weights[source]))
        if self._joint:  # XLA treats subnormal products and sums as 0
            errors += 2.0 * mix.shape[-1] * np.finfo(np.float32).tiny
        lost = lost_of(errors, offset, largest)
        inside: np.ndarray | bool = True
        if self._constraints is not None:
            inside = self._constraints.hold_at_middle(boxes.lower, boxes.upper)[:, None]
        values = proved_values(bounds, weights, offset, outputs[:, 0], lost, inside)
        refuted = boxes.open & (values > 0)
        box, conjunction = np.nonzero(refuted)
        # The weights of a mean sum to 1 up to their own rounding.
        total = mix[refuted].sum(axis=1) * (1.0 + FLOAT64)
        np.minimum.at(self.least, (source[box], conjunction), values[refuted] / total)
        for index, of_it in zip(box.tolist(), conjunction.tolist(), strict=True):
            self._record_leaf(boxes, index, of_it, mixes[index, of_it])
        boxes = dataclasses.replace(boxes, open=boxes.open & ~refuted)
        return boxes, influence, points, outputs

    def _record_leaf(self, boxes: _Boxes, index: int, conjunction: int, mix: np.ndarray) -> None:
        """Notes that a mean of the rows of a conjunction is positive on one of the boxes."""
        case = int(boxes.source[index])
        count = len(self._cases[case].conjunctions[conjunction].offset)
        mix = self._search.rows[case].of_conjunction(mix, conjunction, count)
        nothing = np.zeros(0, np.float16), np.zeros(0, np.float32)
        self._records[case].prove(int(boxes.node[index]), conjunction, Leaf(mix, *nothing))

    def _record_cuts(self, boxes: _Boxes, halves: Halves) -> tuple[np.ndarray, np.ndarray]:
        """Notes how boxes are cut; the nodes of the halves, in their order."""
        (_, first_upper), (second_lower, upper) = halves
        parts = np.zeros((2, len(boxes)), int)
        axis = (first_upper != upper).argmax(axis=1)
        at = second_lower[np.arange(len(axis)), axis]
        for case in np.unique(boxes.source):
            of_case = boxes.source == case
            cut = boxes.node[of_case], axis[of_case], at[of_case]
            parts[:, of_case] = self._records[case].split_inputs(*cut).T[::-1]
        return parts[0], parts[1]

    def _look(
        self, boxes: _Boxes, points: np.ndarray, outputs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks for counterexamples to open conjunctions among points `[N, 2, n]` of sub-boxes.

        Returns, for each sub-box, the value nearest to unsafe, and its point and conjunction.
        """
        source, flags = boxes.source, boxes.open
        scores = np.full((*outputs.shape[:2], flags.shape[1]), -np.inf)
        for case in np.unique(source):
            rows, indices = self._search.rows[case], np.flatnonzero(source == case)
            values = outputs[indices].astype(np.float64) @ rows.weights.T + rows.offset
            for row, conjunction in enumerate(rows.member):
                score = np.maximum(scores[indices, :, conjunction], values[..., row])
                scores[indices, :, conjunction] = score
        scores = np.where(np.isnan(scores) | ~flags[:, None, :], np.inf, scores)
        flat = scores.reshape(len(source), -1)
        best = flat.argmin(axis=1)
        nearest = flat[np.arange(len(source)), best]
        point, conjunction = np.divmod(best, flags.shape[1])
        for i in np.argsort(nearest)[:4]:
            if nearest[i] <= NEARLY_UNSAFE:
                self._search.confirm(self._cases[source[i]], points[i, point[i]])
        return nearest, point, conjunction

    def _look_closer(
        self,
        boxes: _Boxes,
        points: np.ndarray,
        looked: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> None:
        """Attacks the sub-boxes that came nearest to unsafe, each from its nearest point."""
        nearest, point, conjunction = looked
        order = np.argsort(nearest)
        order = order[np.isfinite(nearest[order])]
        if not len(order):
            return
        indices = order[np.arange(self._programs.particles) % len(order)]
        cases = [self._cases[c] for c in boxes.source[indices]]
        inner_lower = np.stack([case.inner_lower for case in cases])
        inner_upper = np.stack([case.inner_upper for case in cases])
        self._search.descend(
            [*zip(boxes.source[indices], conjunction[indices], strict=True)],
            np.clip(boxes.lower[indices], inner_lower, inner_upper),
            np.clip(boxes.upper[indices], inner_lower, inner_upper),
            points[indices, point[indices]],
        )

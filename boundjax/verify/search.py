"""The search for a counterexample or a proof of one property."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from chex import Array

from boundjax.verify.programs import LADDER, Programs, power_above
from boundjax.vnnlib import Case, Conjunction, Property

# A row counts as positive above this much of float32 rounding: absolute, and of the row's terms.
ABSOLUTE_SLACK = 1e-6
RELATIVE_SLACK = 1e-5
INPUT_SLACK = 1e-6  # of the terms in the input: steep networks magnify the rounding of the box

_FEW_BOXES = 16
_MAX_WORKLIST_BYTES = 2**30
_HOPELESS = 2.0  # times the time that is left
_ATTACK_EVERY = 16  # batches of sub-boxes
_MAX_ASPECT = 8.0  # of widths, relative to the box that is split


@dataclasses.dataclass(frozen=True, eq=False)
class Counterexample:
    """An unsafe input ``[n]`` and its outputs ``[m]``, both flattened in C order, float32."""

    inputs: np.ndarray
    outputs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The answer to one property.

    Attributes:
      verdict: ``"unsat"``: proved, no input of the boxes is unsafe; ``"sat"``: the counterexample
        is unsafe; ``"unknown"``: everything was tried; ``"timeout"``: not everything was.
      counterexample: with ``"sat"``, else None.
      seconds: wall-clock time, compilation included.
    """

    verdict: str
    counterexample: Counterexample | None
    seconds: float


class _Found(Exception):
    """Ends a search with a verdict."""

    def __init__(self, verdict: str, counterexample: Counterexample | None = None):
        super().__init__(verdict)
        self.verdict, self.counterexample = verdict, counterexample


def verify(
    model_single: Callable[[Array], Array],
    property: Property,
    *,
    method: str = "alpha-crown",
    timeout: float = 60.0,
    input_shape: Sequence[int] | None = None,
    evaluate: Callable[[np.ndarray], np.ndarray] | None = None,
    programs: Programs | None = None,
    max_split_inputs: int = 20,
    seed: int = 0,
) -> Result:
    """Decides whether a network can be unsafe: attack, bounds, and splitting of the input box.

    A proof holds for the network in real arithmetic up to the rounding of the bounds, which are
    computed in float32: a lower bound must exceed ``1e-6 + 1e-5 * (|offset| + |weights| |y|)``
    with ``y`` the outputs at the centre, and also ``1e-5`` of the row's largest weight times the
    largest value inside the network (for a part of a box ``1e-6`` of the relaxation's
    ``|coefficients| |x|``), and must not lie above the row's value there. Bounds that are NaN or
    infinite prove nothing. An input is a counterexample only if ``evaluate`` says so.

    Args:
      model_single: one example ``[*input_shape]`` -> outputs of any shape, float32.
      property: what ``boundjax.vnnlib.load`` read.
      method: the tightest bounds to try: ``"interval"``, ``"crown-ibp"``, ``"crown"`` or
        ``"alpha-crown"``; cheaper ones come first.
      timeout: seconds of wall-clock time. Looked at between compiled calls, which take seconds, and
        longer with alpha-CROWN on a large network.
      input_shape: ``[input_size]`` where not given.
      evaluate: the arbiter of counterexamples, ``[n] -> [m]`` in numpy: another runtime, say; the
        model itself where not given.
      programs: compiled code of an earlier call with the same model, to be used again.
      max_split_inputs: boxes with at most this many inputs of positive width are split.
      seed: of the random points.

    Returns:
      A ``Result``.

    Raises:
      ValueError: for an unknown method, a timeout that is not positive, or a property whose inputs
        or outputs are not as many as the model's.
      UnsupportedOpError: at an op that is not in ``supported_ops()``.
    """
    start = time.monotonic()
    if method not in LADDER:
        raise ValueError(f"method must be one of {', '.join(LADDER)}, got {method!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, in seconds, got {timeout}")
    if programs is None:
        programs = Programs(model_single, input_shape or (property.input_size,))
    for kind in ("input_size", "output_size"):
        expected, got = getattr(programs, kind), getattr(property, kind)
        if expected != got:
            what = kind.removesuffix("_size")
            raise ValueError(f"the model has {expected} {what}s, but the property declares {got}")
    if evaluate is None:
        evaluate = lambda x: np.asarray(programs.forward(jnp.asarray(x)))  # noqa: E731
    search = _Search(programs, property, evaluate, start + timeout, max_split_inputs, seed)
    try:
        search.run(method)
    except _Found as found:
        return Result(found.verdict, found.counterexample, time.monotonic() - start)
    raise AssertionError("a search ends with a verdict")


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """All conjunctions of a case, stacked: ``R`` rows, the last ones repeated."""

    weights: np.ndarray  # float64 [R, m]
    offset: np.ndarray  # float64 [R]
    member: np.ndarray  # int32 [R], the conjunction of each row

    @classmethod
    def of(cls, conjunctions: Sequence[Conjunction], rows: int) -> _Rows:
        counts = [len(c.offset) for c in conjunctions]
        index = np.minimum(np.arange(rows), sum(counts) - 1)
        return cls(
            np.concatenate([c.weights for c in conjunctions])[index],
            np.concatenate([c.offset for c in conjunctions])[index],
            np.repeat(np.arange(len(counts), dtype=np.int32), counts)[index],
        )


def _positive(
    lower: np.ndarray,
    weights: np.ndarray,
    offset: np.ndarray,
    outputs: np.ndarray,
    sizes: np.ndarray | None = None,
) -> np.ndarray:
    """Which rows are proved positive: ``[..., R]`` from bounds on ``weights @ y``.

    Args:
      lower: ``[..., R]``.
      weights: ``[..., R, m]``.
      offset: ``[..., R]``.
      outputs: ``[..., m]`` at a point of the box.
      sizes: ``[..., R]``, of the bounds' terms in the input, or inside the network.
    """
    lower, outputs = lower.astype(np.float64), outputs.astype(np.float64)
    value = lower + offset
    reached = (weights @ outputs[..., None])[..., 0] + offset
    terms = np.abs(offset) + (np.abs(weights) @ np.abs(outputs)[..., None])[..., 0]
    slack = ABSOLUTE_SLACK + RELATIVE_SLACK * terms
    if sizes is not None:
        slack = slack + INPUT_SLACK * sizes
    # A lower bound above a value is no bound: rounding has won. False for NaN, too.
    return np.isfinite(lower) & (value > slack) & (value <= reached + slack)


class _Search:
    """One property's state: which conjunctions of which case are not refuted yet."""

    def __init__(
        self,
        programs: Programs,
        property: Property,
        evaluate: Callable[[np.ndarray], np.ndarray],
        deadline: float,
        max_split_inputs: int,
        seed: int,
    ):
        self.programs, self.property, self.evaluate = programs, property, evaluate
        self.deadline, self.max_split_inputs = deadline, max_split_inputs
        self.random = np.random.default_rng(seed)
        cases = property.cases
        count = max(sum(len(c.offset) for c in case.conjunctions) for case in cases)
        self.rows = [_Rows.of(case.conjunctions, power_above(count)) for case in cases]
        self.open = [np.ones(len(case.conjunctions), bool) for case in cases]

    def run(self, method: str) -> None:
        """Raises ``_Found``."""
        ladder = LADDER[: LADDER.index(method) + 1]
        self.attack(rounds=4)
        if all(self.is_splittable(case) for case in self.property.cases):
            self.split(method)
        for rung in ladder:
            if rung == "alpha-crown":
                self.attack(rounds=8)
            self.bound(rung)
        self.attack(rounds=16)
        raise _Found("unknown")

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise _Found("timeout")

    def check_time_to_compile(self, method: str) -> None:
        """A compiled call cannot be stopped; one that will not end in time is not begun.

        A method takes no less than the cheaper ones before it took.
        """
        known = self.programs.first_call
        left = self.deadline - time.monotonic()
        if method not in known and max(known.values(), default=0.0) > _HOPELESS * left:
            raise _Found("timeout")

    def is_splittable(self, case: Case) -> bool:
        return np.count_nonzero(case.inner_lower < case.inner_upper) <= self.max_split_inputs

    def confirm(self, case: Case, x: np.ndarray) -> None:
        """Ends the search if the arbiter finds an input unsafe, after rounding into the box."""
        x = np.clip(x, case.inner_lower, case.inner_upper).astype(np.float32)
        outputs = np.asarray(self.evaluate(x)).reshape(-1)
        for conjunction in case.conjunctions:
            if (conjunction.weights @ outputs.astype(np.float64) + conjunction.offset <= 0).all():
                raise _Found("sat", Counterexample(x, outputs))

    def bound(self, method: str) -> None:
        """Refutes what bounds over the whole boxes can; ends the search when that is all."""
        self.check_time_to_compile(method)
        function, start = self.programs.bounds(method), time.monotonic()
        for case, rows, still_open in zip(self.property.cases, self.rows, self.open, strict=True):
            if not still_open.any():
                continue
            self.check_time()
            specification = jnp.asarray(rows.weights.astype(np.float32))
            found = function(jnp.asarray(case.lower), jnp.asarray(case.upper), specification)
            lower, outputs, largest, reach = map(np.asarray, found)
            self.programs.first_call.setdefault(method, time.monotonic() - start)
            # At points more exactly than by intervals, which may be far too wide.
            inside = np.maximum(largest * (RELATIVE_SLACK / INPUT_SLACK), reach)  # NaN stays NaN
            sizes = np.abs(rows.weights).max(axis=1, initial=0.0) * inside
            positive = _positive(lower, rows.weights, rows.offset, outputs, sizes)
            still_open[rows.member[positive]] = False
        if not any(still_open.any() for still_open in self.open):
            raise _Found("unsat")

    def attack(self, rounds: int) -> None:
        """Looks for counterexamples of all open conjunctions, most of all the nearest ones."""
        pairs = [(c, k) for c, still in enumerate(self.open) for k in np.flatnonzero(still)]
        best = np.full(len(pairs), np.inf)
        for index in range(rounds):
            self.check_time()
            order = np.argsort(best, kind="stable")[: max(1, len(pairs) >> index)]
            chosen = order[np.arange(self.programs.particles) % len(order)]
            cases = [self.property.cases[pairs[i][0]] for i in chosen]
            lower = np.stack([case.inner_lower for case in cases])
            upper = np.stack([case.inner_upper for case in cases])
            start = self.random.uniform(size=lower.shape).astype(np.float32)
            start[1::2] = np.round(start[1::2])  # corners
            if index == 0:
                start[: len(pairs)] = 0.5
            values = self.descend(
                [pairs[i] for i in chosen], lower, upper, lower + start * (upper - lower)
            )
            np.minimum.at(best, chosen, values)

    def descend(
        self,
        pairs: Sequence[tuple[int, int]],
        lower: np.ndarray,
        upper: np.ndarray,
        start: np.ndarray,
    ) -> np.ndarray:
        """Runs the attack for ``P`` (case, conjunction) pairs; values ``[P]``, infinite for NaN."""
        found = [self.property.cases[c].conjunctions[k] for c, k in pairs]
        count = power_above(
            max(len(k.offset) for case in self.property.cases for k in case.conjunctions)
        )
        repeated = [_Rows.of([conjunction], count) for conjunction in found]
        arrays = (
            lower,
            upper,
            np.clip(start, lower, upper),
            np.stack([rows.weights for rows in repeated]),
            np.stack([rows.offset for rows in repeated]),
        )
        points, values = self.programs.attack(
            *(jnp.asarray(a.astype(np.float32)) for a in arrays), jnp.float32(0.25)
        )
        points, values = np.asarray(points), np.asarray(values).astype(np.float64)
        values = np.where(np.isnan(values), np.inf, values)
        for i in np.argsort(values)[:4]:
            # Another runtime rounds differently: a value slightly above 0 may still be unsafe.
            if values[i] <= ABSOLUTE_SLACK:
                self.confirm(self.property.cases[pairs[i][0]], points[i])
        return values

    def split(self, method: str) -> None:
        """Bounds sub-boxes and halves those that stay open, until none is left or time is up.

        Both halves hold the float32 at which a box is cut, so nothing of it is lost. A box whose
        inputs have no float32 left between their ends cannot be cut: then the answer is unknown.
        """
        cases, function = self.property.cases, self.programs.split(method)
        conjunctions = max(len(still_open) for still_open in self.open)
        weights = np.stack([rows.weights for rows in self.rows])
        offset = np.stack([rows.offset for rows in self.rows])
        member = np.stack([rows.member for rows in self.rows])
        width = np.stack([case.inner_upper - case.inner_lower for case in cases])
        lower = np.stack([case.lower for case in cases])
        upper = np.stack([case.upper for case in cases])
        origin = np.arange(len(cases))
        still_open = np.zeros((len(cases), conjunctions), bool)
        for index, flags in enumerate(self.open):
            still_open[index, : len(flags)] = flags
        undecided, batches = False, 0
        while len(origin):
            self.check_time()
            size = _FEW_BOXES if len(origin) <= 2 * _FEW_BOXES else self.programs.boxes
            size = min(size, self.programs.boxes)
            taken = slice(max(0, len(origin) - size), None)
            rest = slice(0, taken.start)
            box_lower, box_upper = lower[taken], upper[taken]
            source, flags = origin[taken], still_open[taken]
            count = len(source)
            fill = np.minimum(np.arange(size), count - 1)
            rows_open = np.take_along_axis(flags, member[source], axis=1)
            arguments = (
                box_lower,
                box_upper,
                weights[source].astype(np.float32),
                offset[source].astype(np.float32),
                member[source],
                rows_open,
            )
            found = function(*(jnp.asarray(a[fill]) for a in arguments))
            bounds, sizes, influence, points, outputs = (np.asarray(a)[:count] for a in found)
            positive = _positive(bounds, weights[source], offset[source], outputs[:, 0], sizes)
            flags = flags.copy()
            box, row = np.nonzero(positive)
            flags[box, member[source][box, row]] = False
            looked = self.look(source, flags, points, outputs)
            batches += 1
            if batches % _ATTACK_EVERY == 0:
                self.look_closer(source, box_lower, box_upper, points, looked)
            kept = flags.any(axis=1)
            halves, stuck = _halve(
                box_lower[kept], box_upper[kept], influence[kept], width[source[kept]]
            )
            undecided |= bool(stuck.any())
            remaining = kept.nonzero()[0][~stuck]
            lower = np.concatenate([lower[rest], halves[0][0], halves[1][0]])
            upper = np.concatenate([upper[rest], halves[0][1], halves[1][1]])
            origin = np.concatenate([origin[rest], source[remaining], source[remaining]])
            still_open = np.concatenate([still_open[rest], flags[remaining], flags[remaining]])
            if lower.nbytes > _MAX_WORKLIST_BYTES:
                raise _Found("unknown")
        raise _Found("unknown" if undecided else "unsat")

    def look(
        self, source: np.ndarray, flags: np.ndarray, points: np.ndarray, outputs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks at points ``[N, 2, n]`` of sub-boxes for counterexamples of open conjunctions.

        Returns, per sub-box, the value nearest to unsafe, at which point and for which conjunction.
        """
        scores = np.full((*outputs.shape[:2], flags.shape[1]), -np.inf)
        for case in np.unique(source):
            rows, mine = self.rows[case], np.flatnonzero(source == case)
            values = outputs[mine].astype(np.float64) @ rows.weights.T + rows.offset
            for row, conjunction in enumerate(rows.member):
                found = scores[mine, :, conjunction]
                scores[mine, :, conjunction] = np.maximum(found, values[..., row])
        scores = np.where(np.isnan(scores) | ~flags[:, None, :], np.inf, scores)
        flat = scores.reshape(len(source), -1)
        best = flat.argmin(axis=1)
        nearest = flat[np.arange(len(source)), best]
        point, conjunction = np.divmod(best, flags.shape[1])
        for i in np.argsort(nearest)[:4]:
            if nearest[i] <= ABSOLUTE_SLACK:
                self.confirm(self.property.cases[source[i]], points[i, point[i]])
        return nearest, point, conjunction

    def look_closer(
        self,
        source: np.ndarray,
        lower: np.ndarray,
        upper: np.ndarray,
        points: np.ndarray,
        looked: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> None:
        """Attacks the sub-boxes that came nearest to unsafe, each within itself."""
        nearest, point, conjunction = looked
        order = np.argsort(nearest)
        order = order[np.isfinite(nearest[order])]
        if not len(order):
            return
        chosen = order[np.arange(self.programs.particles) % len(order)]
        cases = [self.property.cases[c] for c in source[chosen]]
        inner_lower = np.stack([case.inner_lower for case in cases])
        inner_upper = np.stack([case.inner_upper for case in cases])
        self.descend(
            [*zip(source[chosen], conjunction[chosen], strict=True)],
            np.clip(lower[chosen], inner_lower, inner_upper),
            np.clip(upper[chosen], inner_lower, inner_upper),
            points[chosen, point[chosen]],
        )


def _halve(
    lower: np.ndarray, upper: np.ndarray, influence: np.ndarray, width: np.ndarray
) -> tuple[tuple[tuple[np.ndarray, np.ndarray], ...], np.ndarray]:
    """Cuts boxes ``[N, n]`` in two, where the inputs that matter are widest.

    Args:
      lower, upper: the boxes.
      influence: of each input on what is to be proved.
      width: of the boxes that these come from; 0 for fixed inputs.

    Returns:
      The two halves of the boxes that can be cut, and which cannot ``[N]``.
    """
    middle = 0.5 * lower + 0.5 * upper
    can_cut = (lower < middle) & (middle < upper)
    stuck = ~can_cut.any(axis=1)
    influence = np.where(np.isfinite(influence), influence, 0.0)
    relative = (upper - lower) / np.where(width > 0, width, np.inf)
    # Coefficients say nothing of inputs whose relaxation has slope 0; every input is cut at last.
    widest = np.where(can_cut, relative, 0.0).max(axis=1, keepdims=True)
    can_cut &= relative * _MAX_ASPECT >= widest
    score = _normalized(influence) + 0.1 * _normalized(relative)
    axis = np.where(can_cut, score, -1.0).argmax(axis=1)[~stuck]
    lower, upper, middle = lower[~stuck], upper[~stuck], middle[~stuck]
    index = np.arange(len(axis))
    first_upper, second_lower = upper.copy(), lower.copy()
    first_upper[index, axis] = middle[index, axis]
    second_lower[index, axis] = middle[index, axis]
    return ((lower, first_upper), (second_lower, upper)), stuck


def _normalized(values: np.ndarray) -> np.ndarray:
    largest = values.max(axis=1, keepdims=True)
    return values / np.where(largest > 0, largest, 1.0)

"""The search for a counterexample or a proof of one property."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.verify.boxes import halve
from boundjax.verify.programs import LADDER, Programs, power_above
from boundjax.vnnlib import Case, Conjunction, Property

# Bounds hold in whatever arithmetic. A row counts as positive above this much more, absolute and of
# the row's terms, for what their error analysis only assumes: the accuracy of functions.
ABSOLUTE_SLACK = 1e-6
RELATIVE_SLACK = 1e-5
_FLOAT64 = 2.0**-50  # of weights and outputs, for their rounding to float64 and its sums

_FEW_BOXES = 16
_MAX_WORKLIST_BYTES = 2**30
_HOPELESS = 2.0  # times the time that is left
_ATTACK_EVERY = 16  # batches of sub-boxes


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
      note: one line on what the search had to do without, such as an attack that failed; else
        empty. The verdict holds nevertheless.
    """

    verdict: str
    counterexample: Counterexample | None
    seconds: float
    note: str = ""


class _Decided(Exception):
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

    A proof holds for the network in real arithmetic, and for any float32 program that computes the
    same ops, in whatever order it adds. Bounds are computed in float32 and moved down by all that
    its rounding may change: per op ``gamma(n)`` times the sum of the absolute values of its ``n``
    terms over the box, weighed by the coefficients of the rows behind it, and the rounding of the
    rows' own weights (``boundjax.verify.rounding`` has the rules, and says what is not promised).
    Besides, a lower bound must exceed ``1e-6 + 1e-5 * (|offset| + |weights| |y|)`` with ``y`` the
    outputs at the centre, and must not lie above the row's value there. Bounds that are NaN or
    infinite prove nothing. An input is a counterexample only if the outputs that ``evaluate`` gives
    for it satisfy the rows in exact arithmetic.

    An attack that fails, for want of a gradient say, is replaced by points that are only looked at;
    the result's ``note`` says so.

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
    except _Decided as decided:
        seconds = time.monotonic() - start
        return Result(decided.verdict, decided.counterexample, seconds, search.note)
    raise AssertionError("a search ends with a verdict")


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """All conjunctions of a case, stacked: ``R`` rows, the last ones repeated."""

    weights: np.ndarray  # float64 [R, m]
    single: np.ndarray  # float32 [R, m], the weights that bounds are computed with
    errors: np.ndarray  # float64 [R, m], at least the distance of these from the exact weights
    offset: np.ndarray  # float64 [R]
    member: np.ndarray  # int32 [R], the conjunction of each row

    @classmethod
    def of(cls, conjunctions: Sequence[Conjunction], rows: int) -> _Rows:
        counts = [len(c.offset) for c in conjunctions]
        index = np.minimum(np.arange(rows), sum(counts) - 1)
        weights = np.concatenate([c.weights for c in conjunctions])[index].astype(np.float64)
        with np.errstate(over="ignore"):  # an infinite weight proves nothing
            single = weights.astype(np.float32)
        single[np.abs(single) < np.finfo(np.float32).tiny] = 0.0  # as XLA takes a subnormal number
        return cls(
            weights,
            single,
            np.abs(weights - single) + _FLOAT64 * np.abs(weights),
            np.concatenate([c.offset for c in conjunctions])[index],
            np.repeat(np.arange(len(counts), dtype=np.int32), counts)[index],
        )


def _lost(errors: np.ndarray, offset: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """What the rounding of the rows may change, ``[..., R]``.

    Args:
      errors: ``[..., R, m]``, of the weights.
      offset: ``[..., R]``.
      largest: ``[..., m]``, magnitudes of the outputs; what is not finite counts where a row has a
        weight.
    """
    finite = np.isfinite(largest)
    sizes = np.where(finite, largest, 0.0).astype(np.float64)
    unknown = ((errors != 0) & ~finite[..., None, :]).any(axis=-1)
    lost = (errors @ sizes[..., None])[..., 0] + _FLOAT64 * np.abs(offset)
    return np.where(unknown, np.inf, lost)


def _positive(
    lower: np.ndarray,
    weights: np.ndarray,
    offset: np.ndarray,
    outputs: np.ndarray,
    lost: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Which rows are proved positive: ``[..., R]`` from bounds on ``weights @ y``.

    Args:
      lower: ``[..., R]``.
      weights: ``[..., R, m]``.
      offset: ``[..., R]``.
      outputs: ``[..., m]`` at a point of the box.
      lost: ``[..., R]``, what the bounds do not allow for yet.
    """
    lower, outputs = lower.astype(np.float64), outputs.astype(np.float64)
    value = lower + offset
    reached = (weights @ outputs[..., None])[..., 0] + offset
    terms = np.abs(offset) + (np.abs(weights) @ np.abs(outputs)[..., None])[..., 0]
    slack = ABSOLUTE_SLACK + RELATIVE_SLACK * terms + lost
    # A lower bound above a value is no bound: rounding has won. False for NaN, too.
    with np.errstate(invalid="ignore"):
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

    @property
    def note(self) -> str:
        """What the search did without, in one line; empty for nothing."""
        reasons = self.programs.failures
        if "look" in reasons:
            return f"no point was attacked: evaluating the model failed ({reasons['look']})"
        if "attack" in reasons:
            return (
                "points were looked at but not moved: the attack by gradients failed "
                f"({reasons['attack']})"
            )
        return ""

    def run(self, method: str) -> None:
        """Raises ``_Decided``."""
        ladder = LADDER[: LADDER.index(method) + 1]
        self.attack(rounds=4)
        if all(self.is_splittable(case) for case in self.property.cases):
            self.split(method)
        for rung in ladder:
            if rung == "alpha-crown":
                self.attack(rounds=8)
            self.bound(rung)
        self.attack(rounds=16)
        raise _Decided("unknown")

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise _Decided("timeout")

    def check_time_to_compile(self, method: str) -> None:
        """A compiled call cannot be stopped; one that will not end in time is not begun.

        A method takes no less than the cheaper ones before it took.
        """
        known = self.programs.first_call
        left = self.deadline - time.monotonic()
        if method not in known and max(known.values(), default=0.0) > _HOPELESS * left:
            raise _Decided("timeout")

    def is_splittable(self, case: Case) -> bool:
        return np.count_nonzero(case.inner_lower < case.inner_upper) <= self.max_split_inputs

    def confirm(self, case: Case, x: np.ndarray) -> None:
        """Ends the search if the arbiter finds an input unsafe, after rounding into the box."""
        x = np.clip(x, case.inner_lower, case.inner_upper).astype(np.float32)
        outputs = np.asarray(self.evaluate(x)).reshape(-1)
        for conjunction in case.conjunctions:
            if conjunction.contains(outputs):
                raise _Decided("sat", Counterexample(x, outputs))

    def bound(self, method: str) -> None:
        """Refutes what bounds over the whole boxes can; ends the search when that is all."""
        self.check_time_to_compile(method)
        function, start = self.programs.bounds(method), time.monotonic()
        for case, rows, still_open in zip(self.property.cases, self.rows, self.open, strict=True):
            if not still_open.any():
                continue
            self.check_time()
            arguments = case.lower, case.upper, rows.single
            bounds = function(*map(jnp.asarray, arguments))
            lower, outputs, largest = map(np.asarray, bounds)
            self.programs.first_call.setdefault(method, time.monotonic() - start)
            lost = _lost(rows.errors, rows.offset, largest)
            positive = _positive(lower, rows.weights, rows.offset, outputs, lost)
            still_open[rows.member[positive]] = False
        if not any(still_open.any() for still_open in self.open):
            raise _Decided("unsat")

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
        conjunctions = [self.property.cases[c].conjunctions[k] for c, k in pairs]
        count = power_above(
            max(len(k.offset) for case in self.property.cases for k in case.conjunctions)
        )
        repeated = [_Rows.of([conjunction], count) for conjunction in conjunctions]
        arrays = (
            lower,
            upper,
            np.clip(start, lower, upper),
            np.stack([rows.weights for rows in repeated]),
            np.stack([rows.offset for rows in repeated]),
        )
        points, values = self.moved(*(a.astype(np.float32) for a in arrays))
        values = np.where(np.isnan(values), np.inf, values)
        for i in np.argsort(values)[:4]:
            # Another runtime rounds differently: a value slightly above 0 may still be unsafe.
            if values[i] <= ABSOLUTE_SLACK:
                self.confirm(self.property.cases[pairs[i][0]], points[i])
        return values

    def moved(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The points of ``Programs.attack`` and their values, float64 ``[P]``.

        An attack that fails must not cost a proof: the points are only looked at then, and if the
        network fails there as well, they have infinite values.
        """
        for name in ("attack", "look"):
            if name in self.programs.failures:
                continue
            try:
                points, values = getattr(self.programs, name)(
                    *map(jnp.asarray, arrays), jnp.float32(0.25)
                )
                return np.asarray(points), np.asarray(values).astype(np.float64)
            except MemoryError:
                raise
            except Exception as error:  # whatever a model raises when it is differentiated
                text = " ".join(f"{type(error).__name__}: {error}".split())
                self.programs.failures[name] = text if len(text) <= 300 else text[:297] + "..."
        start = arrays[2]
        return start, np.full(len(start), np.inf)

    def split(self, method: str) -> None:
        """Bounds sub-boxes and halves those that stay open, until none is left or time is up.

        Both halves hold the float32 at which a box is cut, so nothing of it is lost. A box whose
        inputs have no float32 left between their ends cannot be cut: then the answer is unknown.
        """
        cases, function = self.property.cases, self.programs.split(method)
        conjunctions = max(len(still_open) for still_open in self.open)
        weights = np.stack([rows.weights for rows in self.rows])
        single = np.stack([rows.single for rows in self.rows])
        errors = np.stack([rows.errors for rows in self.rows])
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
                single[source],
                offset[source].astype(np.float32),
                member[source],
                rows_open,
            )
            results = function(*(jnp.asarray(a[fill]) for a in arguments))
            bounds, largest, influence, points, outputs = (np.asarray(a)[:count] for a in results)
            lost = _lost(errors[source], offset[source], largest)
            positive = _positive(bounds, weights[source], offset[source], outputs[:, 0], lost)
            flags = flags.copy()
            box, row = np.nonzero(positive)
            flags[box, member[source][box, row]] = False
            looked = self.look(source, flags, points, outputs)
            batches += 1
            if batches % _ATTACK_EVERY == 0:
                self.look_closer(source, box_lower, box_upper, points, looked)
            kept = flags.any(axis=1)
            halves, stuck = halve(
                box_lower[kept], box_upper[kept], influence[kept], width[source[kept]]
            )
            undecided |= bool(stuck.any())
            remaining = kept.nonzero()[0][~stuck]
            lower = np.concatenate([lower[rest], halves[0][0], halves[1][0]])
            upper = np.concatenate([upper[rest], halves[0][1], halves[1][1]])
            origin = np.concatenate([origin[rest], source[remaining], source[remaining]])
            still_open = np.concatenate([still_open[rest], flags[remaining], flags[remaining]])
            if lower.nbytes > _MAX_WORKLIST_BYTES:
                raise _Decided("unknown")
        raise _Decided("unknown" if undecided else "unsat")

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

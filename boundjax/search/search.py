"""Searches for a counterexample to one property, or a proof of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Num

from boundjax.properties import Case, Property
from boundjax.search.inputs import InputSplits
from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES, checked_bytes
from boundjax.search.method import LADDER, METHODS, Method
from boundjax.search.programs import Programs, power_above
from boundjax.search.proof import Case as ProvedCase
from boundjax.search.proof import Proof
from boundjax.search.result import Counterexample, Result, Round, Verdict
from boundjax.search.rows import NEARLY_UNSAFE, Rows, lost_of, proved_values
from boundjax.search.tree import Tree
from boundjax.sets.rounding import Rounding
from boundjax.typing import Device

_HOPELESS = 2.0  # a call is not begun if a cheaper one took this many times the remaining time
_TINY = 32  # elements of the largest value of networks that intervals often decide
_FAR, _NEAR = 0.25, 0.02  # first steps of attacks from anywhere, and from near to unsafe points

# Floating-point inputs `[n]` to outputs `[m]`.
Evaluate = Callable[[Num[np.ndarray, " n"]], Num[np.ndarray, " m"]]


class _Decided(Exception):
    """Ends a search with a verdict."""

    def __init__(self, verdict: Verdict, counterexample: Counterexample | None = None):
        super().__init__(verdict)
        self.verdict: Verdict = verdict
        self.counterexample = counterexample


def verify(
    model_single: Callable[[Float32[Array, "*input_shape"]], Array],
    property: Property,
    *,
    method: Method = "alpha-crown",
    timeout: float = 60.0,
    rounding: Rounding = "float32",
    input_shape: Sequence[int] | None = None,
    evaluate: Evaluate | None = None,
    programs: Programs | None = None,
    devices: Sequence[Device] | None = None,
    max_bytes: int | None = None,
    max_queue_bytes: int = MAX_QUEUE_BYTES,
    max_split_inputs: int = 20,
    seed: int = 0,
    with_proof: bool = False,
    count_compilation: bool = True,
) -> Result:
    """Decides whether a network can be unsafe: attack, bounds, splits of the box and of units.

    By default a proof holds for the network in real arithmetic, and for any float32 program that
    computes the same ops, whatever the order of its additions: `rounding="float32"` of
    `boundjax.linear`. The rounding of the weights of the rows is charged in addition. A lower bound
    that is larger than the row's value at the centre is wrong and proves nothing, nor does one that
    is NaN or infinite. An input is a counterexample only if the outputs that `evaluate` computes
    for it satisfy the rows in exact arithmetic.

    If an attack fails, for example because the model has no gradient, points are evaluated without
    moving them, and the result's `note` says so.

    Args:
      model_single: the network as a function of one example `[*input_shape]`, float32; its output
        may have any shape.
      property: a property, as `boundjax.vnnlib.load` reads it. If its rows weigh inputs, too, then
        `model_single` and `programs` give all that they weigh, see
        `boundjax.search.network.weighed`, and `evaluate` `Property.weighed`.
      method: the tightest bounds to try, after all cheaper ones: `"interval"`, `"crown-ibp"`,
        `"crown"` or `"alpha-crown"`; or `"complete"`: after CROWN, branch and bound that splits the
        units of piecewise linear ops, such as ReLUs, see `boundjax.search.tree`.
      timeout: seconds of wall-clock time. It is checked between compiled calls, which take seconds,
        and longer with alpha-CROWN on a large network.
      rounding: what a proof holds for, see `boundjax.linear`.
      input_shape: the shape of one example; `[input_size]` by default.
      evaluate: decides counterexamples, `[n] -> [m]` in numpy, for example with another runtime; by
        default the model itself.
      programs: the compiled functions of an earlier call with the same model and rounding.
      devices, max_bytes: those of the `Programs`, where none are passed: the devices that divide
        batches, and the memory that one call may take on each (2 ** 30).
      max_queue_bytes: the host's memory for the parts of the box that are still open; while some
        are added it may be twice as much. Where it does not suffice the verdict is `"unknown"`, the
        `note` says so, and `margins` has what is proved.
      max_split_inputs: boxes with at most this many inputs of positive width are split.
      seed: seed of the random points.
      with_proof: whether the result has a `proof`; needs the method `"complete"`.
      count_compilation: whether the time that it takes to compile counts.

    Returns:
      The verdict, with a counterexample if there is one.

    Raises:
      ValueError: for an unknown method or rounding, a timeout that is not positive, or a property
        whose number of inputs or outputs is not the model's; for `devices` or `max_bytes` beside
        `programs`, or as `Programs`.
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      NoProofError: unless `rounding` is `"nearest"`: at an op whose rounding nobody states, and on
        any device but a CPU.
    """
    start = time.monotonic()
    if with_proof and method != "complete":
        raise ValueError(f"with_proof=True needs method='complete', got {method!r}")
    constrained = programs is not None and programs.constraints is not None
    if with_proof and (constrained or property.on_inputs):
        raise ValueError("with_proof=True needs inputs without constraints: no checker reads them")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, in seconds, got {timeout}")
    checked_bytes(max_queue_bytes, "max_queue_bytes")
    if programs is None:
        shape = input_shape or (property.input_size,)
        programs = Programs(
            model_single,
            shape,
            rounding=rounding,
            max_bytes=MAX_BYTES if max_bytes is None else max_bytes,
            devices=devices,
        )
    elif devices is not None or max_bytes is not None:
        raise ValueError("devices and max_bytes are those of the programs; state them to Programs")
    elif programs.rounding != rounding:
        raise ValueError(
            f"the programs were made with rounding={programs.rounding!r}, got {rounding!r}"
        )
    followed = len(property.products) + (property.input_size if property.on_inputs else 0)
    for what, expected, got in (
        ("input", programs.input_size, property.input_size),
        ("output", programs.output_size - followed, property.output_size),
    ):
        if expected != got:
            raise ValueError(f"the model has {expected} {what}s, but the property declares {got}")
    if evaluate is None:
        evaluate = functools.partial(_evaluate, programs)
    clock = time.monotonic if count_compilation else programs.network.clock
    deadline = timeout + (start if count_compilation else clock())
    search = _Search(
        programs,
        property,
        evaluate,
        clock,
        deadline,
        max_split_inputs,
        seed,
        with_proof,
        max_queue_bytes,
    )
    try:
        with programs.on_device():
            search.run(method)
    except _Decided as decided:
        seconds = time.monotonic() - start
        margins = np.concatenate(search.margins)
        proof = search.proof if decided.verdict == "unsat" else None
        return Result(
            decided.verdict,
            decided.counterexample,
            seconds,
            search.note,
            margins,
            proof,
            tuple(search.rounds),
        )


def _evaluate(programs: Programs, x: np.ndarray) -> np.ndarray:
    return np.asarray(programs.forward(jnp.asarray(x)))


class _Search:
    """The state of one search.

    Attributes:
      rows: of each case.
      margins: of each case, see `Result`; a conjunction is refuted if its margin is positive.
    """

    def __init__(
        self,
        programs: Programs,
        property: Property,
        evaluate: Evaluate,
        clock: Callable[[], float],
        deadline: float,
        max_split_inputs: int,
        seed: int,
        with_proof: bool = False,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
    ):
        self.programs, self.property, self.evaluate = programs, property, evaluate
        self.clock, self.deadline = clock, deadline
        self.max_split_inputs, self.max_queue_bytes = max_split_inputs, max_queue_bytes
        self.random = np.random.default_rng(seed)
        cases = self.cases = property.cases
        count = max(sum(len(c.offset) for c in case.conjunctions) for case in cases)
        self.rows = [Rows.of(case.conjunctions, power_above(count)) for case in cases]
        self.margins = [np.full(len(case.conjunctions), -np.inf) for case in cases]
        self.undecided = ""
        self.with_proof = with_proof
        self.proved: list[ProvedCase] = []
        self.begun = time.monotonic()
        self.rounds: list[Round] = []

    @property
    def proof(self) -> Proof | None:
        """What is proved, if it was asked for and kept."""
        if not self.with_proof or any(case.recorder.off for case in self.proved):
            return None
        return Proof(self.property, self.programs.rounding, tuple(self.proved))

    @property
    def open(self) -> list[np.ndarray]:
        """Which conjunctions of each case are not refuted yet, bool `[K]`."""
        return [~(margins > 0) for margins in self.margins]

    @property
    def note(self) -> str:
        """What failed in the search, in one line; empty if nothing did."""
        reasons = self.programs.failures
        if "look" in reasons:
            return f"no point was attacked: evaluating the model failed ({reasons['look']})"
        if "attack" in reasons:
            return (
                "points were looked at but not moved: the attack by gradients failed "
                f"({reasons['attack']})"
            )
        return self.undecided

    def run(self, method: Method) -> NoReturn:
        """Runs the search, which ends with `_Decided`."""
        # Branch and bound tries the worst inputs of its bounds, and attacks again in between.
        self.attack(rounds=1 if method == "complete" else 4)
        if all(self.is_splittable(case) for case in self.property.cases):
            tiny = self.programs.network.largest <= _TINY
            if tiny and not self.with_proof:  # of which it would not be a part
                self.bound("interval")  # compiles in a third of the time of the splits
            self.split_inputs("crown" if method == "complete" else method)
        if method == "complete":
            self.search_domains()
        for rung in LADDER[: LADDER.index(method) + 1]:
            if rung == "alpha-crown":
                self.attack(rounds=8)
            self.bound(rung)
        self.attack(rounds=16)
        raise _Decided("unknown")

    def split_inputs(self, method: Method) -> NoReturn:
        """Refutes the conjunctions of every box on sub-boxes, see `inputs`."""
        splits = InputSplits(self, self.with_proof)
        verdict = splits.decide(method)
        if verdict == "unsat":
            self.proved = splits.proof()
        for margins, reached in zip(self.margins, splits.least, strict=True):
            everywhere = ~(margins > 0) & np.isfinite(reached[: len(margins)])
            np.copyto(margins, reached[: len(margins)], where=everywhere)
        self.undecided = splits.reason
        raise _Decided(verdict)

    def search_domains(self) -> NoReturn:
        """Refutes the conjunctions of every box on domains, see `tree`."""
        for index, case in enumerate(self.property.cases):
            around = _AroundBox(self, index)
            tree = Tree(
                self.programs.domains,
                case,
                case.conjunctions,
                around,
                self.with_proof,
                self.max_queue_bytes,
                self.programs.constraints,
            )
            self.margins[index] = tree.margins  # which it updates, even if time runs out
            if tree.refutes():
                self.proved.append(tree.proof())
            else:
                self.undecided = tree.reason
        if not any(still_open.any() for still_open in self.open):
            raise _Decided("unsat")
        self.attack(rounds=16)
        raise _Decided("unknown")

    def check_time(self) -> None:
        if self.clock() > self.deadline:
            raise _Decided("timeout")

    def check_time_to_compile(self, method: Method) -> None:
        """Ends the search before a method that will not end in time, since no call can be stopped.

        A method takes at least as long as the cheaper ones before it.
        """
        seconds = self.programs.first_call
        left = self.deadline - self.clock()
        if method not in seconds and max(seconds.values(), default=0.0) > _HOPELESS * left:
            raise _Decided("timeout")

    def is_splittable(self, case: Case) -> bool:
        return int((case.inner_lower < case.inner_upper).sum()) <= self.max_split_inputs

    def confirm(self, case: Case, x: np.ndarray) -> None:
        """Ends the search if `evaluate` says that an input, clipped to the box, is unsafe."""
        x = np.clip(x, case.inner_lower, case.inner_upper).astype(np.float32)
        constraints = self.programs.constraints
        if constraints is not None and not constraints.contain(x):
            x = constraints.nearest(x, case.inner_lower, case.inner_upper)
            if not constraints.contain(x):
                return
        outputs = np.asarray(self.evaluate(x)).reshape(-1)
        for conjunction in case.conjunctions:
            if conjunction.contains(outputs):
                raise _Decided("sat", Counterexample(x, outputs))

    def bound(self, method: Method) -> None:
        """Refutes conjunctions by bounds over whole boxes; ends the search if none is left."""
        self.check_time_to_compile(method)
        function, start = self.programs.bounds(method), self.clock()
        for index, (case, rows) in enumerate(zip(self.property.cases, self.rows, strict=True)):
            if not self.open[index].any():
                continue
            self.check_time()
            arguments = case.lower, case.upper, rows.single
            bounds = function(*map(jnp.asarray, arguments))
            lower, outputs, largest = map(np.asarray, bounds)
            self.programs.first_call.setdefault(method, self.clock() - start)
            lost = lost_of(rows.errors, rows.offset, largest)
            constraints = self.programs.constraints
            inside = constraints is None or constraints.hold_at_middle(
                case.lower[None], case.upper[None]
            )
            values = proved_values(lower, rows.weights, rows.offset, outputs, lost, inside)
            np.maximum.at(self.margins[index], rows.member, values)
        if not any(still_open.any() for still_open in self.open):
            raise _Decided("unsat")

    def attack(self, rounds: int) -> None:
        """Attacks all open conjunctions, and in every further round the nearer half of them."""
        pairs = [(c, k) for c, still in enumerate(self.open) for k in np.flatnonzero(still)]
        best = np.full(len(pairs), np.inf)
        for index in range(rounds):
            self.check_time()
            order = np.argsort(best, kind="stable")[: max(1, len(pairs) >> index)]
            indices = order[np.arange(self.programs.particles) % len(order)]
            cases = [self.property.cases[pairs[i][0]] for i in indices]
            lower = np.stack([case.inner_lower for case in cases])
            upper = np.stack([case.inner_upper for case in cases])
            start = self.random.uniform(size=lower.shape).astype(np.float32)
            start[1::2] = np.round(start[1::2])  # corners
            if index == 0:
                start[: len(pairs)] = 0.5
            of_points, start = [pairs[i] for i in indices], lower + start * (upper - lower)
            np.minimum.at(best, indices, self.descend(of_points, lower, upper, start))
            if all(self.is_splittable(case) for case in cases):
                start = self.best_of_many(of_points, lower, upper)
                values = self.descend(of_points, lower, upper, start, scale=_NEAR)
                np.minimum.at(best, indices, values)

    def best_of_many(
        self,
        pairs: Sequence[tuple[int, int]],
        lower: np.ndarray,
        upper: np.ndarray,
    ) -> np.ndarray:
        """For each of `P` pairs (case, conjunction) the random point `[P, n]` nearest to unsafe.

        In a few dimensions random points come near to everything, and cost less than descents.
        """
        shape = len(pairs), self.programs.samples, lower.shape[1]
        share = self.random.uniform(size=shape).astype(np.float32)
        points = lower[:, None] + share * (upper - lower)[:, None]
        best = self.attempt("nearest", points, *self.rows_of(pairs))
        return points[:, 0] if best is None else np.asarray(best)

    def descend(
        self,
        pairs: Sequence[tuple[int, int]],
        lower: np.ndarray,
        upper: np.ndarray,
        start: np.ndarray,
        scale: float = _FAR,
    ) -> np.ndarray:
        """Attacks `P` pairs (case, conjunction); returns values `[P]`, infinite instead of NaN."""
        start = np.clip(start, lower, upper)
        points, values = self.moved(lower, upper, start, *self.rows_of(pairs), scale=scale)
        values = np.where(np.isnan(values), np.inf, values)
        for i in np.argsort(values)[:4]:
            # Another runtime rounds differently and may call a value slightly above 0 unsafe.
            if values[i] <= NEARLY_UNSAFE:
                self.confirm(self.property.cases[pairs[i][0]], points[i])
        return values

    def rows_of(self, pairs: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The rows `[P, k, m]` of pairs (case, conjunction), and their offsets `[P, k]`."""
        conjunctions = [self.property.cases[c].conjunctions[k] for c, k in pairs]
        count = power_above(
            max(len(k.offset) for case in self.property.cases for k in case.conjunctions)
        )
        rows = [Rows.of([conjunction], count) for conjunction in conjunctions]
        return np.stack([r.weights for r in rows]), np.stack([r.offset for r in rows])

    def moved(self, *arrays: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """The points of `Programs.attack` and their values, float64 `[P]`.

        If it fails, the points are evaluated without moving them; if the network fails as well,
        their values are infinite.
        """
        for name in ("attack", "look"):
            result = self.attempt(name, *arrays, scale)
            if result is not None:
                points, values = result
                return np.asarray(points), np.asarray(values).astype(np.float64)
        start = arrays[2]
        return start, np.full(len(start), np.inf)

    def attempt(self, name: str, *arguments: np.ndarray | float) -> Any:
        """What a program says of float32 points; None if it fails, now or before.

        A failing attack must not prevent a proof.
        """
        if name in self.programs.failures:
            return None
        try:
            program = getattr(self.programs, name)
            return program(*(jnp.asarray(a, jnp.float32) for a in arguments))
        except MemoryError:
            raise
        except Exception as error:  # a model may raise anything when it is differentiated
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.programs.failures[name] = text if len(text) <= 300 else text[:297] + "..."
            return None


class _AroundBox:
    """What a search does for the tree of one box, see `tree.Attacker`."""

    def __init__(self, search: _Search, index: int):
        self.search, self.index = search, index
        self.check_time = search.check_time

    def note(self, domains: int, still_open: int, least: float) -> None:
        seconds = time.monotonic() - self.search.begun
        self.search.rounds.append(Round(seconds, domains, still_open, least))

    def look_at(self, members: np.ndarray, points: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        case = self.search.property.cases[self.index]
        rows = self.search.rows[self.index]
        values = outputs.astype(np.float64) @ rows.weights.T + rows.offset
        values = np.where(rows.member == members[:, None], values, -np.inf).max(axis=1)
        values = np.where(np.isnan(values), np.inf, values)
        for i in np.argsort(values, kind="stable")[:4]:
            if values[i] <= NEARLY_UNSAFE:
                self.search.confirm(case, points[i])
        return values

    def attack_from(self, members: np.ndarray, points: np.ndarray) -> None:
        case = self.search.property.cases[self.index]
        indices = np.arange(self.search.programs.particles) % len(points)
        shape = (len(indices), 1)
        lower, upper = (np.tile(end, shape) for end in (case.inner_lower, case.inner_upper))
        pairs = [(self.index, int(member)) for member in members[indices]]
        self.search.descend(pairs, lower, upper, points[indices])

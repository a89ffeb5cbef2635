"""Reads a file: its declarations and assertions, and the property that they make."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from boundjax.properties import Case, Conjunction, Property
from boundjax.vnnlib import limits
from boundjax.vnnlib.expressions import Atom, Expression, List, commands, quoted, read_text
from boundjax.vnnlib.formulas import VARIABLE, Constraint, Disjuncts, Formulas
from boundjax.vnnlib.limits import VnnlibError

_FLOAT32 = np.finfo(np.float32)
_LARGEST = Fraction(float(_FLOAT32.max))
_OVERFLOWS = Fraction(2**128 - 2**103)  # the least number that float32 rounds to infinity
_LEAST_COEFFICIENT = Fraction(float(_FLOAT32.tiny))
_LEAST_OFFSET = Fraction(float(np.finfo(np.float64).tiny))

# Commands of SMT-LIB that say nothing about the variables.
_IDLE = ("set-logic", "set-info", "set-option", "get-model", "get-value", "exit")


def load(path: str | Path, *, max_bytes: int = limits.MAX_BYTES) -> Property:
    """Reads a property file, plain or compressed with gzip.

    Args:
      path: a `.vnnlib` or `.vnnlib.gz` file; its first bytes tell which.
      max_bytes: the largest text accepted, after decompression.

    Returns:
      The property of the file.

    Raises:
      OSError: if the file cannot be opened.
      VnnlibError: if the file is too large, malformed, states anything but linear constraints, or
        leaves an input without a bound.
    """
    path = Path(path)
    return parse(read_text(path, max_bytes), name=path.name)


def parse(text: str, name: str = "<text>") -> Property:
    """Reads a property from a text, as `load` does; errors call the file `name`."""
    reader = _Reader(text, name)
    for command in commands(text, reader.fail):
        reader.run(command)
    return reader.property()


_SIDES: tuple[Literal["lower"], Literal["upper"]] = ("lower", "upper")
_Side = tuple[int, Literal["lower", "upper"]]  # of an input


class _Bound(NamedTuple):
    """A bound of a variable, whether it is excluded, and where it stands in the text."""

    value: Fraction
    strict: bool
    position: int


_Box = dict[_Side, _Bound]

# The lower, upper, inner_lower and inner_upper of a `Case`.
_Ends = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class _Contradiction(VnnlibError):
    """Constraints that no point satisfies."""


class _Reader:
    """Collects the declarations and constraints of a file, then builds the property."""

    def __init__(self, text: str, name: str):
        self.text, self.name = text, name
        self.declared: dict[str, int] = {}  # variable -> position
        self.formulas = Formulas(self.declared, self.fail)
        # Constraints outside of every `or` are kept apart, since every disjunct would repeat them:
        # properties of images have thousands, and nine disjuncts.
        self.shared: list[Constraint] = []
        self.disjuncts: Disjuncts = [[]]
        self.is_checked = False

    def fail(self, position: int, message: str) -> NoReturn:
        raise VnnlibError(self.located(position, message))

    def contradict(self, position: int, message: str) -> NoReturn:
        raise _Contradiction(self.located(position, message))

    def located(self, position: int, message: str) -> str:
        line = self.text.count("\n", 0, position) + 1
        return f"{self.name}:{line}: {message}"

    def run(self, node: List) -> None:
        """Executes one command of the top level."""
        head, arguments = self.formulas.split(node, "a command")
        if self.is_checked and head not in (*_IDLE, "check-sat"):
            self.fail(node.position, f"expected one check-sat, at the end, got {head} after it")
        if head in ("declare-const", "declare-fun"):
            self.declare(node, arguments)
        elif head == "assert":
            if len(arguments) != 1:
                self.fail(node.position, f"expected assert with 1 formula, got {len(arguments)}")
            disjuncts = self.formulas.normal_form(arguments[0])
            if len(disjuncts) == 1:
                self.shared.extend(disjuncts[0])
            else:
                self.disjuncts = self.formulas.product(self.disjuncts, disjuncts, node.position)
        elif head == "check-sat":
            self.is_checked = True
        elif head not in _IDLE:
            got = f"got {quoted(head)}; only VNN-LIB 1.0 is read"
            self.fail(node.position, f"expected declare-const, declare-fun or assert, {got}")

    def declare(self, node: List, arguments: list[Expression]) -> None:
        match arguments:
            case [Atom(text=name), Atom(text="Real")]:
                pass
            case [Atom(text=name), List(items=[]), Atom(text="Real")]:
                pass
            case _:
                self.fail(
                    node.position,
                    "expected (declare-const NAME Real) or (declare-fun NAME () Real), got "
                    "something else",
                )
        if not VARIABLE.fullmatch(name):
            got = quoted(name)
            self.fail(node.position, f"expected an input X_0, ... or an output Y_0, ..., got {got}")
        if name in self.declared:
            self.fail(node.position, f"expected every variable once, got {name} a second time")
        if len(self.declared) >= limits.MAX_VARIABLES:
            self.fail(node.position, f"expected at most {limits.MAX_VARIABLES} variables, got more")
        self.declared[name] = node.position

    def property(self) -> Property:
        """Builds the property from all commands so far.

        A disjunct that no point satisfies is left out, unless all are like that.
        """
        inputs, outputs = self.size("X", "input"), self.size("Y", "output")
        shared_box: _Box = {}
        shared_rows = self.separated(self.shared, shared_box)
        on_inputs = any(_relates_inputs(c) for d in (self.shared, *self.disjuncts) for c in d)
        columns = outputs + (inputs if on_inputs else 0)
        groups: dict[tuple, tuple[_Ends, list[Conjunction]]] = {}  # by the disjunct's box
        numbers, contradiction = 0, None
        for disjunct in self.disjuncts:
            try:
                own_box: _Box = {}
                rows = [*shared_rows, *self.separated(disjunct, own_box)]
                key = tuple(sorted((side, bound[:2]) for side, bound in own_box.items()))
                numbers += len(rows) * columns + (0 if key in groups else 4 * inputs)
                if numbers > limits.MAX_NUMBERS:
                    most, end = limits.MAX_NUMBERS, len(self.text)
                    self.fail(end, f"expected at most {most} numbers in boxes and rows, got more")
                conjunction = self.conjunction(rows, outputs, columns)
                if key not in groups:
                    box = dict(shared_box)
                    for side, bound in own_box.items():
                        _tighten(box, side, bound)
                    groups[key] = self.rounded(box, inputs), []
                groups[key][1].append(conjunction)
            except _Contradiction as error:
                contradiction = error
        if contradiction is not None and not groups:
            raise contradiction
        cases = tuple(Case(*ends, tuple(conjunctions)) for ends, conjunctions in groups.values())
        return Property(inputs, outputs, cases, on_inputs)

    def size(self, letter: str, kind: str) -> int:
        """Counts the declared variables of a letter, which must be numbered from 0."""
        count = sum(name[0] == letter for name in self.declared)
        missing = next((i for i in range(count) if f"{letter}_{i}" not in self.declared), None)
        if count == 0 or missing is not None:
            name = f"{letter}_{missing or 0}"
            self.fail(len(self.text), f"expected the {kind} {name} to be declared, got none")
        return count

    def separated(self, constraints: list[Constraint], box: _Box) -> list[Constraint]:
        """Moves the bounds of single inputs into `box`; returns all other constraints."""
        rows: list[Constraint] = []
        for constraint in constraints:
            (terms, constant), strict, position = constraint
            if not terms:
                if constant > 0 or (strict and constant == 0):
                    self.contradict(
                        position, "expected a constraint that can hold, got a false one"
                    )
            elif len(terms) > 1 or next(iter(terms))[0] == "Y":
                rows.append(constraint)
            else:
                ((name, factor),) = terms.items()
                side: _Side = (int(name[2:]), "upper" if factor > 0 else "lower")
                _tighten(box, side, _Bound(-constant / factor, strict, position))
        return rows

    def conjunction(self, rows: list[Constraint], outputs: int, columns: int) -> Conjunction:
        """Converts constraints to arrays, with the inputs after the outputs."""
        if not rows:
            end = len(self.text)
            self.fail(end, "expected a constraint on outputs in every disjunct, got one without")

        def column(name: str) -> int:
            return int(name[2:]) + (outputs if name[0] == "X" else 0)

        weights, offset = np.zeros((len(rows), columns)), np.zeros(len(rows))
        exact: list[tuple[dict[int, Fraction], Fraction]] = []
        allowed: dict[tuple, _Box] = {}
        for row, ((terms, constant), strict, position) in enumerate(rows):
            for name, value in terms.items():
                self.require_in_range(
                    value, _LEAST_COEFFICIENT, f"a coefficient of {name}", position
                )
                weights[row, column(name)] = value
            self.require_in_range(constant, _LEAST_OFFSET, "a constant", position)
            offset[row] = constant
            exact.append(({column(name): value for name, value in terms.items()}, constant))
            # Constraints on parallel linear functions may contradict each other.
            direction = sorted(terms.items())
            scale = direction[0][1]
            key = tuple((name, value / scale) for name, value in direction)
            box = allowed.setdefault(key, {})
            side: _Side = (0, "upper" if scale > 0 else "lower")
            _tighten(box, side, _Bound(-constant / scale, strict, position))
            if len(box) == 2 and _is_empty(box[0, "lower"], box[0, "upper"]):
                self.contradict(
                    position, "expected constraints that can hold together, got a contradiction"
                )
        strict_rows = tuple(row.strict for row in rows)
        return Conjunction(weights, offset, tuple(exact), strict_rows if any(strict_rows) else None)

    def require_in_range(self, value: Fraction, least: Fraction, what: str, position: int) -> None:
        """Refuses a number in a constraint on outputs that floating point cannot represent."""
        if value and not least <= abs(value) < _OVERFLOWS:
            size, limit = ("below", least) if abs(value) < least else ("above", _LARGEST)
            got = f"got one {size} {float(limit):.3g} in magnitude; scale the constraint"
            self.fail(position, f"expected {what} in the range of floating point, {got}")

    def rounded(self, box: _Box, inputs: int) -> _Ends:
        """Rounds the bounds of all inputs to float32, outward and inward."""
        ends = np.empty((4, inputs), np.float32)
        for index in range(inputs):
            for side in _SIDES:
                if (index, side) not in box:
                    position = self.declared[f"X_{index}"]
                    self.fail(position, f"expected a {side} bound of X_{index}, got none; add one")
                bound = box[index, side]
                if abs(bound.value) > _LARGEST:
                    self.fail(
                        bound.position, f"expected bounds of X_{index} in float32's range, got more"
                    )
            lower, upper = (box[index, side] for side in _SIDES)
            if _is_empty(lower, upper):
                position = max(lower.position, upper.position)
                sign = "<" if lower.strict or upper.strict else "<="
                got = f"got {float(lower.value)!r} and {float(upper.value)!r}: an empty box"
                self.contradict(position, f"expected lower {sign} upper for X_{index}, {got}")
            inner = (
                _round_up(lower.value, lower.strict),
                -_round_up(-upper.value, upper.strict),
            )
            if inner[0] > inner[1]:
                if lower.strict or upper.strict:
                    position = max(lower.position, upper.position)
                    self.fail(
                        position, f"expected a float32 inside the bounds of X_{index}, got none"
                    )
                inner = (np.float32((lower.value + upper.value) / 2),) * 2
            ends[:, index] = -_round_up(-lower.value), _round_up(upper.value), *inner
        outer_lower, outer_upper, inner_lower, inner_upper = ends
        return outer_lower, outer_upper, inner_lower, inner_upper


def _relates_inputs(constraint: Constraint) -> bool:
    """Whether a constraint is on several variables, and on an input."""
    terms = constraint.function.terms
    return len(terms) > 1 and any(name[0] == "X" for name in terms)


def _is_empty(lower: _Bound, upper: _Bound) -> bool:
    """Whether no number lies between two bounds."""
    touch = lower.value == upper.value
    return lower.value > upper.value or (touch and (lower.strict or upper.strict))


def _tighten(box: _Box, side: _Side, bound: _Bound) -> None:
    """Adds a bound to a box, unless the box has a tighter one."""
    old = box.get(side)
    if old is not None:
        tighter = bound.value < old.value if side[1] == "upper" else bound.value > old.value
        if not (tighter or (bound.value == old.value and bound.strict)):
            return
    box[side] = bound


def _round_up(value: Fraction, strict: bool = False) -> np.float32:
    """The least float32 `>= value` (`> value`) that is not subnormal: XLA takes those for 0."""
    tiny, zero = np.float32(_FLOAT32.tiny), np.float32(0.0)
    nearest = np.float32(value)
    if abs(nearest) < tiny:
        return tiny if value > 0 or (strict and value == 0) else zero
    below = Fraction(float(nearest)) < value or (strict and Fraction(float(nearest)) == value)
    if below:
        nearest = np.nextafter(nearest, np.float32(math.inf))
    return nearest if abs(nearest) >= tiny else zero

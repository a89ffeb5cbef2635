"""Reads VNN-LIB 1.0 properties: boxes of inputs, and the outputs that would be unsafe.

A file asserts the *unsafe* set: some input in a box gives an output that satisfies linear
constraints, nested in any way with `and` and `or`. `load` brings them to disjunctive normal form.

The reader is our own because the package `vnnlib` on PyPI has no release that fits: 1.x reads only
VNN-LIB 2.0 and refuses every 1.0 file, and 0.0.1 of 2023 has neither size limits nor line numbers
in its errors.
"""

from __future__ import annotations

import decimal
import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from boundjax.properties import Case as Case
from boundjax.properties import Conjunction as Conjunction
from boundjax.properties import Property as Property

# Files are untrusted: each limit is far above what benchmarks need, and together they keep a small
# file from exhausting memory.
MAX_BYTES = 2**26
MAX_TOKENS = 4_000_000
MAX_DEPTH = 100
MAX_DISJUNCTS = 20_000
MAX_CONSTRAINTS = 1_000_000  # in disjunctive normal form
MAX_VARIABLES = 1_000_000
MAX_NUMBERS = 2**25  # in all arrays of a property
_MAX_DIGITS = 400
_MAX_BITS = 8000

_TOKEN = re.compile(r"[()]|;[^\n]*|[^\s();]+")
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
_FLOAT32 = np.finfo(np.float32)
_LARGEST = Fraction(float(_FLOAT32.max))
_OVERFLOWS = Fraction(2**128 - 2**103)  # the least number that float32 rounds to infinity
_LEAST_COEFFICIENT = Fraction(float(_FLOAT32.tiny))
_LEAST_OFFSET = Fraction(float(np.finfo(np.float64).tiny))


class VnnlibError(ValueError):
    """A property file that cannot be read; the message names the file and the line."""


def load(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Property:
    """Reads a property file, plain or compressed with gzip.

    Args:
      path: a `.vnnlib` or `.vnnlib.gz` file; its first bytes tell which.
      max_bytes: the largest text accepted, after decompression.

    Returns:
      The property of the file.

    Raises:
      OSError: if the file cannot be opened.
      VnnlibError: if the file is too large, malformed, or states anything but boxes of inputs and
        linear constraints on outputs.
    """
    path = Path(path)
    return parse(_read(path, max_bytes), name=path.name)


def parse(text: str, name: str = "<text>") -> Property:
    """Reads a property from a text, as `load` does; errors call the file `name`."""
    reader = _Reader(text, name)
    for command in _commands(text, reader.fail):
        reader.run(command)
    return reader.property()


def _read(path: Path, max_bytes: int) -> str:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        # read(n) decompresses no more than n bytes: a bomb costs no memory.
        with gzip.open(path) if compressed else path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise VnnlibError(
            f"{path.name}: expected a gzip file, got a damaged one: {error}"
        ) from None
    if len(content) > max_bytes:
        raise VnnlibError(
            f"{path.name}: expected at most {max_bytes} bytes of text, got more; pass max_bytes= "
            "if the file can be trusted"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise VnnlibError(f"{path.name}:{line}: expected UTF-8 text, got other bytes") from None


class _Atom(NamedTuple):
    """A token that is no parenthesis, and where it starts in the text."""

    text: str
    position: int


class _List(NamedTuple):
    """Expressions in parentheses, and where they start in the text."""

    items: list[_Atom | _List]
    position: int


_Expression = _Atom | _List
_Fail = Callable[[int, str], NoReturn]


def _commands(text: str, fail: _Fail) -> Iterator[_List]:
    """Yields the lists of the top level, one at a time."""
    stack: list[_List] = []
    for count, match in enumerate(_TOKEN.finditer(text)):
        token, position = match[0], match.start()
        if count >= MAX_TOKENS:
            fail(position, f"expected at most {MAX_TOKENS} tokens, got more; split the property")
        if token[0] == ";":
            continue
        if token == "(":
            if len(stack) >= MAX_DEPTH:
                fail(position, f"expected at most {MAX_DEPTH} nested parentheses, got more")
            stack.append(_List([], position))
        elif token == ")":
            if not stack:
                fail(position, "expected '(' or the end, got ')': one parenthesis too many")
            closed = stack.pop()
            if stack:
                stack[-1].items.append(closed)
            else:
                yield closed
        elif stack:
            stack[-1].items.append(_Atom(token, position))
        else:
            fail(position, f"expected a command in parentheses, got {_quoted(token)}")
    if stack:
        fail(stack[-1].position, "expected ')' to this '(', got the end of the file")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


class _LinearFunction(NamedTuple):
    """The sum of `terms[v] * v` and a constant, in exact arithmetic; no coefficient is 0."""

    terms: dict[str, Fraction]
    constant: Fraction


def _sum(parts: Sequence[tuple[int | Fraction, _LinearFunction]]) -> _LinearFunction:
    """The sum of linear functions, each multiplied by a factor."""
    terms: dict[str, Fraction] = {}
    constant = Fraction(0)
    for factor, part in parts:
        constant += factor * part.constant
        for name, value in part.terms.items():
            terms[name] = terms.get(name, 0) + factor * value
    return _LinearFunction({name: value for name, value in terms.items() if value}, constant)


class _Constraint(NamedTuple):
    """The constraint `function <= 0`, and where it starts in the text."""

    function: _LinearFunction
    position: int


_Disjuncts = list[list[_Constraint]]

_SIDES: tuple[Literal["lower"], Literal["upper"]] = ("lower", "upper")
_Side = tuple[int, Literal["lower", "upper"]]  # of an input

# The bound of each side, and where it stands in the text.
_Box = dict[_Side, tuple[Fraction, int]]

# The lower, upper, inner_lower and inner_upper of a `Case`.
_Ends = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class _Reader:
    """Collects the declarations and constraints of a file, then builds the property."""

    def __init__(self, text: str, name: str):
        self.text, self.name = text, name
        self.declared: dict[str, int] = {}  # variable -> position
        self.numbers: dict[str, Fraction] = {}  # token -> value
        # Constraints outside of every `or` are kept apart, since every disjunct would repeat them:
        # properties of images have thousands, and nine disjuncts.
        self.shared: list[_Constraint] = []
        self.disjuncts: _Disjuncts = [[]]

    def fail(self, position: int, message: str) -> NoReturn:
        line = self.text.count("\n", 0, position) + 1
        raise VnnlibError(f"{self.name}:{line}: {message}")

    def run(self, node: _List) -> None:
        """Executes one command of the top level."""
        head, arguments = self.split(node, "a command")
        if head == "declare-const":
            self.declare(node, arguments)
        elif head == "assert":
            if len(arguments) != 1:
                self.fail(node.position, f"expected assert with 1 formula, got {len(arguments)}")
            disjuncts = self.normal_form(arguments[0])
            if len(disjuncts) == 1:
                self.shared.extend(disjuncts[0])
            else:
                self.disjuncts = self.product(self.disjuncts, disjuncts, node.position)
        else:
            got = f"got {_quoted(head)}; only VNN-LIB 1.0 is read"
            self.fail(node.position, f"expected the command declare-const or assert, {got}")

    def split(self, node: _Expression, expected: str) -> tuple[str, list[_Expression]]:
        """The head of a list, and its arguments."""
        if isinstance(node, _Atom):
            got = _quoted(node.text)
            self.fail(node.position, f"expected {expected} in parentheses, got {got}")
        head = node.items[0] if node.items else None
        if not isinstance(head, _Atom):
            got = "'('" if node.items else "'()'"
            self.fail(node.position, f"expected {expected} after '(', got {got}")
        return head.text, node.items[1:]

    def declare(self, node: _List, arguments: list[_Expression]) -> None:
        match arguments:
            case [_Atom(text=name), _Atom(text="Real")]:
                pass
            case _:
                self.fail(node.position, "expected (declare-const NAME Real), got something else")
        if not _VARIABLE.fullmatch(name):
            got = _quoted(name)
            self.fail(node.position, f"expected an input X_0, ... or an output Y_0, ..., got {got}")
        if name in self.declared:
            self.fail(node.position, f"expected every variable once, got {name} a second time")
        if len(self.declared) >= MAX_VARIABLES:
            self.fail(node.position, f"expected at most {MAX_VARIABLES} variables, got more")
        self.declared[name] = node.position

    def normal_form(self, node: _Expression) -> _Disjuncts:
        """Converts a formula to a disjunction of conjunctions."""
        head, arguments = self.split(node, "a formula")
        if head in ("<=", ">="):
            if len(arguments) != 2:
                self.fail(node.position, f"expected {head} with 2 terms, got {len(arguments)}")
            left, right = map(self.linear, arguments)
            if head == ">=":
                left, right = right, left
            return [[_Constraint(_sum([(1, left), (-1, right)]), node.position)]]
        if head not in ("and", "or"):
            self.fail(node.position, f"expected and, or, <= or >=, got {_quoted(head)}; rewrite it")
        if not arguments:
            self.fail(node.position, f"expected at least one formula in {head}, got none")
        disjuncts: _Disjuncts = [] if head == "or" else [[]]
        shared: list[_Constraint] = []
        for argument in arguments:
            inner = self.normal_form(argument)
            if head == "or":
                disjuncts.extend(inner)
                self.require_few(len(disjuncts), node.position)
            elif len(inner) == 1:
                shared.extend(inner[0])
            else:
                disjuncts = self.product(disjuncts, inner, node.position)
        return self.product([shared], disjuncts, node.position) if shared else disjuncts

    def require_few(self, count: int, position: int) -> None:
        if count > MAX_DISJUNCTS:
            self.fail(position, f"expected at most {MAX_DISJUNCTS} disjuncts, got {count}")

    def product(self, left: _Disjuncts, right: _Disjuncts, position: int) -> _Disjuncts:
        """Multiplies out the conjunction of two disjunctions."""
        self.require_few(len(left) * len(right), position)
        size = sum(map(len, left)) * len(right) + len(left) * sum(map(len, right))
        if size > MAX_CONSTRAINTS:
            self.fail(position, f"expected at most {MAX_CONSTRAINTS} constraints, got {size}")
        return [[*a, *b] for a in left for b in right]

    def linear(self, node: _Expression) -> _LinearFunction:
        """Converts a term to a linear function of the variables."""
        if isinstance(node, _Atom):
            name = node.text
            if name in self.declared:
                return _LinearFunction({name: Fraction(1)}, Fraction(0))
            if _VARIABLE.fullmatch(name):
                self.fail(node.position, f"expected a declared variable, got {name}; declare it")
            return _LinearFunction({}, self.number(node))
        head, arguments = self.split(node, "a term")
        if head not in ("+", "-", "*"):
            self.fail(node.position, f"expected +, - or * in a linear term, got {_quoted(head)}")
        if not arguments:
            self.fail(node.position, f"expected at least one term after {head}, got none")
        parts = [self.linear(argument) for argument in arguments]
        if head == "*":
            return self.multiplied(node, parts)
        if head == "-" and len(parts) == 1:
            return _sum([(-1, parts[0])])
        sign = 1 if head == "+" else -1
        return _sum([(1, parts[0]), *((sign, part) for part in parts[1:])])

    def multiplied(self, node: _Expression, parts: list[_LinearFunction]) -> _LinearFunction:
        product = parts[0]
        for part in parts[1:]:
            if product.terms and part.terms:
                first, second = next(iter(product.terms)), next(iter(part.terms))
                got = f"got a product of {first} and {second}"
                self.fail(node.position, f"expected a linear term, {got}")
            scaled, factor = (product, part.constant) if product.terms else (part, product.constant)
            product = _sum([(factor, scaled)])
            for value in (product.constant, *product.terms.values()):
                # Each factor of a long product adds digits.
                if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
                    got = "got a long product; write its value"
                    self.fail(node.position, f"expected numbers of fewer digits, {got}")
        return product

    def number(self, node: _Atom) -> Fraction:
        text = node.text
        if text in self.numbers:
            return self.numbers[text]
        if text.lower().lstrip("+-") in ("inf", "infinity", "nan"):
            self.fail(node.position, f"expected a finite number, got {_quoted(text)}; give a bound")
        match = _NUMBER.fullmatch(text)
        if not match:
            self.fail(node.position, f"expected a number or a variable, got {_quoted(text)}")
        if len(text) > _MAX_DIGITS:
            self.fail(node.position, f"expected at most {_MAX_DIGITS} digits, got {len(text)}")
        sign, digits, exponent = match[1], match[2], int(match[3] or 0)
        value = decimal.Decimal(sign + digits)
        # Check the exponent first: the size of the fraction is exponential in that of the exponent.
        # A zero may have any exponent.
        if value and value.adjusted() + exponent > 38:
            got = f"got {_quoted(text)}; scale the constraint"
            self.fail(node.position, f"expected a number in float32's range, {got}")
        if value and value.adjusted() + exponent < -_MAX_DIGITS:
            got = f"got {_quoted(text)}; write 0 or scale the constraint"
            self.fail(node.position, f"expected 0 or a number above 1e-{_MAX_DIGITS}, {got}")
        self.numbers[text] = Fraction(value) * Fraction(10) ** exponent if value else Fraction(0)
        return self.numbers[text]

    def property(self) -> Property:
        """Builds the property from all commands so far."""
        inputs, outputs = self.size("X", "input"), self.size("Y", "output")
        shared_box: _Box = {}
        shared_rows = self.separated(self.shared, shared_box)
        groups: dict[tuple, tuple[_Ends, list[Conjunction]]] = {}  # by the disjunct's box
        numbers = 0
        for disjunct in self.disjuncts:
            disjunct_box: _Box = {}
            rows = self.separated(disjunct, disjunct_box)
            key = tuple(sorted((side, value) for side, (value, _) in disjunct_box.items()))
            numbers += (len(shared_rows) + len(rows)) * outputs
            numbers += 0 if key in groups else 4 * inputs
            if numbers > MAX_NUMBERS:
                end = len(self.text)
                self.fail(
                    end, f"expected at most {MAX_NUMBERS} numbers in boxes and rows, got more"
                )
            conjunction = self.conjunction([*shared_rows, *rows], outputs)
            if key not in groups:
                box = dict(shared_box) if disjunct_box else shared_box
                for side, (value, position) in disjunct_box.items():
                    _tighten(box, side, value, position)
                groups[key] = self.rounded(box, inputs), []
            groups[key][1].append(conjunction)
        cases = tuple(Case(*ends, tuple(conjunctions)) for ends, conjunctions in groups.values())
        return Property(inputs, outputs, cases)

    def size(self, letter: str, kind: str) -> int:
        """Counts the declared variables of a letter, which must be numbered from 0."""
        count = sum(name[0] == letter for name in self.declared)
        missing = next((i for i in range(count) if f"{letter}_{i}" not in self.declared), None)
        if count == 0 or missing is not None:
            name = f"{letter}_{missing or 0}"
            self.fail(len(self.text), f"expected the {kind} {name} to be declared, got none")
        return count

    def separated(self, constraints: list[_Constraint], box: _Box) -> list[_Constraint]:
        """Moves the bounds of inputs into `box`; returns the constraints on outputs."""
        rows: list[_Constraint] = []
        for constraint in constraints:
            (terms, constant), position = constraint
            letters = {name[0] for name in terms}
            if not terms:
                if constant > 0:
                    self.fail(position, "expected a constraint that can hold, got a false one")
            elif letters == {"Y"}:
                rows.append(constraint)
            elif letters == {"X", "Y"}:
                first, second = (next(n for n in terms if n[0] == a) for a in "XY")
                got = f"got one that mixes {first} and {second}: not supported"
                self.fail(position, f"expected a constraint on inputs or on outputs, {got}")
            elif len(terms) > 1:
                first, second = list(terms)[:2]
                got = f"got one on {first} and {second}: only boxes are supported"
                self.fail(position, f"expected a bound of one input, {got}")
            else:
                ((name, factor),) = terms.items()
                side: _Side = (int(name[2:]), "upper" if factor > 0 else "lower")
                _tighten(box, side, -constant / factor, position)
        return rows

    def conjunction(self, rows: list[_Constraint], outputs: int) -> Conjunction:
        """Converts constraints on outputs to arrays."""
        if not rows:
            end = len(self.text)
            self.fail(end, "expected a constraint on outputs in every disjunct, got one without")
        weights, offset = np.zeros((len(rows), outputs)), np.zeros(len(rows))
        exact: list[tuple[dict[int, Fraction], Fraction]] = []
        allowed: dict[tuple, _Box] = {}
        for row, ((terms, constant), position) in enumerate(rows):
            for name, value in terms.items():
                self.require_in_range(
                    value, _LEAST_COEFFICIENT, f"a coefficient of {name}", position
                )
                weights[row, int(name[2:])] = value
            self.require_in_range(constant, _LEAST_OFFSET, "a constant", position)
            offset[row] = constant
            exact.append(({int(name[2:]): value for name, value in terms.items()}, constant))
            # Constraints on parallel linear functions may contradict each other.
            direction = sorted(terms.items())
            scale = direction[0][1]
            key = tuple((name, value / scale) for name, value in direction)
            box = allowed.setdefault(key, {})
            _tighten(box, (0, "upper" if scale > 0 else "lower"), -constant / scale, position)
            if len(box) == 2 and box[0, "lower"][0] > box[0, "upper"][0]:
                self.fail(
                    position, "expected constraints that can hold together, got a contradiction"
                )
        return Conjunction(weights, offset, tuple(exact))

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
            exact: list[Fraction] = []
            for side in _SIDES:
                if (index, side) not in box:
                    position = self.declared[f"X_{index}"]
                    self.fail(position, f"expected a {side} bound of X_{index}, got none; add one")
                value, position = box[index, side]
                if abs(value) > _LARGEST:
                    self.fail(
                        position, f"expected bounds of X_{index} in float32's range, got more"
                    )
                exact.append(value)
            lower, upper = exact
            if lower > upper:
                position = max(box[index, side][1] for side in _SIDES)
                got = f"got {float(lower)!r} > {float(upper)!r}: an empty box"
                self.fail(position, f"expected lower <= upper for X_{index}, {got}")
            inner = _round_up(lower), -_round_up(-upper)
            if inner[0] > inner[1]:
                inner = (np.float32((lower + upper) / 2),) * 2
            ends[:, index] = -_round_up(-lower), _round_up(upper), *inner
        outer_lower, outer_upper, inner_lower, inner_upper = ends
        return outer_lower, outer_upper, inner_lower, inner_upper


def _tighten(box: _Box, side: _Side, value: Fraction, position: int) -> None:
    """Adds a bound to a box, unless the box has a tighter one."""
    old = box.get(side)
    if old is None or (value < old[0] if side[1] == "upper" else value > old[0]):
        box[side] = value, position


def _round_up(value: Fraction) -> np.float32:
    """The least float32 `>= value` that is not subnormal, since XLA treats subnormals as 0."""
    nearest = np.float32(value)
    if abs(nearest) < _FLOAT32.tiny:
        return np.float32(_FLOAT32.tiny if value > 0 else 0.0)
    if Fraction(float(nearest)) < value:
        nearest = np.nextafter(nearest, np.float32(math.inf))
    return nearest if abs(nearest) >= _FLOAT32.tiny else np.float32(0.0)

"""VNN-LIB 1.0 properties: which inputs are asked about, and which outputs would be unsafe.

A file asserts the *unsafe* set: some input in a box gives an output that satisfies linear
constraints, in any nesting of ``and`` and ``or``. ``load`` brings that to disjunctive normal form.

The package ``vnnlib`` on PyPI is not used: its releases 1.x read VNN-LIB 2.0 only and refuse every
1.0 file, and its 0.0.1 of 2023 has neither size limits nor line numbers in its errors.
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
from typing import NamedTuple, NoReturn

import numpy as np

from boundjax.properties import Case as Case
from boundjax.properties import Conjunction as Conjunction
from boundjax.properties import Property as Property

# Files may come from anywhere: each limit is far above what benchmarks hold, and none lets a small
# file take all memory.
MAX_BYTES = 2**26
MAX_TOKENS = 4_000_000
MAX_DEPTH = 100
MAX_DISJUNCTS = 20_000
MAX_CONSTRAINTS = 1_000_000  # after multiplying out
MAX_VARIABLES = 1_000_000
MAX_NUMBERS = 2**25  # in all arrays of a property together
_MAX_DIGITS = 400
_MAX_BITS = 8000

_TOKEN = re.compile(r"[()]|;[^\n]*|[^\s();]+")
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
_FLOAT32 = np.finfo(np.float32)
_LARGEST = Fraction(float(_FLOAT32.max))
_OVERFLOWS = Fraction(2**128 - 2**103)  # the least number that float32 rounds to infinity
_LEAST = Fraction(float(_FLOAT32.tiny))
_LEAST_OFFSET = Fraction(float(np.finfo(np.float64).tiny))


class VnnlibError(ValueError):
    """A property file that cannot be read; the message names the file and the line."""


def load(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Property:
    """Reads a property file, plain or compressed with gzip.

    Args:
      path: a ``.vnnlib`` or ``.vnnlib.gz`` file; its first bytes tell which.
      max_bytes: the largest text accepted, after decompression.

    Returns:
      The ``Property``.

    Raises:
      OSError: where there is no such file.
      VnnlibError: for a file that is too large, malformed, or says something else than boxes of
        inputs and linear constraints on outputs.
    """
    path = Path(path)
    return parse(_read(path, max_bytes), name=path.name)


def parse(text: str, name: str = "<text>") -> Property:
    """``load`` for a text; ``name`` stands for the file's in errors."""
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


class _Node(NamedTuple):
    """An S-expression: an atom's text or a list of nodes, and where it starts in the text."""

    content: str | list[_Node]
    position: int


_Fail = Callable[[int, str], NoReturn]


def _commands(text: str, fail: _Fail) -> Iterator[_Node]:
    """The S-expressions of the top level, one at a time."""
    stack: list[_Node] = []
    for count, match in enumerate(_TOKEN.finditer(text)):
        token, position = match[0], match.start()
        if count >= MAX_TOKENS:
            fail(position, f"expected at most {MAX_TOKENS} tokens, got more; split the property")
        if token[0] == ";":
            continue
        if token == "(":
            if len(stack) >= MAX_DEPTH:
                fail(position, f"expected at most {MAX_DEPTH} nested parentheses, got more")
            stack.append(_Node([], position))
        elif token == ")":
            if not stack:
                fail(position, "expected '(' or the end, got ')': one parenthesis too many")
            node = stack.pop()
            if stack:
                stack[-1].content.append(node)
            else:
                yield node
        elif stack:
            stack[-1].content.append(_Node(token, position))
        else:
            fail(position, f"expected a command in parentheses, got {_shown(token)}")
    if stack:
        fail(stack[-1].position, "expected ')' to this '(', got the end of the file")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


class _Linear(NamedTuple):
    """``sum of terms[v] * v + constant``, in exact arithmetic; no coefficient is 0."""

    terms: dict[str, Fraction]
    constant: Fraction


def _sum(parts: Sequence[tuple[int | Fraction, _Linear]]) -> _Linear:
    """The sum of linear terms with factors."""
    terms: dict[str, Fraction] = {}
    constant = Fraction(0)
    for factor, part in parts:
        constant += factor * part.constant
        for name, value in part.terms.items():
            terms[name] = terms.get(name, 0) + factor * value
    return _Linear({name: value for name, value in terms.items() if value}, constant)


class _Constraint(NamedTuple):
    """``linear <= 0``."""

    linear: _Linear
    position: int


_Disjuncts = list[list[_Constraint]]

# (input, "lower" or "upper") -> the bound and where it stands.
_Box = dict[tuple[int, str], tuple[Fraction, int]]


class _Reader:
    """Collects declarations and constraints of a file, then builds the property."""

    def __init__(self, text: str, name: str):
        self.text, self.name = text, name
        self.declared: dict[str, int] = {}  # variable -> position
        self.numbers: dict[str, Fraction] = {}
        # Constraints outside of every `or` stay apart: images have thousands, and nine disjuncts.
        self.shared: list[_Constraint] = []
        self.disjuncts: _Disjuncts = [[]]

    def fail(self, position: int, message: str) -> NoReturn:
        line = self.text.count("\n", 0, position) + 1
        raise VnnlibError(f"{self.name}:{line}: {message}")

    def run(self, node: _Node) -> None:
        """One command of the top level."""
        head, arguments = self.split(node, "a command")
        if head == "declare-const":
            self.declare(node, arguments)
        elif head == "assert":
            if len(arguments) != 1:
                self.fail(node.position, f"expected assert with 1 formula, got {len(arguments)}")
            found = self.normal_form(arguments[0])
            if len(found) == 1:
                self.shared.extend(found[0])
            else:
                self.disjuncts = self.product(self.disjuncts, found, node.position)
        else:
            got = f"got {_shown(head)}; only VNN-LIB 1.0 is read"
            self.fail(node.position, f"expected the command declare-const or assert, {got}")

    def split(self, node: _Node, expected: str) -> tuple[str, list[_Node]]:
        """The head of a list and its arguments."""
        if isinstance(node.content, str):
            got = _shown(node.content)
            self.fail(node.position, f"expected {expected} in parentheses, got {got}")
        if not node.content or not isinstance(node.content[0].content, str):
            got = "'('" if node.content else "'()'"
            self.fail(node.position, f"expected {expected} after '(', got {got}")
        return node.content[0].content, node.content[1:]

    def declare(self, node: _Node, arguments: list[_Node]) -> None:
        texts = [a.content for a in arguments]
        if len(texts) != 2 or not all(isinstance(t, str) for t in texts) or texts[1] != "Real":
            self.fail(node.position, "expected (declare-const NAME Real), got something else")
        name = texts[0]
        if not _VARIABLE.fullmatch(name):
            got = _shown(name)
            self.fail(node.position, f"expected an input X_0, ... or an output Y_0, ..., got {got}")
        if name in self.declared:
            self.fail(node.position, f"expected every variable once, got {name} a second time")
        if len(self.declared) >= MAX_VARIABLES:
            self.fail(node.position, f"expected at most {MAX_VARIABLES} variables, got more")
        self.declared[name] = node.position

    def normal_form(self, node: _Node) -> _Disjuncts:
        """A formula as a disjunction of conjunctions."""
        head, arguments = self.split(node, "a formula")
        if head in ("<=", ">="):
            if len(arguments) != 2:
                self.fail(node.position, f"expected {head} with 2 terms, got {len(arguments)}")
            left, right = map(self.linear, arguments)
            if head == ">=":
                left, right = right, left
            return [[_Constraint(_sum([(1, left), (-1, right)]), node.position)]]
        if head not in ("and", "or"):
            self.fail(node.position, f"expected and, or, <= or >=, got {_shown(head)}; rewrite it")
        if not arguments:
            self.fail(node.position, f"expected at least one formula in {head}, got none")
        found: _Disjuncts = [] if head == "or" else [[]]
        always: list[_Constraint] = []
        for argument in arguments:
            inner = self.normal_form(argument)
            if head == "or":
                found.extend(inner)
                self.require_few(len(found), node.position)
            elif len(inner) == 1:
                always.extend(inner[0])
            else:
                found = self.product(found, inner, node.position)
        return self.product([always], found, node.position) if always else found

    def require_few(self, count: int, position: int) -> None:
        if count > MAX_DISJUNCTS:
            self.fail(position, f"expected at most {MAX_DISJUNCTS} disjuncts, got {count}")

    def product(self, left: _Disjuncts, right: _Disjuncts, position: int) -> _Disjuncts:
        """The disjuncts of a conjunction of two disjunctions."""
        self.require_few(len(left) * len(right), position)
        size = sum(map(len, left)) * len(right) + len(left) * sum(map(len, right))
        if size > MAX_CONSTRAINTS:
            self.fail(position, f"expected at most {MAX_CONSTRAINTS} constraints, got {size}")
        return [[*a, *b] for a in left for b in right]

    def linear(self, node: _Node) -> _Linear:
        """A term as a linear function of the variables."""
        if isinstance(node.content, str):
            name = node.content
            if name in self.declared:
                return _Linear({name: Fraction(1)}, Fraction(0))
            if _VARIABLE.fullmatch(name):
                self.fail(node.position, f"expected a declared variable, got {name}; declare it")
            return _Linear({}, self.number(node))
        head, arguments = self.split(node, "a term")
        if head not in ("+", "-", "*"):
            self.fail(node.position, f"expected +, - or * in a linear term, got {_shown(head)}")
        if not arguments:
            self.fail(node.position, f"expected at least one term after {head}, got none")
        parts = [self.linear(argument) for argument in arguments]
        if head == "*":
            return self.multiplied(node, parts)
        if head == "-" and len(parts) == 1:
            return _sum([(-1, parts[0])])
        sign = 1 if head == "+" else -1
        return _sum([(1, parts[0]), *((sign, part) for part in parts[1:])])

    def multiplied(self, node: _Node, parts: list[_Linear]) -> _Linear:
        found = parts[0]
        for part in parts[1:]:
            if found.terms and part.terms:
                first, second = next(iter(found.terms)), next(iter(part.terms))
                got = f"got a product of {first} and {second}"
                self.fail(node.position, f"expected a linear term, {got}")
            scaled, factor = (found, part.constant) if found.terms else (part, found.constant)
            found = _sum([(factor, scaled)])
            for value in (found.constant, *found.terms.values()):
                # Long products would grow without end.
                if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
                    got = "got a long product; write its value"
                    self.fail(node.position, f"expected numbers of fewer digits, {got}")
        return found

    def number(self, node: _Node) -> Fraction:
        text = node.content
        if text in self.numbers:
            return self.numbers[text]
        if text.lower().lstrip("+-") in ("inf", "infinity", "nan"):
            self.fail(node.position, f"expected a finite number, got {_shown(text)}; give a bound")
        match = _NUMBER.fullmatch(text)
        if not match:
            self.fail(node.position, f"expected a number or a variable, got {_shown(text)}")
        if len(text) > _MAX_DIGITS:
            self.fail(node.position, f"expected at most {_MAX_DIGITS} digits, got {len(text)}")
        sign, digits, exponent = match[1], match[2], int(match[3] or 0)
        value = decimal.Decimal(sign + digits)
        # Before the conversion to a fraction, whose size is exponential in the exponent's; and
        # exponents of any size are legal before a 0.
        if value and value.adjusted() + exponent > 38:
            got = f"got {_shown(text)}; scale the constraint"
            self.fail(node.position, f"expected a number in float32's range, {got}")
        if value and value.adjusted() + exponent < -_MAX_DIGITS:
            got = f"got {_shown(text)}; write 0 or scale the constraint"
            self.fail(node.position, f"expected 0 or a number above 1e-{_MAX_DIGITS}, {got}")
        self.numbers[text] = Fraction(value) * Fraction(10) ** exponent if value else Fraction(0)
        return self.numbers[text]

    def property(self) -> Property:
        """The property of all commands so far."""
        inputs, outputs = self.size("X", "input"), self.size("Y", "output")
        shared_box: _Box = {}
        shared_rows = self.separated(self.shared, shared_box)
        groups: dict[tuple, tuple[tuple[np.ndarray, ...], list[Conjunction]]] = {}
        numbers = 0
        for disjunct in self.disjuncts:
            own: _Box = {}
            rows = self.separated(disjunct, own)
            key = tuple(sorted((side, value) for side, (value, _) in own.items()))
            numbers += (len(shared_rows) + len(rows)) * outputs
            numbers += 0 if key in groups else 4 * inputs
            if numbers > MAX_NUMBERS:
                end = len(self.text)
                self.fail(
                    end, f"expected at most {MAX_NUMBERS} numbers in boxes and rows, got more"
                )
            conjunction = self.conjunction([*shared_rows, *rows], outputs)
            if key not in groups:
                box = dict(shared_box) if own else shared_box
                for side, (value, position) in own.items():
                    _tighten(box, side, value, position)
                groups[key] = self.rounded(box, inputs), []
            groups[key][1].append(conjunction)
        cases = tuple(Case(*box, tuple(found)) for box, found in groups.values())
        return Property(inputs, outputs, cases)

    def size(self, letter: str, kind: str) -> int:
        """The number of declared variables of one letter, which must be numbered from 0."""
        count = sum(name[0] == letter for name in self.declared)
        missing = next((i for i in range(count) if f"{letter}_{i}" not in self.declared), None)
        if count == 0 or missing is not None:
            name = f"{letter}_{missing or 0}"
            self.fail(len(self.text), f"expected the {kind} {name} to be declared, got none")
        return count

    def separated(self, constraints: list[_Constraint], box: _Box) -> list[_Constraint]:
        """Puts the bounds of inputs into ``box``; returns the constraints on outputs."""
        rows = []
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
                side = (int(name[2:]), "upper" if factor > 0 else "lower")
                _tighten(box, side, -constant / factor, position)
        return rows

    def conjunction(self, rows: list[_Constraint], outputs: int) -> Conjunction:
        """Constraints on outputs as arrays."""
        if not rows:
            end = len(self.text)
            self.fail(end, "expected a constraint on outputs in every disjunct, got one without")
        weights, offset = np.zeros((len(rows), outputs)), np.zeros(len(rows))
        exact: list[tuple[dict[int, Fraction], Fraction]] = []
        allowed: dict[tuple, _Box] = {}
        for row, ((terms, constant), position) in enumerate(rows):
            for name, value in terms.items():
                self.require_in_range(value, _LEAST, f"a coefficient of {name}", position)
                weights[row, int(name[2:])] = value
            self.require_in_range(constant, _LEAST_OFFSET, "a constant", position)
            offset[row] = constant
            exact.append(({int(name[2:]): value for name, value in terms.items()}, constant))
            # Opposite constraints on one linear function are compared where they can be.
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
        """Refuses a number of a constraint on outputs that floating point cannot hold."""
        if value and not least <= abs(value) < _OVERFLOWS:
            size, limit = ("below", least) if abs(value) < least else ("above", _LARGEST)
            got = f"got one {size} {float(limit):.3g} in magnitude; scale the constraint"
            self.fail(position, f"expected {what} in the range of floating point, {got}")

    def rounded(self, box: _Box, inputs: int) -> tuple[np.ndarray, ...]:
        """The four ends of a ``Case``."""
        ends = np.empty((4, inputs), np.float32)
        for index in range(inputs):
            found = []
            for side in ("lower", "upper"):
                if (index, side) not in box:
                    position = self.declared[f"X_{index}"]
                    self.fail(position, f"expected a {side} bound of X_{index}, got none; add one")
                value, position = box[index, side]
                if abs(value) > _LARGEST:
                    self.fail(
                        position, f"expected bounds of X_{index} in float32's range, got more"
                    )
                found.append(value)
            lower, upper = found
            if lower > upper:
                position = max(box[index, side][1] for side in ("lower", "upper"))
                got = f"got {float(lower)!r} > {float(upper)!r}: an empty box"
                self.fail(position, f"expected lower <= upper for X_{index}, {got}")
            inner = _round_up(lower), -_round_up(-upper)
            if inner[0] > inner[1]:
                inner = (np.float32((lower + upper) / 2),) * 2
            ends[:, index] = -_round_up(-lower), _round_up(upper), *inner
        return tuple(ends)


def _tighten(box: _Box, side: tuple[int, str], value: Fraction, position: int) -> None:
    """Adds a bound to a box that may have one already."""
    old = box.get(side)
    if old is None or (value < old[0] if side[1] == "upper" else value > old[0]):
        box[side] = value, position


def _round_up(value: Fraction) -> np.float32:
    """The least float32 ``>= value``, never a subnormal one: XLA takes those for 0."""
    nearest = np.float32(value)
    if abs(nearest) < _FLOAT32.tiny:
        return np.float32(_FLOAT32.tiny if value > 0 else 0.0)
    if Fraction(float(nearest)) < value:
        nearest = np.nextafter(nearest, np.float32(math.inf))
    return nearest if abs(nearest) >= _FLOAT32.tiny else np.float32(0.0)

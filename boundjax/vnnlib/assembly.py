"""Constraints on the variables of a file, made into a property."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from boundjax.properties import Case, Conjunction, Property
from boundjax.vnnlib import limits
from boundjax.vnnlib.expressions import Expression
from boundjax.vnnlib.formulas import VARIABLE, Constraint, Disjuncts, Formulas, Monomial
from boundjax.vnnlib.limits import VnnlibError

_FLOAT32 = np.finfo(np.float32)
_LARGEST = Fraction(float(_FLOAT32.max))
_OVERFLOWS = Fraction(2**128 - 2**103)  # the least number that float32 rounds to infinity
_LEAST_COEFFICIENT = Fraction(float(_FLOAT32.tiny))
_LEAST_OFFSET = Fraction(float(np.finfo(np.float64).tiny))

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


class Assembly:
    """Collects the assertions of a file about inputs `X_i` and outputs `Y_i`.

    Attributes:
      declared: the variables, and where they are declared in the text; it may grow.
      shown: what messages call them, where that is something else.
      formulas: reads formulas on them.
    """

    def __init__(self, text: str, name: str):
        """Begins without variables; errors call the file `name`."""
        self._text, self._name = text, name
        self.declared: dict[str, int] = {}
        self.shown: dict[str, str] = {}
        self.formulas = Formulas(self.declared, self.fail)
        # Constraints outside of every `or` are kept apart, since every disjunct would repeat them:
        # properties of images have thousands, and nine disjuncts.
        self._shared: list[Constraint] = []
        self._disjuncts: Disjuncts = [[]]

    def fail(self, position: int, message: str) -> NoReturn:
        """Raises a `VnnlibError` about this position of the text."""
        raise VnnlibError(self._located(position, message))

    def _contradict(self, position: int, message: str) -> NoReturn:
        raise _Contradiction(self._located(position, message))

    def _located(self, position: int, message: str) -> str:
        line = self._text.count("\n", 0, position) + 1
        if self.shown:
            message = VARIABLE.sub(lambda found: self.shown.get(found[0], found[0]), message)
        return f"{self._name}:{line}: {message}"

    def add(self, formula: Expression, position: int) -> None:
        """Asserts a formula."""
        disjuncts = self.formulas.normal_form(formula)
        if len(disjuncts) == 1:
            self._shared.extend(disjuncts[0])
        else:
            self._disjuncts = self.formulas.product(self._disjuncts, disjuncts, position)

    def property(self, inputs: int, outputs: int) -> Property:
        """The property of all assertions so far.

        A disjunct that no point satisfies is left out, unless all are like that.

        Args:
          inputs, outputs: the numbers of variables `X_i` and `Y_i`, all of them declared.
        """
        shared_box: _Box = {}
        shared_rows = self._separated(self._shared, shared_box)
        columns = _Columns(inputs, outputs, (self._shared, *self._disjuncts))
        groups: dict[tuple, tuple[_Ends, list[Conjunction]]] = {}  # by the disjunct's box
        numbers, contradiction = 0, None
        for disjunct in self._disjuncts:
            try:
                own_box: _Box = {}
                rows = [*shared_rows, *self._separated(disjunct, own_box)]
                key = tuple(sorted((side, bound[:2]) for side, bound in own_box.items()))
                numbers += len(rows) * columns.count + (0 if key in groups else 4 * inputs)
                if numbers > limits.MAX_NUMBERS:
                    most, end = limits.MAX_NUMBERS, len(self._text)
                    self.fail(end, f"expected at most {most} numbers in boxes and rows, got more")
                conjunction = self._conjunction(rows, columns)
                if key not in groups:
                    box = dict(shared_box)
                    for side, bound in own_box.items():
                        _tighten(box, side, bound)
                    groups[key] = self._rounded(box, inputs), []
                groups[key][1].append(conjunction)
            except _Contradiction as error:
                contradiction = error
        if contradiction is not None and not groups:
            raise contradiction
        cases = tuple(Case(*ends, tuple(conjunctions)) for ends, conjunctions in groups.values())
        return Property(inputs, outputs, cases, columns.on_inputs, columns.products)

    def _separated(self, constraints: list[Constraint], box: _Box) -> list[Constraint]:
        """Moves the bounds of single inputs into `box`; returns all other constraints."""
        rows: list[Constraint] = []
        for constraint in constraints:
            (terms, constant), strict, position = constraint
            if not terms:
                if constant > 0 or (strict and constant == 0):
                    self._contradict(
                        position, "expected a constraint that can hold, got a false one"
                    )
            elif _is_bound(constraint):
                (((name,), factor),) = terms.items()
                side: _Side = (int(name[2:]), "upper" if factor > 0 else "lower")
                _tighten(box, side, _Bound(-constant / factor, strict, position))
            else:
                rows.append(constraint)
        return rows

    def _conjunction(self, rows: list[Constraint], columns: _Columns) -> Conjunction:
        """Converts constraints to arrays."""
        if not rows:
            end = len(self._text)
            self.fail(end, "expected a constraint on outputs in every disjunct, got one without")

        weights, offset = np.zeros((len(rows), columns.count)), np.zeros(len(rows))
        exact: list[tuple[dict[int, Fraction], Fraction]] = []
        allowed: dict[tuple, _Box] = {}
        for row, ((terms, constant), strict, position) in enumerate(rows):
            for product, value in terms.items():
                what = f"a coefficient of {'*'.join(product)}"
                self._require_in_range(value, _LEAST_COEFFICIENT, what, position)
                weights[row, columns.of(product)] = value
            self._require_in_range(constant, _LEAST_OFFSET, "a constant", position)
            offset[row] = constant
            exact.append(({columns.of(p): value for p, value in terms.items()}, constant))
            # Constraints on parallel linear functions may contradict each other.
            direction = sorted(terms.items())
            scale = direction[0][1]
            key = tuple((product, value / scale) for product, value in direction)
            box = allowed.setdefault(key, {})
            side: _Side = (0, "upper" if scale > 0 else "lower")
            _tighten(box, side, _Bound(-constant / scale, strict, position))
            if len(box) == 2 and _is_empty(box[0, "lower"], box[0, "upper"]):
                self._contradict(
                    position, "expected constraints that can hold together, got a contradiction"
                )
        strict_rows = tuple(row.strict for row in rows)
        return Conjunction(weights, offset, tuple(exact), strict_rows if any(strict_rows) else None)

    def _require_in_range(self, value: Fraction, least: Fraction, what: str, position: int) -> None:
        """Refuses a number in a constraint on outputs that floating point cannot represent."""
        if value and not least <= abs(value) < _OVERFLOWS:
            size, limit = ("below", least) if abs(value) < least else ("above", _LARGEST)
            got = f"got one {size} {float(limit):.3g} in magnitude; scale the constraint"
            self.fail(position, f"expected {what} in the range of floating point, {got}")

    def _rounded(self, box: _Box, inputs: int) -> _Ends:
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
                self._contradict(position, f"expected lower {sign} upper for X_{index}, {got}")
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


class _Columns:
    """Where the rows of a property weigh its variables and their products.

    Attributes:
      on_inputs: whether they weigh inputs, too.
      products: the columns of the factors of each product.
      count: how many columns there are.
    """

    def __init__(self, inputs: int, outputs: int, groups: Sequence[Sequence[Constraint]]):
        """Numbers the columns that the constraints need: outputs, inputs, products."""
        rows = [row for group in groups for row in group if not _is_bound(row)]
        products = {m for row in rows for m in row.function.terms if len(m) > 1}
        names = {name for row in rows for m in row.function.terms for name in m}
        self._outputs = outputs
        self.on_inputs = bool(products) or any(name[0] == "X" for name in names)
        ordered = sorted(products)
        self.products = tuple(tuple(self._variable(name) for name in m) for m in ordered)
        first = outputs + (inputs if self.on_inputs else 0)
        self._of_product: dict[Monomial, int] = {m: first + k for k, m in enumerate(ordered)}
        self.count = first + len(ordered)

    def of(self, product: Monomial) -> int:
        """The column of a variable or a product."""
        if product in self._of_product:
            return self._of_product[product]
        (name,) = product
        return self._variable(name)

    def _variable(self, name: str) -> int:
        return int(name[2:]) + (self._outputs if name[0] == "X" else 0)


def _is_bound(constraint: Constraint) -> bool:
    """Whether a constraint is on one input alone."""
    terms = constraint.function.terms
    if len(terms) != 1:
        return False
    (product,) = terms
    return len(product) == 1 and product[0][0] == "X"


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

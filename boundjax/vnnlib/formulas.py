"""Formulas over the variables of a file, in disjunctive normal form and exact arithmetic."""

from __future__ import annotations

import decimal
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from boundjax.vnnlib import limits
from boundjax.vnnlib.expressions import Atom, Expression, Fail, List, quoted

VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?")
_COMPARISONS = ("<=", ">=", "<", ">", "=")


# The names of the variables of a product, in order.
Monomial = tuple[str, ...]


class Polynomial(NamedTuple):
    """The sum of `terms[m] * m` and a constant, in exact arithmetic; no coefficient is 0."""

    terms: dict[Monomial, Fraction]
    constant: Fraction


def weighted_sum(parts: Sequence[tuple[int | Fraction, Polynomial]]) -> Polynomial:
    """The sum of polynomials, each multiplied by a factor."""
    terms: dict[Monomial, Fraction] = {}
    constant = Fraction(0)
    for factor, part in parts:
        constant += factor * part.constant
        for product, value in part.terms.items():
            terms[product] = terms.get(product, 0) + factor * value
    return Polynomial({product: value for product, value in terms.items() if value}, constant)


class Constraint(NamedTuple):
    """The constraint `function <= 0`, or `< 0` if it is strict, and where it starts in the text."""

    function: Polynomial
    strict: bool
    position: int


Disjuncts = list[list[Constraint]]


class Formulas:
    """Converts expressions to disjunctions of conjunctions of constraints."""

    def __init__(self, declared: Mapping[str, int], fail: Fail):
        """Reads formulas over the variables of `declared`, which may grow."""
        self._declared, self._fail = declared, fail
        self._numbers: dict[str, Fraction] = {}  # token -> value

    def split(self, node: Expression, expected: str) -> tuple[str, list[Expression]]:
        """The head of a list, and its arguments."""
        if isinstance(node, Atom):
            got = quoted(node.text)
            self._fail(node.position, f"expected {expected} in parentheses, got {got}")
        head = node.items[0] if node.items else None
        if not isinstance(head, Atom):
            got = "'('" if node.items else "'()'"
            self._fail(node.position, f"expected {expected} after '(', got {got}")
        return head.text, node.items[1:]

    def normal_form(self, node: Expression, negated: bool = False) -> Disjuncts:
        """Converts a formula, or its negation."""
        head, arguments = self.split(node, "a formula")
        count = len(arguments)
        if head in _COMPARISONS:
            return self._comparison(node.position, head, arguments, negated)
        if head == "not":
            if count != 1:
                self._fail(node.position, f"expected not with 1 formula, got {count}")
            return self.normal_form(arguments[0], not negated)
        if head not in ("and", "or", "=>"):
            known = "and, or, not, =>, <=, >=, <, > or ="
            self._fail(node.position, f"expected {known}, got {quoted(head)}; rewrite it")
        if not arguments:
            self._fail(node.position, f"expected at least one formula in {head}, got none")
        parts = [(argument, negated) for argument in arguments]
        if head == "=>":  # the last one, or one of the others does not hold
            parts[:-1] = [(argument, not negated) for argument in arguments[:-1]]
        return self._combined(parts, (head != "and") != negated, node.position)

    def _combined(
        self, parts: Iterable[tuple[Expression, bool]], any_of: bool, position: int
    ) -> Disjuncts:
        """The disjunction, or the conjunction, of formulas that are negated or not."""
        disjuncts: Disjuncts = [] if any_of else [[]]
        shared: list[Constraint] = []
        for argument, negated in parts:
            inner = self.normal_form(argument, negated)
            if any_of:
                disjuncts.extend(inner)
                self._require_few(len(disjuncts), position)
            elif len(inner) == 1:
                shared.extend(inner[0])
            else:
                disjuncts = self.product(disjuncts, inner, position)
        return self.product([shared], disjuncts, position) if shared else disjuncts

    def _comparison(
        self, position: int, head: str, arguments: list[Expression], negated: bool
    ) -> Disjuncts:
        """Converts `(<= a b c)`, which is `a <= b <= c`, and the like."""
        if len(arguments) < 2:
            self._fail(position, f"expected {head} with at least 2 terms, got {len(arguments)}")
        constraints: list[Constraint] = []
        for left, right in itertools.pairwise(map(self._polynomial, arguments)):
            sides = [(left, right)] if head in ("<=", "<") else [(right, left)]
            if head == "=":
                sides.append((left, right))
            # The negation of a <= b is b < a.
            for low, high in sides:
                less, more = (high, low) if negated else (low, high)
                function = weighted_sum([(1, less), (-1, more)])
                constraints.append(Constraint(function, (head in ("<", ">")) != negated, position))
        return [[constraint] for constraint in constraints] if negated else [constraints]

    def _require_few(self, count: int, position: int) -> None:
        if count > limits.MAX_DISJUNCTS:
            self._fail(position, f"expected at most {limits.MAX_DISJUNCTS} disjuncts, got {count}")

    def product(self, left: Disjuncts, right: Disjuncts, position: int) -> Disjuncts:
        """Multiplies out the conjunction of two disjunctions."""
        self._require_few(len(left) * len(right), position)
        size = sum(map(len, left)) * len(right) + len(left) * sum(map(len, right))
        if size > limits.MAX_CONSTRAINTS:
            self._fail(
                position, f"expected at most {limits.MAX_CONSTRAINTS} constraints, got {size}"
            )
        return [[*a, *b] for a in left for b in right]

    def _polynomial(self, node: Expression) -> Polynomial:
        """Converts a term to a polynomial of the variables."""
        if isinstance(node, Atom):
            name = node.text
            if name in self._declared:
                return Polynomial({(name,): Fraction(1)}, Fraction(0))
            if VARIABLE.fullmatch(name):
                self._fail(node.position, f"expected a declared variable, got {name}; declare it")
            return Polynomial({}, self._number(node))
        head, arguments = self.split(node, "a term")
        if head not in ("+", "-", "*", "/"):
            self._fail(node.position, f"expected +, -, * or / in a term, got {quoted(head)}")
        if not arguments:
            self._fail(node.position, f"expected at least one term after {head}, got none")
        parts = [self._polynomial(argument) for argument in arguments]
        if head == "/":
            parts[1:] = [self._inverse(node, part) for part in parts[1:]]
        if head in ("*", "/"):
            return self._multiplied(node, parts)
        if head == "-" and len(parts) == 1:
            return weighted_sum([(-1, parts[0])])
        sign = 1 if head == "+" else -1
        return weighted_sum([(1, parts[0]), *((sign, part) for part in parts[1:])])

    def _inverse(self, node: List, part: Polynomial) -> Polynomial:
        if part.terms or not part.constant:
            got = "*".join(next(iter(part.terms), ("0",)))
            self._fail(node.position, f"expected a number other than 0 as divisor, got {got}")
        return Polynomial({}, 1 / part.constant)

    def _multiplied(self, node: Expression, parts: list[Polynomial]) -> Polynomial:
        product = parts[0]
        for part in parts[1:]:
            product = self._product_of(node, product, part)
            for value in (product.constant, *product.terms.values()):
                # Each factor of a long product adds digits.
                bits = max(value.numerator.bit_length(), value.denominator.bit_length())
                if bits > limits.MAX_BITS:
                    got = "got a long product; write its value"
                    self._fail(node.position, f"expected numbers of fewer digits, {got}")
        return product

    def _product_of(self, node: Expression, left: Polynomial, right: Polynomial) -> Polynomial:
        if len(left.terms) * len(right.terms) > limits.MAX_PRODUCTS:
            most = limits.MAX_PRODUCTS
            self._fail(node.position, f"expected at most {most} products of variables, got more")
        terms: dict[Monomial, Fraction] = {}
        for one, other in itertools.product(left.terms, right.terms):
            names = tuple(sorted((*one, *other)))
            if len(names) > 2:
                got = " and ".join(names[:3])
                self._fail(node.position, f"expected products of two variables, got one of {got}")
            terms[names] = terms.get(names, 0) + left.terms[one] * right.terms[other]
        constants = [
            (factor, Polynomial(part.terms, Fraction(0)))
            for factor, part in ((right.constant, left), (left.constant, right))
        ]
        products = Polynomial(terms, left.constant * right.constant)
        return weighted_sum([(1, products), *constants])

    def _number(self, node: Atom) -> Fraction:
        text = node.text
        if text in self._numbers:
            return self._numbers[text]
        if text.lower().lstrip("+-") in ("inf", "infinity", "nan"):
            self._fail(node.position, f"expected a finite number, got {quoted(text)}; give a bound")
        match = _NUMBER.fullmatch(text)
        if not match:
            self._fail(node.position, f"expected a number or a variable, got {quoted(text)}")
        if len(text) > limits.MAX_DIGITS:
            self._fail(
                node.position, f"expected at most {limits.MAX_DIGITS} digits, got {len(text)}"
            )
        sign, digits, exponent = match[1], match[2], int(match[3] or 0)
        value = decimal.Decimal(sign + digits)
        # Check the exponent first: the size of the fraction is exponential in that of the exponent.
        # A zero may have any exponent.
        if value and value.adjusted() + exponent > 38:
            got = f"got {quoted(text)}; scale the constraint"
            self._fail(node.position, f"expected a number in float32's range, {got}")
        if value and value.adjusted() + exponent < -limits.MAX_DIGITS:
            got = f"got {quoted(text)}; write 0 or scale the constraint"
            self._fail(node.position, f"expected 0 or a number above 1e-{limits.MAX_DIGITS}, {got}")
        self._numbers[text] = Fraction(value) * Fraction(10) ** exponent if value else Fraction(0)
        return self._numbers[text]

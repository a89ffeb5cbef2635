"""Selections by comparisons of one value: in every branch only a part of its range counts.

`where(x > t, f(x), g(x)) = where(x > t, f(max(x, t)), g(min(x, t)))`, exactly, also in floating
point. If all branches are linear in `x`, the whole is one op, `pieces`, with lines of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from boundjax.ir.composite import composite
from boundjax.ir.families import Scalar
from boundjax.ir.node import Node, Perturbed
from boundjax.ops.branches import Bound, Piece, Term, contains, pieces
from boundjax.tracing.matching import GraphView, times_constant
from boundjax.tracing.patterns.rule import Rewrite

# More regions than this, or branches of more equations, are left alone.
_MOST_REGIONS = 6
_MOST_EQUATIONS = 32

_COMPARISONS = {"gt": (True, True), "ge": (True, False), "lt": (False, True), "le": (False, False)}
_ELEMENTWISE = ("add", "sub", "mul", "div", "neg", "max", "min", "copy", "select_n")

Region = tuple[Bound, ...]


class _Constants:
    """The constants of a rewrite, each listed once."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def index(self, constant: Any) -> int:
        for k, other in enumerate(self.values):
            if other is constant:
                return k
        self.values.append(constant)
        return len(self.values) - 1


def _compared(view: GraphView, predicate: Any) -> Iterator[Any]:
    """The perturbed values that a predicate compares with constants."""
    node = view.node(view.plain(predicate))
    if node is None:
        return
    for operand in node.operands:
        operand = view.plain(operand)
        inner = view.node(operand)
        if inner is not None and inner.dtype == np.bool_:
            yield from _compared(view, operand)
        elif inner is not None:
            of = view.made_by(operand, "abs", "neg")
            yield operand if of is None else view.plain(of.operands[0])


def _regions(
    view: GraphView, predicate: Any, x: Any, wanted: bool, constants: _Constants
) -> list[Region] | None:
    """Intersections of half-lines whose union is where a predicate on `x` is true (false).

    None if it depends on anything else. Their closures are what counts.
    """
    node = view.node(view.plain(predicate))
    if node is None or node.shape != view.shape(x):
        return None
    if node.primitive == "not":
        return _regions(view, node.operands[0], x, not wanted, constants)
    if node.primitive in ("and", "or"):
        parts = [_regions(view, o, x, wanted, constants) for o in node.operands]
        first, second = parts
        if first is None or second is None:
            return None
        if (node.primitive == "and") != wanted:
            return first + second
        return [(*a, *b) for a, b in itertools.product(first, second)]
    if node.primitive not in (*_COMPARISONS, "eq", "ne"):
        return None
    left, right = (view.plain(operand) for operand in node.operands)
    turned = view.node(left) is None
    value, constant = (right, left) if turned else (left, right)
    if view.node(constant) is not None or jnp.result_type(constant) != node.input_shapes[0].dtype:
        return None
    end = constants.index(constant)
    if node.primitive in ("eq", "ne"):
        if value != x:
            return None
        if (node.primitive == "eq") != wanted:
            return [(Bound(Term(1.0, end), below, True),) for below in (True, False)]
        return [tuple(Bound(Term(1.0, end), below, False) for below in (True, False))]
    below, strict = _COMPARISONS[node.primitive]
    below = below != turned
    if not wanted:
        below, strict = not below, not strict
    if value == x:
        return [(Bound(Term(1.0, end), below, strict),)]
    of = view.made_by(value, "abs", "neg")
    if of is None or view.plain(of.operands[0]) != x:
        return None
    if of.primitive == "neg":
        return [(Bound(Term(-1.0, end), not below, strict),)]
    outer = Bound(Term(1.0, end), below, strict)
    inner = Bound(Term(-1.0, end), not below, strict)
    return [(outer,), (inner,)] if below else [(outer, inner)]


class _Branch(NamedTuple):
    """One case of a selection, and the regions in which it is selected."""

    case: Any
    regions: list[Region]


def branches(view: GraphView, node: Node) -> Rewrite | None:
    """`where(predicate of x, f(x), g(x))`, see the module."""
    if len(node.operands) != 3 or not jnp.issubdtype(node.dtype, jnp.floating):
        return None
    predicate, *cases = (view.plain(operand) for operand in node.operands)
    x = next(_compared(view, predicate), None)
    if x is None or view.shape(x) != node.shape or view.maker(x).dtype != node.dtype:
        return None
    constants, all_branches = _Constants(), []
    for case, wanted in zip(cases, (False, True), strict=True):
        regions = _regions(view, predicate, x, wanted, constants)
        if regions is None:
            return None
        all_branches.append(_Branch(case, regions))
    if sum(len(branch.regions) for branch in all_branches) > _MOST_REGIONS:
        return None
    return _linear(view, node, x, all_branches, constants) or _clipped(
        view, node, x, all_branches, constants
    )


# --- all branches linear --------------------------------------------------------------------------


def _linear(
    view: GraphView, node: Node, x: Any, all_branches: Sequence[_Branch], constants: _Constants
) -> Rewrite | None:
    parts: list[Piece] = []
    for branch in reversed(all_branches):
        of_case = _linear_pieces(view, branch.case, x, constants)
        if of_case is None:
            return None
        for region, part in itertools.product(branch.regions, of_case):
            parts.append(part._replace(bounds=(*region, *part.bounds)))
    if len(parts) > _MOST_REGIONS or not view.covers("pieces", node, x, *constants.values):
        return None
    static = tuple(parts)

    def function(x: Any, *values: Any) -> Any:
        return composite("pieces", pieces, x, *values, parts=static)

    return Rewrite(function, [x, *constants.values])


def _linear_pieces(view: GraphView, case: Any, x: Any, constants: _Constants) -> list[Piece] | None:
    """A case as pieces; None unless it is `a x + b`, with two roundings at most, or pieces."""
    inner = view.made_by(case, "pieces")
    if inner is not None and view.plain(inner.operands[0]) == x:
        numbers = [constants.index(c) for c in inner.operands[1:]]
        return [_renumbered(part, numbers) for part in inner.params["parts"]]
    if view.node(case) is None:
        return [Piece((), Term(0.0), Term(1.0, constants.index(case)))]
    slope = _slope(view, case, x, constants)
    if slope is not None:
        return [Piece((), slope, Term(0.0))]
    added = view.made_by(case, "add", "sub")
    if added is None or added.shape != view.shape(x):
        return None
    for position in (0, 1):
        scaled, offset = added.operands[position], added.operands[1 - position]
        slope = _slope(view, view.plain(scaled), x, constants)
        if slope is None or view.node(offset) is not None:
            continue
        subtracted = added.primitive == "sub"
        sign = -1.0 if subtracted and position == 1 else 1.0
        of_offset = -1.0 if subtracted and position == 0 else 1.0
        slope = slope._replace(factor=sign * slope.factor)
        return [Piece((), slope, Term(of_offset, constants.index(offset)))]
    return None


def _slope(view: GraphView, operand: Any, x: Any, constants: _Constants) -> Term | None:
    """The slope of `x`, `-x` or a multiple of `x`."""
    if operand == x and view.node(operand) is not None:
        return Term(1.0)
    node = view.node(operand)
    if node is None or node.shape != view.shape(x):
        return None
    if node.primitive == "neg" and view.plain(node.operands[0]) == x:
        return Term(-1.0)
    inner = times_constant(node)
    if node.primitive != "mul" or inner is None or view.plain(inner) != x:
        return None
    return Term(1.0, constants.index(node.constants[0]))


def _renumbered(part: Piece, numbers: Sequence[int]) -> Piece:
    def term(old: Term) -> Term:
        return old if old.operand is None else old._replace(operand=numbers[old.operand])

    bounds = tuple(bound._replace(end=term(bound.end)) for bound in part.bounds)
    return Piece(bounds, term(part.slope), term(part.offset))


# --- other branches -------------------------------------------------------------------------------


def _equations(view: GraphView, case: Any, x: Any) -> list[Node] | None:
    """The equations that compute a case elementwise from `x`, in order; None if there are more."""
    nodes: dict[int, Node] = {}
    stack = [case]
    while stack:
        operand = stack.pop()
        node = view.node(operand)
        if node is None or operand == x or node.index in nodes:
            continue
        elementwise = isinstance(node.op, Scalar) or node.primitive in _ELEMENTWISE
        if not elementwise or node.shape != view.shape(x) or node.index < x.index:
            return None
        if len(nodes) == _MOST_EQUATIONS:
            return None
        nodes[node.index] = node
        stack.extend(node.operands)
    return [nodes[index] for index in sorted(nodes)]


def _clipped(
    view: GraphView, node: Node, x: Any, all_branches: Sequence[_Branch], constants: _Constants
) -> Rewrite | None:
    """Every branch as a function of `x`, clipped to each of its regions."""
    programs = [_equations(view, branch.case, x) for branch in all_branches]
    gains = [
        bool(p) or branch.case == x for p, branch in zip(programs, all_branches, strict=True)
    ]  # a constant gains nothing
    if not any(gains):
        return None
    operands = [x, *constants.values]
    count = len(operands)
    for program, branch in zip(programs, all_branches, strict=True):
        if program is None:
            operands.append(branch.case)
        else:
            operands += [o for n in program for o in n.operands if not isinstance(o, Perturbed)]
            operands += [] if isinstance(branch.case, Perturbed) else [branch.case]

    def function(x_value: Any, *values: Any) -> Any:
        ends, rest = values[: count - 1], iter(values[count - 1 :])
        evaluated = [
            _case_function(branch.case, x, program, rest)
            for branch, program in zip(all_branches, programs, strict=True)
        ]
        regions = [
            (region, case)
            for branch, case in zip(all_branches, evaluated, strict=True)
            for region in branch.regions
        ]
        # The one between others remains: an interval that meets two others meets it, too.
        regions.sort(key=lambda pair: -len(pair[0]))
        value = None
        for region, case in regions:
            inside = jnp.broadcast_to(case(_clip(x_value, region, ends)), node.shape)
            if value is None:
                value = inside
                continue
            # This pattern would match jnp.where again.
            where = contains(region, x_value, ends)
            value = composite("select_n", lax.select_n, where, value, inside)
        return value

    return Rewrite(function, operands)


def _clip(x: Any, region: Region, ends: Sequence[Any]) -> Any:
    for end, below, _ in region:
        x = (jnp.maximum if below else jnp.minimum)(x, end.of(ends, x))
    return x


def _case_function(
    case: Any, x: Any, program: Sequence[Node] | None, rest: Iterator[Any]
) -> Callable[[Any], Any]:
    """A case as a function of `x`; `rest` has the constants of its equations."""
    if program is None:
        value = next(rest)
        return lambda _: value
    constants = [[None if p else next(rest) for p in node.perturbed] for node in program]
    fixed = None if isinstance(case, Perturbed) else next(rest)

    def evaluate(value: Any) -> Any:
        if fixed is not None:
            return fixed
        values = {x.index: value}
        for node, own in zip(program, constants, strict=True):
            operands = [
                values[o.index] if isinstance(o, Perturbed) else constant
                for o, constant in zip(node.operands, own, strict=True)
            ]
            values[node.index] = _again(node, operands)
        return values[case.index]

    return evaluate


def _again(node: Node, operands: Sequence[Any]) -> Any:
    """Evaluates a node at other operands, as an op of the same name."""
    if not isinstance(node.op, Scalar):
        return node.evaluate(*operands)
    return composite(node.primitive, lambda *o, **_: node.evaluate(*o), *operands, **node.params)


# --- other forms ----------------------------------------------------------------------------------


def masked(view: GraphView, node: Node) -> Rewrite | None:
    """`y * (x > t)`, a product with a predicate as a number: `where(x > t, y, 0)`."""
    for kept, other in (node.operands, node.operands[::-1]):
        cast = view.made_by(view.plain(other), "convert_element_type")
        if cast is None or view.node(kept) is None or view.shape(kept) != node.shape:
            continue
        (shape,) = cast.input_shapes
        if shape.dtype == np.bool_ and cast.shape == node.shape:
            return Rewrite(
                lambda p, y: jnp.where(p, y, jnp.zeros((), y.dtype)), [cast.operands[0], kept]
            )
    return None


def shrunk(view: GraphView, node: Node) -> Rewrite | None:
    """`sign(x) max(|x| - t, 0)` for a number `t >= 0`: soft shrinkage."""
    for first, second in (node.operands, node.operands[::-1]):
        sign, rest = (view.node(view.plain(operand)) for operand in (first, second))
        if sign is None or rest is None or sign.primitive != "sign":
            continue
        x = view.plain(sign.operands[0])
        if rest.primitive == "max" and sum(rest.perturbed) == 1:
            position = rest.perturbed.index(True)
            difference = rest.operands[position]
            if view.number(rest.operands[1 - position]) != 0.0:
                continue
        elif rest.primitive == "relu":
            (difference,) = rest.operands
        else:
            continue
        below = view.made_by(view.plain(difference), "sub")
        size = None if below is None else view.made_by(view.plain(below.operands[0]), "abs")
        if below is None or size is None or view.plain(size.operands[0]) != x:
            continue
        threshold = view.number(below.operands[1])
        if threshold is None or not threshold >= 0.0 or view.shape(x) != node.shape:
            continue
        plus, minus = Term(1.0, 0), Term(-1.0, 0)
        parts = (
            Piece((Bound(plus, True, True),), Term(1.0), minus),
            Piece((Bound(minus, False, True),), Term(1.0), plus),
            Piece((Bound(plus, False, False), Bound(minus, True, False)), Term(0.0), Term(0.0)),
        )
        return Rewrite(
            lambda x, t, parts=parts: composite("pieces", pieces, x, t, parts=parts),
            [x, below.operands[1]],
        )
    return None


def excess(view: GraphView, node: Node) -> Rewrite | None:
    """`a - min(a, c) = max(a - c, 0)` for a constant `c`, as in Huber's loss."""
    least = view.made_by(view.plain(node.operands[1]), "min")
    if least is None or sum(least.perturbed) != 1 or least.shape != node.shape:
        return None
    position = least.perturbed.index(True)
    a = view.plain(node.operands[0])
    if view.plain(least.operands[position]) != a or view.shape(a) != node.shape:
        return None
    return Rewrite(
        lambda a, c: jnp.maximum(a - c, jnp.zeros((), a.dtype)), [a, least.operands[1 - position]]
    )

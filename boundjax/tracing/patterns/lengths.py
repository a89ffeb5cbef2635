"""Euclidean lengths, and values that are divided by theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from boundjax.ir.composite import composite
from boundjax.ir.node import Node, Perturbed
from boundjax.ops import normalization
from boundjax.ops.branches import Bound, Piece, Term
from boundjax.ops.length import length
from boundjax.tracing.matching import GraphView, Walked, count, groups_of
from boundjax.tracing.patterns.normalization import factored, squared
from boundjax.tracing.patterns.rule import Rewrite, replayed

# Squares that are added one by one are looked for in a tree of sums of this depth.
_DEPTH = 4


def _of_sum(axes: tuple[int, ...], eps: float) -> Any:
    return lambda x: composite("length", length, x, axes=axes, eps=eps)


def lengths(view: GraphView, node: Node) -> Rewrite | None:
    """`sqrt(sum(x^2) + eps)`, and `sqrt(x^2 + y^2 + eps)` of a few values."""
    if not jnp.issubdtype(node.dtype, jnp.floating) or not node.perturbed[0]:
        return None
    if node.primitive == "pow" and view.number(node.operands[1]) != 0.5:
        return None
    total = _sum_of_squares(view, node.operands[0])
    if total is not None and not total.clipped:
        if not view.covers("length", node, total.x, axes=total.axes, eps=total.eps):
            return None
        of_row = _of_sum(total.axes, total.eps)
        return Rewrite(lambda x: replayed(total.moves, of_row(x)), [total.x])
    leaves = list(_added(view, node.operands[0], _DEPTH))
    squares = [squared(view, leaf) for leaf in leaves if view.node(leaf) is not None]
    numbers = [view.number(leaf) for leaf in leaves if view.node(leaf) is None]
    if not squares or any(s is None or view.shape(s) != node.shape for s in squares):
        return None
    if any(number is None or not 0.0 <= number < math.inf for number in numbers):
        return None
    eps = math.fsum(number for number in numbers if number is not None)
    of_pair = _of_sum((0,), eps)
    return Rewrite(lambda *xs: of_pair(lax.concatenate([x[None] for x in xs], 0)), squares)


def _added(view: GraphView, operand: Any, depth: int) -> Iterator[Any]:
    """The terms of a sum of sums."""
    operand = view.plain(operand)
    node = view.made_by(operand, "add")
    if node is None or depth == 0:
        yield operand
        return
    for term in node.operands:
        yield from _added(view, term, depth - 1)


class _Squares(NamedTuple):
    """`sum(x^2) + eps`, or the larger of `sum(x^2)` and eps.

    Attributes:
      x: the value that is squared.
      total: the node of the sum.
      axes: of the sum.
      eps: `>= 0`.
      clipped: whether eps is a lower end and not added.
      path: all nodes behind the sum, in order.
    """

    x: Any
    total: Node
    axes: tuple[int, ...]
    eps: float
    clipped: bool
    path: tuple[Node, ...]

    @property
    def moves(self) -> tuple[Node, ...]:
        """The nodes behind the sum that only move its elements."""
        return tuple(n for n in self.path if n.primitive not in ("add", "max"))


def _sum_of_squares(view: GraphView, operand: Any) -> _Squares | None:
    def through(node: Node) -> Any:
        if node.primitive == "max":  # max(0, .) does not change a sum of squares
            kept, bound = _with_number(view, node)
            if bound is not None and bound <= 0.0:
                return kept
        return view.passed(node)

    outer = view.walk(operand, through)
    eps, clipped, path, operand = 0.0, False, outer.path, outer.operand
    node = view.made_by(operand, "add", "max")
    if node is not None:
        kept, number = _with_number(view, node)
        if number is None or not 0.0 <= number < math.inf:
            return None
        eps, clipped = number, node.primitive == "max"
        inner = view.walk(kept, through)
        path, operand = (*inner.path, node, *path), inner.operand
    total = view.made_by(operand, "reduce_sum")
    x = None if total is None else squared(view, total.operands[0])
    if total is None or x is None or view.shape(x) != view.shape(total.operands[0]):
        return None
    return _Squares(x, total, tuple(total.params["axes"]), eps, clipped, path)


def _with_number(view: GraphView, node: Node) -> tuple[Any, float | None]:
    """The perturbed operand of a commutative op and the number beside it."""
    for kept, other in (node.operands, node.operands[::-1]):
        number = view.number(other)
        if number is not None and view.node(kept) is not None and view.shape(kept) == node.shape:
            return kept, number
    return None, None


class _Divisor(NamedTuple):
    """What a value is divided by, see `normalization.normalize`.

    Attributes:
      x: the value whose length it is.
      axes, eps, kind: of the length.
      base: an operand: the divisor, or its reciprocal.
      inverse: whether `base` is the reciprocal.
      moves: from `base` to the operand.
      places: for every element of the operand, the length that it is made of.
    """

    x: Any
    axes: tuple[int, ...]
    eps: float
    kind: str
    base: Any
    inverse: bool
    moves: tuple[Node, ...]
    places: np.ndarray


def _divisor(view: GraphView, operand: Any, shape: tuple[int, ...], quotient: bool) -> Any:
    outer = view.walk(operand)
    root, path = outer.operand, outer.path
    if not quotient:
        node = view.made_by(root, "rsqrt", "integer_pow")
        if node is None or node.params.get("y", -1) != -1:
            return None
        path = (node, *path)
        if node.primitive == "rsqrt":
            squares = _sum_of_squares(view, node.operands[0])
            return _of_squares(view, squares, outer, path, shape, inverse=True)
        inner = view.walk(node.operands[0])
        root, path = inner.operand, (*inner.path, *path)
    node = view.made_by(root, "sqrt")
    if node is not None:
        squares = _sum_of_squares(view, node.operands[0])
        return _of_squares(view, squares, outer, (node, *path), shape, inverse=not quotient)
    kind, eps, row = "root", 0.0, root
    node = view.made_by(root, "add", "max", "pieces")
    if node is not None:
        kind = {"add": "sum", "max": "max", "pieces": "safe"}[node.primitive]
        row, number = _unless_zero(view, node) if kind == "safe" else _with_number(view, node)
        if number is None or not 0.0 <= number < math.inf:
            return None
        inner = view.walk(row)
        row, eps, path = inner.operand, number, (*inner.path, node, *path)
    of_row = view.made_by(row, "length")
    if of_row is None or (kind != "root" and of_row.params["eps"] != 0.0):
        return None
    eps = of_row.params["eps"] if kind == "root" else eps
    places = view.places(Walked(Perturbed(of_row.index), path), shape)
    x, axes = of_row.operands[0], of_row.params["axes"]
    eps = 0.0 if kind == "safe" else eps
    return _Divisor(x, axes, eps, kind, outer.operand, not quotient, outer.path, places)


def _of_squares(
    view: GraphView,
    squares: _Squares | None,
    outer: Walked,
    path: tuple[Node, ...],
    shape: tuple[int, ...],
    inverse: bool,
) -> _Divisor | None:
    if squares is None:
        return None
    kind = "max" if squares.clipped else "root"
    eps = math.sqrt(squares.eps) if squares.clipped else squares.eps
    places = view.places(Walked(Perturbed(squares.total.index), (*squares.path, *path)), shape)
    x, axes = squares.x, squares.axes
    return _Divisor(x, axes, eps, kind, outer.operand, inverse, outer.path, places)


def _unless_zero(view: GraphView, node: Node) -> tuple[Any, float | None]:
    """The length `n` in `where(n == 0, number, n)` and its like, which are `pieces` by now."""
    parts: tuple[Piece, ...] = node.params["parts"]
    numbers = [view.number(constant) for constant in node.operands[1:]]
    if any(number is None for number in numbers):
        return None, None

    def value(term: Term) -> float:
        number = 1.0 if term.operand is None else numbers[term.operand]
        assert number is not None
        return term.factor * number

    def at(n: float) -> float:
        for part in parts[:-1]:
            if all(_holds(bound, n) for bound in part.bounds):
                return value(part.slope) * n + value(part.offset)
        return value(parts[-1].slope) * n + value(parts[-1].offset)

    # With all thresholds at 0, two points decide about all positive numbers.
    at_zero = all(value(bound.end) == 0.0 for part in parts for bound in part.bounds)
    same = at_zero and at(1.0) == 1.0 and at(2.0) == 2.0
    return (node.operands[0], at(0.0)) if same and at(0.0) > 0.0 else (None, None)


def _holds(bound: Bound, n: float) -> bool:
    """Whether `n` lies on a half-line that ends at 0."""
    distance = n if bound.below else -n
    return distance > 0.0 if bound.strict else distance >= 0.0


def divided(view: GraphView, node: Node) -> Rewrite | None:
    """`x / g(|x|)`, see `_Divisor`, possibly with a constant factor of the dividend."""
    quotient = node.primitive == "div"
    orders = (node.operands,) if quotient else (node.operands, node.operands[::-1])
    for scaled, below in orders:
        if view.node(scaled) is None or view.node(below) is None:
            continue
        if view.shape(scaled) != node.shape:
            continue
        divisor = _divisor(view, below, node.shape, quotient)
        if divisor is None or math.prod(view.shape(divisor.x)) != math.prod(node.shape):
            continue
        shape = view.shape(divisor.x)
        if (divisor.places.reshape(-1) != groups_of(shape, divisor.axes).reshape(-1)).any():
            continue
        everything = count(shape).reshape(-1)
        for d, factor in factored(view, scaled, node.shape):
            if view.equal(d, everything, divisor.x, everything):
                return _rewritten(view, node, d, factor, divisor)
    return None


def _rewritten(
    view: GraphView, node: Node, d: Any, factor: Node | None, divisor: _Divisor
) -> Rewrite | None:
    axes, eps, kind, shape = divisor.axes, divisor.eps, divisor.kind, view.shape(divisor.x)
    if not view.covers("normalize", node, d, d, axes=axes, eps=eps, kind=kind):
        return None

    def function(d: Any, base: Any) -> Any:
        inverse = base if divisor.inverse else lax.integer_pow(base, -1)
        inverse = jnp.broadcast_to(replayed(divisor.moves, inverse), node.shape).reshape(shape)
        value = composite(
            "normalize",
            normalization.normalize,
            d.reshape(shape),
            inverse,
            axes=axes,
            eps=eps,
            kind=kind,
        ).reshape(node.shape)
        if factor is None:
            return value
        (source,) = factor.input_shapes
        return value * factor.apply(jnp.ones(source.shape, source.dtype))

    return Rewrite(function, [d, divisor.base])

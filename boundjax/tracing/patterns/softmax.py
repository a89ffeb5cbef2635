"""`softmax`, `logsumexp` and `log_softmax`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.ir.composite import composite
from boundjax.ir.node import Node, Perturbed
from boundjax.ops import exponentials
from boundjax.ops.order import index_of_largest
from boundjax.tracing.matching import GraphView, Walked, count, groups_of
from boundjax.tracing.patterns.rule import Rewrite, replayed


def _exponential_sum(view: GraphView, operand: Any) -> tuple[Node, Any] | None:
    """Matches `sum(exp(a))`; returns the node of the sum and the operand `exp(a)`."""
    total = view.made_by(operand, "reduce_sum")
    if total is None:
        return None
    terms = view.plain(total.operands[0])
    return (total, terms) if view.made_by(terms, "exp") is not None else None


def _same(view: GraphView, one: Any, other: Any) -> bool:
    """Whether two operands of one shape are the same function of the input."""
    if view.plain(one) == view.plain(other):
        return True
    everything = count(view.shape(one)).reshape(-1)
    return view.shape(one) == view.shape(other) and view.equal(one, everything, other, everything)


def _spread(view: GraphView, walked: Walked, operand: Any, groups: np.ndarray) -> bool:
    """Whether an operand is the reduction at the walk's end, broadcast back over its groups."""
    shape = view.shape(operand)
    if len(shape) == groups.ndim and math.prod(shape) == math.prod(view.shape(walked.operand)):
        kept = count(shape)
        spread = np.broadcast_shapes(shape, groups.shape) == groups.shape
        if spread and (np.broadcast_to(kept, groups.shape) == groups).all():
            return bool((view.places(walked, shape) == kept).all())
    return bool((view.places(walked, groups.shape) == groups).all())


def _unshifted(view: GraphView, operand: Any, axes: Sequence[int], only_maximum: bool) -> Any:
    """Strips the terms of an operand that are constant along the axes.

    Only terms that are computed from the input, such as its maximum, are stripped: they are finite
    where the input is. An infinite constant (a mask of whole rows) makes the function NaN, which
    must not be lost. With `only_maximum` no other term than the subtracted maximum is stripped.
    """
    shape = view.shape(operand)
    groups = groups_of(shape, axes)
    while True:
        operand = view.plain(operand)
        inner = None if only_maximum else view.made_by(operand, "log_softmax")
        if inner is not None and inner.params == {"axes": tuple(axes)}:
            operand = inner.operands[0]
            continue
        node = view.made_by(operand, "add", "sub")
        if node is None:
            return operand
        orders = [node.operands]
        if node.primitive == "add":
            orders.append(node.operands[::-1])
        for kept, added in orders:
            if view.node(kept) is None or view.shape(kept) != shape or view.node(added) is None:
                continue
            places = np.broadcast_to(count(view.shape(added)), shape)
            if only_maximum and not (node.primitive == "sub" and _is_maximum(view, added, kept)):
                continue
            if view.constant_in(added, places, groups):
                operand = kept
                break
        else:
            return operand


def _is_maximum(view: GraphView, shift: Any, x: Any) -> bool:
    """Whether an operand, which is constant along the reduced axes, is the maximum of `x`.

    Subtracting it rounds no more than the sizes of `x` account for. JAX replaces an infinite
    maximum by 0 and bounds it from below by -inf.
    """

    def through(node: Node) -> Any:
        if node.primitive == "select_n" and len(node.operands) == 3:
            finite = view.made_by(node.operands[0], "is_finite")
            fallback, maximum = node.operands[1:]
            return maximum if finite is not None and view.number(fallback) == 0.0 else None
        if node.primitive == "max":
            for kept, bound in (node.operands, node.operands[::-1]):
                if view.number(bound) == -np.inf and view.shape(kept) == node.shape:
                    return kept
        return view.passed(node)

    maximum = view.made_by(view.walk(shift, through).operand, "reduce_max")
    return maximum is not None and _same(view, maximum.operands[0], x)


def masked_terms(view: GraphView, node: Node) -> Rewrite | None:
    """`where(mask, exp(a), 0) = exp(where(mask, a, -inf))`, for a constant mask.

    A shift of `a` stays a shift: the mask moves to the minuend, unless it is there already.
    """
    if len(node.operands) != 3 or view.node(node.operands[0]) is not None:
        return None
    predicate, *cases = node.operands
    for position, kept in enumerate(cases):
        if view.number(cases[1 - position]) != 0.0:
            continue
        terms = view.made_by(view.plain(kept), "exp")
        if terms is None:
            return None
        (a,) = terms.operands
        shifted = view.made_by(view.plain(a), "sub")
        x, *shift = (a,) if shifted is None else shifted.operands
        if view.node(x) is None or view.shape(x) != node.shape:
            return None
        if _masked(view, x, predicate, position):
            return Rewrite(jnp.exp, [a])

        def function(mask: Any, x: Any, *shift: Any, position: int = position) -> Any:
            least = jnp.full_like(x, -jnp.inf)
            masked = lax.select_n(mask, *((x, least) if position == 0 else (least, x)))
            return jnp.exp(masked - shift[0] if shift else masked)

        return Rewrite(function, [predicate, x, *shift])
    return None


def _masked(view: GraphView, x: Any, predicate: Any, position: int) -> bool:
    """Whether an operand is -inf wherever the predicate does not select the case `position`."""
    node = view.made_by(view.plain(x), "select_n")
    if node is None or len(node.operands) != 3:
        return False
    mask, *cases = node.operands
    return view.number(cases[1 - position]) == -jnp.inf and view.same_constant(mask, predicate)


class _Fill(NamedTuple):
    """A number that fills masked entries of a value, and the value without masks.

    Attributes:
      value: the operand behind all selections.
      number: the fill.
      masks: constant predicates, and the case that each of them keeps.
    """

    value: Any
    number: float
    masks: list[tuple[Any, int]]


def _filled(view: GraphView, operand: Any) -> _Fill | None:
    """Matches `where(mask, a, -1e9)`, also several times, with any number from -1e4 downwards."""
    masks: list[tuple[Any, int]] = []
    fill: float | None = None
    while (node := view.made_by(view.plain(operand), "select_n")) is not None:
        predicate, *cases = node.operands
        if len(cases) != 2 or isinstance(predicate, Perturbed):
            break
        numbers = [view.number(case) for case in cases]
        kept = next((k for k in (0, 1) if _is_fill(numbers[1 - k]) and view.node(cases[k])), None)
        if kept is None or jnp.shape(predicate) != node.shape:
            break
        if fill is not None and numbers[1 - kept] != fill:
            return None
        fill, operand = numbers[1 - kept], cases[kept]
        masks.append((predicate, kept))
    return None if fill is None else _Fill(operand, fill, masks)


def _is_fill(number: float | None) -> bool:
    return number is not None and -jnp.inf < number <= -1e4


def _softmax_of_filled(
    value: Array, *predicates: Array, kept: tuple[int, ...], fill: float, axes: tuple[int, ...]
) -> Array:
    """The softmax of a value whose masked entries are filled, as if they were filled with -inf.

    Wherever the others are at least half of the fill, the weight of a masked entry is below
    exp(-5000): less than any number of the dtype, and than what every op is charged for underflow.
    A row that is masked entirely is constant.
    """
    masked = jnp.zeros(value.shape, bool)
    for predicate, case in zip(predicates, kept, strict=True):
        masked = masked | (predicate if case == 0 else ~predicate)
    nothing = masked.all(axes, keepdims=True)
    instead = jnp.where(jnp.broadcast_to(nothing, value.shape), 0.0, -jnp.inf)
    value = lax.select(masked, instead.astype(value.dtype), value)
    least = 0.5 * fill
    return jnp.exp(
        composite("log_softmax", exponentials.log_softmax, value, axes=axes, least=least)
    )


def softmax(view: GraphView, node: Node, only_maximum: bool) -> Rewrite | None:
    """`exp(a) / sum(exp(a))`.

    A number that fills masked entries counts as -inf, since no digit next to it is right.
    """
    numerator, denominator = node.operands
    walked = view.walk(denominator)
    match = _exponential_sum(view, walked.operand)
    if match is None:
        return None
    total, terms = match
    if view.shape(numerator) != node.shape or not _same(view, numerator, terms):
        return None
    axes = tuple(total.params["axes"])
    if not _spread(view, walked, denominator, groups_of(node.shape, axes)):
        return None
    operand = _unshifted(view, view.maker(terms).operands[0], axes, only_maximum)
    if not view.covers("log_softmax", node, operand, axes=axes):
        return None
    filled = _filled(view, operand)
    if filled is not None:
        kept = tuple(case for _, case in filled.masks)
        masked = functools.partial(_softmax_of_filled, kept=kept, fill=filled.number, axes=axes)
        return Rewrite(masked, [filled.value, *(predicate for predicate, _ in filled.masks)])
    return Rewrite(lambda a: jnp.exp(_log_softmax_of(a, axes)), [operand])


def _log_softmax_of(a: Any, axes: tuple[int, ...]) -> Any:
    return composite("log_softmax", exponentials.log_softmax, a, axes=axes)


def _logsumexp_of(a: Any, axes: tuple[int, ...]) -> Any:
    return composite("logsumexp", exponentials.logsumexp, a, axes=axes)


def logarithm(view: GraphView, node: Node) -> Rewrite | None:
    """`log(sum(exp(a)))`, also of the sum's absolute value, as it is positive."""

    def through(passed: Node) -> Any:
        return passed.operands[0] if passed.primitive == "abs" else view.passed(passed)

    walked = view.walk(node.operands[0], through)
    match = _exponential_sum(view, walked.operand)
    if match is None:
        return None
    total, terms = match
    axes = tuple(total.params["axes"])
    operand = view.maker(terms).operands[0]
    if not view.covers("logsumexp", node, operand, axes=axes):
        return None
    return Rewrite(lambda a: replayed(walked.path, _logsumexp_of(a, axes)), [operand])


def shifted_back(view: GraphView, node: Node, only_maximum: bool) -> Rewrite | None:
    """`logsumexp(x - c) + c` for a `c` as in `_unshifted`."""
    for reduced, back in (node.operands, node.operands[::-1]):
        walked = view.walk(reduced)
        inner = view.made_by(walked.operand, "logsumexp")
        if inner is None:
            continue
        shifted = view.made_by(view.plain(inner.operands[0]), "sub")
        if shifted is None:
            continue
        x, shift = shifted.operands
        if view.node(x) is None or view.shape(x) != shifted.shape or view.node(shift) is None:
            continue
        if only_maximum and not _is_maximum(view, shift, x):
            continue
        axes = inner.params["axes"]
        groups = groups_of(shifted.shape, axes)
        places = np.broadcast_to(count(view.shape(shift)), shifted.shape)
        if not view.constant_in(shift, places, groups):
            continue
        # One element of every group stands for all of it.
        one_of = np.zeros(math.prod(inner.shape), np.int32)
        one_of[groups.reshape(-1)] = count(shifted.shape).reshape(-1)
        there = places.reshape(-1)[one_of[view.places(walked, node.shape)]]
        here = np.broadcast_to(count(view.shape(back)), node.shape)
        if view.equal(back, here, shift, there):

            def function(a: Any, path: Any = walked.path, axes: Any = axes) -> Any:
                return jnp.broadcast_to(replayed(path, _logsumexp_of(a, axes)), node.shape)

            return Rewrite(function, [x])
    return None


def log_softmax(view: GraphView, node: Node, only_maximum: bool) -> Rewrite | None:
    """`a - logsumexp(a)`."""
    a, reduced = node.operands
    walked = view.walk(reduced)
    inner = view.made_by(walked.operand, "logsumexp")
    if inner is None or view.shape(a) != node.shape or not _same(view, a, inner.operands[0]):
        return None
    axes = inner.params["axes"]
    if not _spread(view, walked, reduced, groups_of(node.shape, axes)):
        return None
    operand = _unshifted(view, a, axes, only_maximum)
    if not view.covers("log_softmax", node, operand, axes=axes):
        return None
    return Rewrite(lambda a: _log_softmax_of(a, axes), [operand])


def compared(view: GraphView, node: Node) -> Rewrite | None:
    """`softmax(x)_i > softmax(x)_j`, also as a difference beside 0, where `x_i > x_j`.

    The bounds of a difference of logits are exact where the network is linear; two exponentials
    have lines of their own, which say little of two that grow together. Next to a logit that is
    infinite or NaN all weights are NaN, and no comparison holds.
    """
    first, second = node.operands
    difference = view.made_by(view.plain(first), "sub")
    if difference is not None and view.number(second) == 0.0:
        first, second = difference.operands

    def through(passed: Node) -> Any:
        return passed.operands[0] if passed.primitive == "slice" else view.passed(passed)

    walks = view.walk(first, through), view.walk(second, through)
    logits = [_logits(view, walked.operand) for walked in walks]
    if logits[0] is None or logits[0] != logits[1]:
        return None
    x, axes, _ = logits[0]
    groups = groups_of(view.shape(x), axes).reshape(-1)
    shape = node.shape if difference is None else difference.shape
    rows = [groups[view.places(walked, shape)] for walked in walks]
    if shape != node.shape or not (rows[0] == rows[1]).all():
        return None

    def function(x: Any) -> Any:
        one, other = (jnp.broadcast_to(replayed(walked.path, x), shape) for walked in walks)
        numbers = jnp.broadcast_to(jnp.all(x < jnp.inf, axes, keepdims=True), x.shape)
        numbers = jnp.broadcast_to(replayed(walks[0].path, numbers), shape)
        return node.evaluate(one - other, jnp.zeros_like(one)) & numbers

    return Rewrite(function, [x])


class _Logits(NamedTuple):
    """What a softmax is taken of, along which axes, and whether this is its logarithm."""

    x: Any
    axes: tuple[int, ...]
    logarithm: bool


def _logits(view: GraphView, operand: Any) -> _Logits | None:
    """Matches a softmax or its logarithm.

    None under a mask: of two masked entries either logit may be larger, but both weights are 0.
    """
    exponential = view.made_by(operand, "exp")
    if exponential is not None:
        operand = view.plain(exponential.operands[0])
    node = view.made_by(operand, "log_softmax")
    if node is None or "least" in node.params:
        return None
    (x,) = node.operands
    if view.made_by(view.plain(x), "select_n"):
        return None
    return _Logits(x, tuple(node.params["axes"]), exponential is None)


def largest(view: GraphView, node: Node) -> Rewrite | None:
    """`argmax(softmax(x))`, also of the least, with differences of `x` in place of the weights'."""
    weights, *differences = node.operands
    found = _logits(view, view.plain(weights))
    if found is None or not differences:
        return None
    axis, sign = node.params["axis"], node.params["sign"]
    minuend = view.maker(view.maker(differences[0]).operands[0])
    if minuend.operands[0] != weights or axis % len(view.shape(weights)) not in found.axes:
        return None

    def function(weights: Any, x: Any) -> Any:
        return index_of_largest(weights, axis, sign, ordered_like=x)

    return Rewrite(function, [weights, found.x])

"""Comparisons of perturbed values, logic on their results, and selection between two cases.

A predicate's interval is a pair of booleans: `lower` where it is certainly true, `upper` where it
may be true. No linear function bounds a predicate, so a selection's planes take its interval.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Expansion, Joint, Planes, Position, copies, no_error
from boundjax.ir.node import Node, Perturbed
from boundjax.ir.table import register
from boundjax.numerics import larger, signed_parts, smaller
from boundjax.ops.product import weighted_sum
from boundjax.sets.interval import Interval


def _operands(node: Node, intervals: tuple[Interval, ...]) -> list[Interval]:
    """The intervals of all operands in the node's shape; constants are points."""
    perturbed = iter(intervals)
    operands = []
    for operand in node.operands:
        value = jnp.asarray(operand) if not isinstance(operand, Perturbed) else None
        ends = next(perturbed) if value is None else Interval(value, value)
        operands.append(Interval(*(jnp.broadcast_to(end, node.shape) for end in ends)))
    return operands


def _nan(*intervals: Interval) -> Array:
    """Where an end is NaN; a boolean never is."""
    ends = [end for x in intervals for end in x if jnp.issubdtype(end.dtype, jnp.floating)]
    masks = [jnp.isnan(end) for end in ends]
    return functools.reduce(jnp.logical_or, masks, jnp.zeros((), bool))


# --- predicates -----------------------------------------------------------------------------------

# `(x, y) -> (certainly, possibly)` for ends that are not NaN.
Decision = Callable[[Interval, Interval], tuple[Array, Array]]


def _less(x: Interval, y: Interval) -> tuple[Array, Array]:
    return x.upper < y.lower, x.lower < y.upper


def _less_or_equal(x: Interval, y: Interval) -> tuple[Array, Array]:
    return x.upper <= y.lower, x.lower <= y.upper


def _equal(x: Interval, y: Interval) -> tuple[Array, Array]:
    point = (x.lower == x.upper) & (y.lower == y.upper) & (x.lower == y.lower)
    return point, (x.lower <= y.upper) & (y.lower <= x.upper)


def _not_equal(x: Interval, y: Interval) -> tuple[Array, Array]:
    equal, possibly = _equal(x, y)
    return ~possibly, ~equal


_COMPARISONS: dict[str, Decision] = {
    "lt": _less,
    "le": _less_or_equal,
    "gt": lambda x, y: _less(y, x),
    "ge": lambda x, y: _less_or_equal(y, x),
    "eq": _equal,
    "ne": _not_equal,
}


def _comparison(decision: Decision) -> Callable[..., Interval]:
    def image(node: Node, *intervals: Interval) -> Interval:
        x, y = _operands(node, intervals)
        certainly, possibly = decision(x, y)
        # A comparison with NaN is False, which would pass for decided.
        unknown = jnp.broadcast_to(_nan(x, y), node.shape)
        return Interval(certainly & ~unknown, possibly | unknown)

    return image


def _is_nan(node: Node, x: Interval, _: Interval) -> Interval:
    """`x != x`, as `jnp.isnan` is traced: certainly false if both ends are finite."""
    possibly = ~(jnp.isfinite(x.lower) & jnp.isfinite(x.upper))
    return Interval(jnp.zeros_like(possibly), possibly)


def _is_finite(node: Node, x: Interval) -> Interval:
    """Certainly true if both ends are finite; an infinite end may just be a loose bound."""
    certainly = jnp.isfinite(x.lower) & jnp.isfinite(x.upper)
    return Interval(certainly, jnp.ones_like(certainly))


def _monotone(node: Node, *intervals: Interval) -> Interval:
    return Interval(
        node.apply(*(x.lower for x in intervals)), node.apply(*(x.upper for x in intervals))
    )


def _not(node: Node, x: Interval) -> Interval:
    return Interval(~x.upper, ~x.lower)


def _xor(node: Node, *intervals: Interval) -> Interval:
    x, y = _operands(node, intervals)
    different = (x.lower & ~y.upper) | (y.lower & ~x.upper)
    same = (x.lower & y.lower) | ~(x.upper | y.upper)
    return Interval(different, ~same)


# --- selection ------------------------------------------------------------------------------------


def _select_image(node: Node, *intervals: Interval) -> Interval:
    """The selected case where the predicate is decided, the hull of both cases elsewhere."""
    predicate, first, second = _operands(node, intervals)
    number = jnp.issubdtype(node.dtype, jnp.floating)
    low = (smaller if number else jnp.logical_and)(first.lower, second.lower)
    high = (larger if number else jnp.logical_or)(first.upper, second.upper)

    def select(of_first: Array, hull: Array, of_second: Array) -> Array:
        first_or_hull = jnp.where(predicate.upper, hull, of_first)
        return jnp.where(predicate.lower, of_second, first_or_hull)

    return Interval(select(first.lower, low, second.lower), select(first.upper, high, second.upper))


def _plane_below(
    predicate: Interval, first: Interval, second: Interval
) -> tuple[tuple[Array, Array], Array]:
    """Weights of both cases and the offset of a plane below the selection.

    Where the predicate is decided, the plane is the selected case. Elsewhere it is the highest at
    the middle of three: the constant least end, and either case, lowered until it lies below the
    other one: for `a` in `[la, ua]` and `b >= lb`, `a - max(ua - lb, 0)` exceeds neither `a` nor
    `lb`.
    """
    constant = smaller(first.lower, second.lower)
    below_first = -signed_parts(first.upper - second.lower)[1]
    below_second = -signed_parts(second.upper - first.lower)[1]
    at_first, at_second = first.finite_middle + below_first, second.finite_middle + below_second
    # NaN and infinite values never beat the constant.
    use_first = (at_first > constant) & ~(at_second > at_first)
    use_second = (at_second > constant) & ~use_first
    is_first, is_second = ~predicate.upper, predicate.lower
    undecided = ~is_first & ~is_second
    offset = jnp.where(use_first, below_first, jnp.where(use_second, below_second, constant))
    first_weight = (is_first | (undecided & use_first)).astype(first.lower.dtype)
    second_weight = (is_second | (undecided & use_second)).astype(first.lower.dtype)
    # A NaN in the case that is certainly not selected has no influence.
    return (first_weight, second_weight), jnp.where(undecided, offset, 0.0)


def _negated(x: Interval) -> Interval:
    return Interval(-x.upper, -x.lower)


def _select_planes(node: Node, *intervals: Interval, position: Position) -> Planes:
    """Planes over the perturbed cases; a constant case with a weight goes into the offset."""
    predicate, *cases = _operands(node, intervals)
    lower_weights, lower_offset = _plane_below(predicate, *cases)
    upper_weights, upper_offset = _plane_below(predicate, *map(_negated, cases))

    def split(weights: tuple[Array, ...], offset: Array) -> tuple[tuple[Array, ...], Array]:
        kept = []
        for weight, case, perturbed in zip(weights, cases, node.perturbed[1:], strict=True):
            if perturbed:
                kept.append(weight)
            else:
                # Avoid 0 * inf: a constant case may hold -inf where it is never selected.
                offset = offset + jnp.where(weight > 0, case.lower, 0.0)
        return tuple(kept), offset

    def product(weights: tuple[Array, ...], *operands: Array) -> Array:
        if not operands:
            return jnp.zeros(node.shape, node.dtype)
        return weighted_sum(weights, *operands)

    return Planes(
        product,
        *split(lower_weights, lower_offset),
        *split(upper_weights, -upper_offset),
    )


# --- the table ------------------------------------------------------------------------------------


def _on_numbers(node: Node) -> bool:
    """Whether no operand is an integer; no op makes perturbed integers."""
    dtypes = [shape.dtype for shape in node.input_shapes]
    return all(jnp.issubdtype(d, jnp.floating) or d == jnp.bool_ for d in dtypes)


def _on_booleans(node: Node) -> bool:
    return all(shape.dtype == jnp.bool_ for shape in node.input_shapes)


def _on_predicate(node: Node) -> bool:
    return (
        node.perturbed[0]
        and len(node.operands) == 3
        and node.input_shapes[0].dtype == jnp.bool_
        and (jnp.issubdtype(node.dtype, jnp.floating) or node.dtype == jnp.bool_)
    )


def _to_predicate(node: Node) -> bool:
    return node.dtype == jnp.bool_ and jnp.issubdtype(node.input_shapes[0].dtype, jnp.floating)


def _with_itself(node: Node) -> bool:
    return _on_numbers(node) and len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]


def _between_predicates(node: Node) -> bool:
    return _on_predicate(node) and node.dtype == jnp.bool_


register(
    Expansion(
        name="convert_element_type",
        note="of a number to a predicate",
        accepts=_to_predicate,
        expand=lambda node: lambda x: x != 0,
    )
)
register(
    Joint(
        name="ne",
        note="of a value and itself: whether it is NaN",
        accepts=_with_itself,
        image=_is_nan,
    )
)
for _name, _decision in _COMPARISONS.items():
    register(
        Joint(
            name=_name,
            note="a predicate: true, false, or either",
            accepts=_on_numbers,
            image=_comparison(_decision),
        )
    )
for _name, _image in (
    ("and", _monotone),
    ("or", _monotone),
    ("reduce_and", _monotone),
    ("reduce_or", _monotone),
    ("not", _not),
    ("xor", _xor),
):
    register(Joint(name=_name, note="of predicates", accepts=_on_booleans, image=_image))
register(Joint(name="is_finite", note="a predicate: true, or either", image=_is_finite))
register(
    Joint(
        name="select_n",
        note="between two predicates by a third",
        accepts=_between_predicates,
        image=_select_image,
    )
)
register(
    Joint(
        name="select_n",
        note="between two cases by a perturbed predicate",
        accepts=_on_predicate,
        image=_select_image,
        planes=_select_planes,
        error=no_error,
        terms=lambda node: 8,
        reach=copies,
    )
)

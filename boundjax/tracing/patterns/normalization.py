"""Variances, and values that are divided by their roots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from boundjax.ir import table
from boundjax.ir.composite import composite
from boundjax.ir.node import Node, Perturbed
from boundjax.ops import normalization
from boundjax.tracing.matching import GraphView, Walked, count, groups_of, times_constant
from boundjax.tracing.patterns.rule import Rewrite


class _Mean(NamedTuple):
    """A mean: the node of its sum, the path from there to the mean, and the path to the operand."""

    total: Node
    inner: tuple[Node, ...]
    mean: Perturbed
    outer: tuple[Node, ...]

    @property
    def operand(self) -> Any:
        """The value that is averaged."""
        return self.total.operands[0]

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(self.total.params["axes"])


def _mean(view: GraphView, operand: Any) -> _Mean | None:
    """Matches a sum over axes, divided by its number of terms or multiplied by the inverse."""
    outer = view.walk(operand)
    scaled = view.made_by(outer.operand, "div", "mul")
    if scaled is None:
        return None
    first, second = scaled.operands
    if scaled.primitive == "mul" and view.node(first) is None:
        first, second = second, first
    number = view.number(second)
    inner = view.walk(first)
    total = view.made_by(inner.operand, "reduce_sum")
    if number is None or total is None:
        return None
    terms = math.prod(view.shape(total.operands[0])) // max(1, math.prod(total.shape))
    dtype = np.dtype(total.dtype).type
    expected = dtype(terms) if scaled.primitive == "div" else dtype(1) / dtype(terms)
    if terms == 0 or number != float(expected):
        return None
    return _Mean(total, (*inner.path, scaled), outer.operand, outer.path)


def squared(view: GraphView, operand: Any) -> Any | None:
    """The operand of a square."""
    node = view.made_by(view.plain(operand), "square", "integer_pow", "mul")
    if node is None or (node.primitive == "integer_pow" and node.params["y"] != 2):
        return None
    if node.primitive == "mul" and node.operands[0] != node.operands[1]:
        return None
    return node.operands[0]


def variance(view: GraphView, node: Node) -> Rewrite | None:
    """`mean(x^2) - mean(x)^2` over the same axes."""
    of_squares = _mean(view, node.operands[0])
    if of_squares is None or math.prod(node.shape) != math.prod(of_squares.total.shape):
        return None
    x = squared(view, of_squares.operand)
    of_mean = view.walk(node.operands[1])
    root = squared(view, of_mean.operand)
    mean = None if x is None or root is None else _mean(view, root)
    if mean is None or mean.axes != of_squares.axes:
        return None
    shape = view.shape(x)
    if view.shape(mean.operand) != shape or view.shape(of_squares.operand) != shape:
        return None
    everything = count(shape).reshape(-1)
    reduced = count(mean.total.shape).reshape(-1)

    def in_order(start: Node, path: tuple[Node, ...], end: tuple[int, ...]) -> bool:
        # After the reduction, elements may be reshaped but not moved.
        walked = Walked(Perturbed(start.index), path)
        return bool((view.places(walked, end).reshape(-1) == reduced).all())

    square = view.maker(of_mean.operand)
    second = (*mean.inner, *mean.outer, square, *of_mean.path)
    middle = view.maker(mean.mean)
    if (
        math.prod(middle.shape) != reduced.size
        or not in_order(mean.total, mean.inner, middle.shape)
        or not in_order(mean.total, second, node.shape)
        or not in_order(of_squares.total, (*of_squares.inner, *of_squares.outer), node.shape)
        or not view.equal(x, everything, mean.operand, everything)
    ):
        return None
    axes = mean.axes
    kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
    terms = np.asarray(everything.size // reduced.size, node.dtype)

    def function(x: Any, middle: Any) -> Any:
        centred = x - jnp.broadcast_to(middle.reshape(kept), shape)
        return (jnp.sum(lax.square(centred), axes) / terms).reshape(node.shape)

    return Rewrite(function, [mean.operand, mean.mean])


class _InverseRms(NamedTuple):
    """`1 / sqrt(mean(v^2) + eps)` times constants.

    Attributes:
      v: the value that is squared.
      mean: the mean of the squares.
      eps: `>= 0`.
      base: an operand: the inverse root itself, or the radicand.
      under: whether `base` is the radicand.
      path: the nodes after the root: moves, and products with constants.
      groups: for every element of the result, the mean that it is made of.
    """

    v: Any
    mean: _Mean
    eps: float
    base: Any
    under: bool
    path: tuple[Node, ...]
    groups: np.ndarray


def _inverse_rms(
    view: GraphView, operand: Any, shape: tuple[int, ...], quotient: bool
) -> _InverseRms | None:
    def scales(node: Node) -> Any:
        source = view.passed(node)
        return times_constant(node) if source is None and not quotient else source

    def positive(node: Node) -> Any:
        # max(0, .) does not change a mean of squares.
        if node.primitive == "max":
            for kept, bound in (node.operands, node.operands[::-1]):
                number = view.number(bound)
                if number is not None and number <= 0 and view.shape(kept) == node.shape:
                    return kept
        return view.passed(node)

    walked = view.walk(operand, scales)
    root = view.made_by(walked.operand, "sqrt" if quotient else "rsqrt", "integer_pow")
    if root is None:
        return None
    roots = [root]
    if root.primitive == "integer_pow":  # 1 / sqrt(.)
        inner = None if quotient or root.params["y"] != -1 else root.operands[0]
        root = view.made_by(inner, "sqrt")
        if root is None:
            return None
        roots.insert(0, root)
    radicand = root.operands[0]
    before = view.walk(radicand)
    added = view.made_by(before.operand, "add")
    if added is None:
        return None
    for variance, offset in (added.operands, added.operands[::-1]):
        eps = view.number(offset)
        if eps is None or not 0 <= eps < math.inf:
            continue
        clipped = view.walk(variance, positive)
        mean = _mean(view, clipped.operand)
        if mean is None:
            continue
        v = squared(view, mean.operand)
        if v is None or view.shape(v) != view.shape(mean.operand):
            continue
        path = (*mean.inner, *mean.outer, *clipped.path, added, *before.path, *roots, *walked.path)
        groups = view.places(Walked(Perturbed(mean.total.index), path), shape)
        under = root.primitive == "sqrt"
        base = radicand if under else walked.operand
        return _InverseRms(v, mean, eps, base, under, walked.path, groups)
    return None


def normalized(view: GraphView, node: Node) -> Rewrite | None:
    """`d / sqrt(mean(d^2) + eps)`, possibly with constant factors anywhere."""
    quotient = node.primitive == "div"
    orders = (node.operands,) if quotient else (node.operands, node.operands[::-1])
    for scaled, inverse in orders:
        if view.node(scaled) is None or view.node(inverse) is None:
            continue
        if view.shape(scaled) != node.shape:
            continue
        rms = _inverse_rms(view, inverse, node.shape, quotient)
        if rms is None or math.prod(view.shape(rms.v)) != math.prod(node.shape):
            continue
        shape = view.shape(rms.v)
        if (rms.groups.reshape(-1) != groups_of(shape, rms.mean.axes).reshape(-1)).any():
            continue
        everything = count(shape).reshape(-1)
        for d, factor in factored(view, scaled, node.shape):
            if view.equal(d, everything, rms.v, everything):
                return _rewritten(view, node, d, factor, rms, shape)
    return None


def factored(view: GraphView, operand: Any, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    """Yields the operand and None; if it scales another one, also that one and the product."""
    yield operand, None
    node = view.maker(view.plain(operand))
    inner = times_constant(node)
    if inner is not None and view.shape(inner) == shape:
        yield inner, node


def _rewritten(
    view: GraphView,
    node: Node,
    d: Any,
    factor: Node | None,
    rms: _InverseRms,
    shape: tuple[int, ...],
) -> Rewrite | None:
    axes, eps = rms.mean.axes, rms.eps
    if not view.covers("normalize", node, d, d, axes=axes, eps=eps):
        return None

    def constant(scaled: Node) -> Any:
        """The factor of a product or quotient with a constant, in the node's shape."""
        (source,) = scaled.input_shapes
        return scaled.apply(jnp.ones(source.shape, source.dtype))

    def function(d: Any, base: Any) -> Any:
        inverse = lax.rsqrt(base) if rms.under else base
        scale = None
        for step in rms.path:
            if table.moves_only(step.primitive):
                inverse = step.apply(inverse)
                scale = None if scale is None else step.apply(scale)
            else:
                inverse = jnp.broadcast_to(inverse, step.shape)
                scale = None if scale is None else jnp.broadcast_to(scale, step.shape)
                if view.passed(step) is None:
                    scale = constant(step) if scale is None else scale * constant(step)
        inverse = jnp.broadcast_to(inverse, node.shape).reshape(shape)
        function = normalization.normalize
        value = composite("normalize", function, d.reshape(shape), inverse, axes=axes, eps=eps)
        value = value.reshape(node.shape)
        if scale is not None:
            value = value * jnp.broadcast_to(scale, node.shape)
        return value if factor is None else value * constant(factor)

    return Rewrite(function, [d, rms.base])

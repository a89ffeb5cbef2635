"""Elementwise functions of one value: gelu, silu, hinges, entropies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.ir import table
from boundjax.ir.composite import composite
from boundjax.ir.node import Node, Perturbed
from boundjax.ops.hinge import hinge
from boundjax.ops.trigonometry import x_log_x
from boundjax.tracing import jaxprs
from boundjax.tracing.builder import build
from boundjax.tracing.matching import GraphView, times_constant
from boundjax.tracing.patterns.rule import Rewrite

# Functions of one value that JAX traces without a name.
_TEMPLATES: Mapping[str, Callable[..., Any]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": lambda x: x * jax.nn.sigmoid(x),
}


@functools.cache
def _template(name: str, dtype: np.dtype) -> tuple[GraphView, Any]:
    """The graph of a template, and its output."""
    closed = jax.make_jaxpr(_TEMPLATES[name])(jax.ShapeDtypeStruct((2,), dtype))
    shape = jax.ShapeDtypeStruct((2,), dtype)
    built = build(jaxprs.body_of(closed), [shape], rules={}, rewrite=None)
    (output,) = built.outputs
    view = GraphView(built.nodes)
    return view, view.plain(output)


def univariate(view: GraphView, node: Node) -> Rewrite | None:
    """Matches the functions of `_TEMPLATES`, equation by equation."""
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return None
    for name, function in _TEMPLATES.items():
        operand = next((o for o in node.operands if isinstance(o, Perturbed)), None)
        if not view.covers(name, node, operand):
            continue
        template, output = _template(name, np.dtype(node.dtype))
        leaves = list(_unified(view, node, template, template.maker(output), None))
        if leaves and view.shape(leaves[0]) == node.shape:
            return Rewrite(lambda x, n=name, f=function: composite(n, f, x), [leaves[0]])
    return None


def _unified(
    view: GraphView, node: Node, template: GraphView, pattern: Node, leaf: Perturbed | None
) -> Iterator[Perturbed]:
    """Yields the operands that can stand for the template's input if the node computes the same."""
    if node.primitive != pattern.primitive or len(node.operands) != len(pattern.operands):
        return
    if node.params.get("y") != pattern.params.get("y"):
        return
    orders = [node.operands]
    if table.is_commutative(node.primitive):
        orders.append(node.operands[::-1])
    for operands in orders:
        yield from _all_unified(view, list(operands), template, list(pattern.operands), leaf)


def _all_unified(
    view: GraphView,
    operands: list[Any],
    template: GraphView,
    patterns: list[Any],
    leaf: Perturbed | None,
) -> Iterator[Perturbed]:
    if not operands:
        if leaf is not None:
            yield leaf
        return
    operand, pattern = view.plain(operands[0]), patterns[0]
    inner = template.node(pattern)
    if inner is None:
        number = template.number(pattern)
        if number is not None and view.number(operand) == number:
            yield from _all_unified(view, operands[1:], template, patterns[1:], leaf)
    elif inner.index == 0:
        if isinstance(operand, Perturbed) and leaf in (None, operand):
            yield from _all_unified(view, operands[1:], template, patterns[1:], operand)
    elif isinstance(operand, Perturbed):
        for bound in _unified(view, view.maker(operand), template, inner, leaf):
            yield from _all_unified(view, operands[1:], template, patterns[1:], bound)


def hinges(view: GraphView, node: Node) -> Rewrite | None:
    """`where(x > 0, right * x, left * x)`, or with `>=`: both cases are 0 at 0."""
    if len(node.operands) != 3:
        return None
    predicate, otherwise, where = node.operands
    compared = view.made_by(view.plain(predicate), "gt", "ge", "lt", "le")
    if compared is None:
        return None
    x, zero = compared.operands
    above = compared.primitive in ("gt", "ge")
    if view.node(x) is None:
        x, zero, above = zero, x, not above
    if view.number(zero) != 0.0 or view.shape(x) != node.shape:
        return None
    slopes = [_multiple(view, case, view.plain(x)) for case in (otherwise, where)]
    if any(slope is None for slope in slopes) or not view.covers("hinge", node, x, 0.0, 0.0):
        return None
    left, right = slopes if above else slopes[::-1]

    def wide(slope: Any) -> Any:
        return slope if np.ndim(slope) == 0 else jnp.broadcast_to(slope, node.shape)

    def function(x: Any, left: Any, right: Any) -> Any:
        return composite("hinge", hinge, x, wide(left), wide(right))

    return Rewrite(function, [x, left, right])


def _multiple(view: GraphView, operand: Any, x: Any) -> Any | None:
    """The constant `c` for which an operand is `c x`, else None."""
    operand = view.plain(operand)
    if isinstance(operand, Perturbed) and operand == x:
        return np.ones((), view.maker(x).dtype)
    node = view.node(operand)
    if node is None:
        return np.zeros((), view.maker(x).dtype) if view.number(operand) == 0.0 else None
    if node.primitive == "neg" and view.plain(node.operands[0]) == x:
        return -np.ones((), node.dtype)
    inner = times_constant(node)
    if inner is None or view.plain(inner) != x or node.shape != view.shape(x):
        return None
    if node.primitive == "mul":
        return node.constants[0]
    number = view.number(node.constants[0])
    return None if not number else np.asarray(1.0 / number, node.dtype)


def entropy(view: GraphView, node: Node) -> Rewrite | None:
    """`xlogy(x, x)` and `xlog1py(1 - p, -p)`, which is `xlogy(1 - p, 1 - p)`.

    JAX writes `where((x != 0) | isnan(y), x * log(y), 0)`.
    """
    if len(node.operands) != 3 or view.number(node.operands[1]) != 0.0:
        return None
    predicate, _, product = (view.plain(operand) for operand in node.operands)
    either, times = view.made_by(predicate, "or"), view.made_by(product, "mul")
    if either is None or times is None or times.shape != node.shape:
        return None
    x, logarithm = (view.plain(operand) for operand in times.operands)
    of = view.made_by(logarithm, "log", "log1p")
    if of is None or view.shape(x) != node.shape:
        return None
    y = view.plain(of.operands[0])
    if y != x if of.primitive == "log" else not _is_one_more(view, x, y):
        return None
    compared = [view.made_by(view.plain(operand), "ne") for operand in either.operands]
    if any(comparison is None for comparison in compared):
        return None
    sides = [tuple(view.plain(o) for o in c.operands) for c in compared if c is not None]
    expected = sides[0][0] == x and view.number(sides[0][1]) == 0.0 and sides[1] == (y, y)
    if not expected or not view.covers("x_log_x", node, x):
        return None
    return Rewrite(lambda x: composite("x_log_x", x_log_x, x), [x])


def _is_one_more(view: GraphView, x: Any, y: Any) -> bool:
    """Whether `x` is `1 - p` and `y` is `-p`."""
    difference, negative = view.made_by(x, "sub"), view.made_by(y, "neg")
    if difference is None or negative is None or view.number(difference.operands[0]) != 1.0:
        return False
    return view.plain(difference.operands[1]) == view.plain(negative.operands[0])

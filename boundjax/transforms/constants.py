"""Lipschitz constants of single nodes between l2 norms: how far a radius reaches behind an op."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.ir.families import Extremum, Joint, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.numerics import root
from boundjax.ops import norms as norms_of


def together(nodes: Sequence[Node], node: Node) -> tuple[int, float] | None:
    """The operand of the op before an elementwise node, and the Lipschitz constant of both."""
    if not isinstance(node.op, Scalar):
        return None
    before = nodes[node.inputs[0]]
    if not isinstance(before.op, Joint) or before.op.lipschitz_with is None:
        return None
    constant = before.op.lipschitz_with(before, node)
    return None if constant is None else (before.inputs[0], constant)


def joint_radius(node: Node, radii: Sequence[Array]) -> Array | None:
    """The radius after a joint op that states Lipschitz constants; None if there is no finite."""
    assert isinstance(node.op, Joint)
    constants = None if node.op.lipschitz is None else node.op.lipschitz(node)
    if constants is None or not all(map(math.isfinite, constants)):
        return None
    # An operand without influence may have an infinite radius.
    terms = [c * r for c, r in zip(constants, radii, strict=True) if c]
    return sum(terms[1:], terms[0]) if terms else jnp.zeros_like(radii[0])


def radius(node: Node, radii: Sequence[Array], norms: Mapping[str, Array]) -> Array:
    """The radius after a linear op or an extremum, from those of its operands."""
    if node.is_linear:
        return norms_of.radius(node, list(radii), norms.get(node.label))
    if isinstance(node.op, Extremum):
        # |max x - max z| <= max |x - z|, and an element counts once per window that contains it.
        windows = functools.partial(node.op.windows, node)
        shape = jax.eval_shape(windows, *node.input_shapes)
        transposed = jax.linear_transpose(windows, *node.input_shapes)
        counts = transposed(jnp.ones(shape.shape, shape.dtype))
        squares = [jnp.max(c) * jnp.square(r) for c, r in zip(counts, radii, strict=True)]
        return root(sum(squares[1:], squares[0]))
    raise ValueError(without_constant(node))


def first_unbounded(graph: Graph, radii: Sequence[Array], index: int) -> Node:
    """The node before which all radii that lead to a node are finite."""
    node = graph.nodes[index]
    earlier = [i for i in node.inputs if is_unbounded(radii[i])]
    return first_unbounded(graph, radii, earlier[0]) if earlier else node


def is_unbounded(slope: Array) -> bool:
    """Whether a slope is infinite or NaN; False while it is traced."""
    return not isinstance(slope, Tracer) and not np.isfinite(slope)


def without_constant(node: Node) -> str:
    """The message of an error at a node without a Lipschitz constant."""
    return (
        f"'{node.primitive}' at {node.location} has no Lipschitz constant; bound its input "
        "(a clip or a squashing activation before it), or take the box along (method 'bcp')"
    )

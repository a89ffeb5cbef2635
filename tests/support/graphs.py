"""Graphs read by tests: the names of their ops, and what they compute."""

import jax

from boundjax.ir.node import Perturbed
from boundjax.tracing.trace import trace


def primitives(function, x):
    """The perturbed ops of a function, in order, without the input."""
    return [node.primitive for node in trace(function, x).nodes[1:]]


def graph_values(function, x):
    """What the graph of a function computes, node by node."""
    traced = trace(function, x)
    values = [x]
    for node in traced.nodes[1:]:
        values.append(node.apply(*(values[i] for i in node.inputs)))
        assert values[-1].shape == node.shape
        assert values[-1].dtype == node.dtype
    outputs = [values[o.index] if isinstance(o, Perturbed) else o for o in traced.outputs]
    return jax.tree.unflatten(traced.output_tree, outputs)


def traced_aux(transform, input_set):
    """What a transform gives beside the bounds, traced only: its labels in their order."""
    result = []
    jax.eval_shape(lambda abstract: result.append(transform(abstract)[1]), input_set)
    return result[0]

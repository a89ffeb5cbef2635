"""Backward linear bounds, the CROWN family: slope policy x source of the intermediate bounds.

======================  ===========  ============
method                  slopes       intermediate
======================  ===========  ============
CROWN-IBP               adaptive     interval
CROWN                   adaptive     linear
Fast-Lin, CAP           parallel     linear
IBP as a relaxation     constant     interval
======================  ===========  ============
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from chex import Array

from boundjax import graph as graphs
from boundjax import slopes as slope_policies
from boundjax.graph import Graph, Node
from boundjax.ops import extremum
from boundjax.ops.registry import Extremum, Lines, Perturbed, Scalar, Structural, Weighted
from boundjax.sets import InputSet, Interval
from boundjax.transforms import backward
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.backward import LinearBounds, Sides

# Arrays of a block's rows that are alive at once in the backward walk: both sides of coefficients
# before and after an op, and what their product with the lines needs.
_LIVE_ARRAYS = 6


class Auxiliary(NamedTuple):
    """What ``linear(..., has_aux=True)`` met on the way, for a specification of ``m`` rows.

    Attributes:
      interval: interval bounds ``[m]`` of the specification.
      linear: the linear bounds ``[m]`` before they are intersected with those; a side that was not
        asked for holds the interval bound.
      pre_activations: label -> bounds on the op's input.
      slopes: label -> the free slope's position in ``[0, 1]``, as used at unstable units; an op
        with two free lines has a second entry, ``label:below``.
      coefficients: the linear bounds in the input.
      worst_input: ``[m, *input]``, where in the input set the relaxation's lower bound is attained
        (the upper bound, if ``sides="upper"``).
    """

    interval: Interval
    linear: Interval
    pre_activations: dict[str, Interval]
    slopes: dict[str, Array]
    coefficients: LinearBounds
    worst_input: Array


def linear(
    function: Callable[[Array], Any],
    *,
    slopes: str | slope_policies.SlopePolicy | Mapping[str, Array] = "adaptive",
    intermediate: str = "interval",
    sides: Sides = "both",
    max_bytes: int = 2**30,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Turns a function of one example into one from an input set to linear-relaxation bounds.

    Args:
      function: any JAX function of one array; it may close over weights.
      slopes: ``"adaptive"`` (CROWN), ``"parallel"`` (Fast-Lin / CAP), ``"zero"``, ``"one"``,
        ``"constant"`` (interval bounds as a relaxation), a function of ``(lower, upper)``, or a
        dict of positions in ``[0, 1]`` by label.
      intermediate: where pre-activation bounds come from: ``"interval"`` or ``"linear"`` (the same
        walk, recursively).
      sides: ``"lower"``, ``"upper"`` or ``"both"``; the side not asked for holds the interval
        bound, and a walk for one side costs half.
      max_bytes: budget for the rows of one block of intermediate linear bounds, of one example.
      has_aux: also return ``Auxiliary``; needs a single output array.

    Returns:
      ``bounds(input_set, specification=None)``: an ``Interval`` per output leaf, or bounds ``[m]``
      on ``<specification_k, f(x)>`` for a specification ``[m, *out]``. They are intersected with
      the interval bounds. With ``has_aux`` a pair.

    Raises:
      UnsupportedOpError: at an op that is not in ``supported_ops()``.
      ValueError: for an unknown option, or a specification that does not fit the output.

    Source: Zhang et al. 2018 (CROWN), Zhang et al. 2020 (CROWN-IBP), Wong & Kolter 2018 (CAP).
    """
    policy_of = slope_policies.resolve(slopes)
    if intermediate not in ("interval", "linear"):
        raise ValueError(f"intermediate must be 'interval' or 'linear', got {intermediate!r}")
    if sides not in ("lower", "upper", "both"):
        raise ValueError(f"sides must be 'lower', 'upper' or 'both', got {sides!r}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")

    def bounds(input_set: InputSet, specification: Array | None = None) -> Any:
        graph = graphs.trace(function, intervals_of.example_of(input_set))
        if isinstance(slopes, Mapping):
            slope_policies.require_known(slopes, {node.label for node in graph.nodes if node.op})
        walk = _Walk(graph, input_set, policy_of, intermediate == "linear", max_bytes)
        if specification is not None:
            starts, constant = intervals_of.starts_of(graph, specification)
            result, aux = walk.specification(starts, constant, sides)
            return (result, aux) if has_aux else result
        if has_aux:
            if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Perturbed):
                raise ValueError("has_aux needs a function with one output array")
            node = graph.nodes[graph.outputs[0].index]
            rows = jnp.eye(node.size, dtype=node.dtype).reshape(node.size, *node.shape)
            zero = jnp.zeros((node.size,), node.dtype)
            result, aux = walk.specification({node.index: rows}, zero, sides)
            return Interval(*(end.reshape(node.shape) for end in result)), aux
        leaves = [
            walk.node_bounds(graph.nodes[o.index], sides)
            if isinstance(o, Perturbed)
            else Interval(o, o)
            for o in graph.outputs
        ]
        return jax.tree.unflatten(graph.output_tree, leaves)

    return bounds


class _Walk:
    """The bounds of one graph over one input set: intervals, pre-activation bounds, lines."""

    def __init__(
        self,
        graph: Graph,
        input_set: InputSet,
        policy_of: Callable[[str], Any],
        refine: bool,
        max_bytes: int,
    ) -> None:
        self.graph = graph
        self.input_set = input_set
        self.policy_of = policy_of
        self.max_bytes = max_bytes
        self.slopes: dict[str, Array] = {}
        self.lines: dict[int, Lines] = {}
        self.intervals = [input_set.interval()]
        self.references = [self.intervals[0].middle]
        relaxed = {i for n in graph.nodes if isinstance(n.op, (Scalar, Extremum)) for i in n.inputs}
        exact = _exact_intervals(graph, input_set) if refine else set()
        for node in graph.nodes[1:]:
            operands = tuple(self.intervals[i] for i in node.inputs)
            self.intervals.append(intervals_of.propagate(node, operands))
            backward.extend_references(self.references, node, self.intervals[-1])
            if refine and node.index in relaxed and node.index not in exact:
                self.intervals[node.index] = self.node_bounds(node, "both")

    def node_bounds(self, node: Node, sides: Sides) -> Interval:
        """Linear bounds on a node's value, intersected with its interval, in blocks of units."""
        lower, upper = self._in_blocks(node, sides)
        known = self.intervals[node.index]
        found = Interval(
            known.lower if lower is None else lower.reshape(node.shape),
            known.upper if upper is None else upper.reshape(node.shape),
        )
        return backward.intersect(known, found)

    def specification(
        self, starts: dict[int, Array], constant: Array, sides: Sides
    ) -> tuple[Interval, Auxiliary]:
        """Bounds of the specification whose coefficients start at the given nodes."""
        merged = intervals_of.merged(
            self.graph, self.input_set, self.intervals, self.references, starts, constant
        )
        walked = self._pull_back(starts, sides)
        lower, upper = walked.concretize(self.input_set)
        found = Interval(
            merged.lower if lower is None else lower + constant,
            merged.upper if upper is None else upper + constant,
        )
        side = walked.above if sides == "upper" else walked.below
        aux = Auxiliary(
            interval=merged,
            linear=found,
            pre_activations=intervals_of.pre_activations(self.graph, self.intervals),
            slopes=self.slopes,
            coefficients=walked.in_input(self.references[0]),
            # The gradient of a support function is where its maximum is attained.
            worst_input=jax.vmap(jax.grad(self.input_set.support))(-side.coefficients),
        )
        return backward.intersect(merged, found), aux

    def _in_blocks(self, node: Node, sides: Sides) -> tuple[Array | None, Array | None]:
        ancestors = _ancestors(self.graph, node)
        largest = max(self.graph.nodes[i].size for i in ancestors)
        row_bytes = _LIVE_ARRAYS * largest * jnp.dtype(node.dtype).itemsize
        blocks = max(1, math.ceil(node.size / max(1, self.max_bytes // max(1, row_bytes))))
        block = math.ceil(node.size / blocks)

        def block_bounds(indices: Array) -> tuple[Array | None, Array | None]:
            rows = jax.nn.one_hot(indices, node.size, dtype=node.dtype)
            rows = rows.reshape(indices.shape[0], *node.shape)
            return self._pull_back({node.index: rows}, sides).concretize(self.input_set)

        # Lines are made before the loop: inside it they would be tracers of its body.
        for index in sorted(ancestors):
            if isinstance(self.graph.nodes[index].op, (Scalar, Extremum)):
                self._lines(self.graph.nodes[index])
        if blocks == 1:
            return block_bounds(jnp.arange(node.size))
        indices = jnp.arange(blocks * block).reshape(blocks, block)
        ends = jax.lax.map(jax.checkpoint(block_bounds), indices)
        return jax.tree.map(lambda end: end.reshape(-1)[: node.size], ends)

    def _pull_back(self, starts: dict[int, Array], sides: Sides) -> backward.Result:
        return backward.pull_back(self.graph, self.references, starts, self._lines, sides)

    def _lines(self, node: Node) -> Lines:
        if node.index not in self.lines:
            self.lines[node.index] = self._make_lines(node)
        return self.lines[node.index]

    def _make_lines(self, node: Node) -> Lines:
        if self.policy_of(node.label) is slope_policies.CONSTANT:
            return intervals_of.constant_lines(node, self.intervals)
        operands = [_poisoned(self.intervals[i]) for i in node.inputs]
        if isinstance(node.op, Extremum):
            lower = node.op.windows(node, *(o.lower for o in operands))
            upper = node.op.windows(node, *(o.upper for o in operands))
            return extremum.window_lines(node.op, lower, upper, node.op.valid(node))
        (operand,) = operands

        def position(lower: Array, upper: Array) -> Array:
            # An op with two free lines (clip: above, then below) asks twice.
            key = f"{node.label}:below" if node.label in self.slopes else node.label
            chosen = self.slopes[key] = self.policy_of(key)(lower, upper)
            return chosen

        return node.op.lines(node, operand.lower, operand.upper, position)


def _poisoned(bounds: Interval) -> Interval:
    """Both ends NaN where either is: an unknown end must not pass for a stable unit's."""
    bad = jnp.isnan(bounds.lower) | jnp.isnan(bounds.upper)
    return Interval(jnp.where(bad, jnp.nan, bounds.lower), jnp.where(bad, jnp.nan, bounds.upper))


def _ancestors(graph: Graph, node: Node) -> set[int]:
    found, stack = set(), [node.index]
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            stack.extend(graph.nodes[index].inputs)
    return found


def _exact_intervals(graph: Graph, input_set: InputSet) -> set[int]:
    """Nodes whose interval bounds are already the exact range of every element.

    Over a box the elements of the input vary independently. Moving, scaling and shifting them, or
    applying a monotone function, keeps that; a linear map of independent values still has exact
    intervals, but its elements are no longer independent. There a linear walk could gain nothing.
    """
    independent: set[int] = {0} if input_set.is_box else set()
    exact = set(independent)
    for node in graph.nodes[1:]:
        if len(node.inputs) != 1:
            continue
        (source,) = node.inputs
        op = node.op
        keeps = (
            (isinstance(op, Structural) and op.moves)
            or (isinstance(op, Weighted) and op.diagonal)
            or (isinstance(op, Scalar) and op.monotone)
        ) and node.size <= graph.nodes[source].size
        if source in independent:
            exact.add(node.index)
            if keeps:
                independent.add(node.index)
        elif source in exact and keeps:
            exact.add(node.index)
    return exact

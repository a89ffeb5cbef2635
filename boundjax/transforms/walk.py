"""The bounds of one graph over one input set: intervals, pre-activation bounds, relaxations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax import windows
from boundjax.ir.families import Lines, Planes, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.sets.checks import concrete, first_index
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.slopes import Optimized
from boundjax.transforms import backward, blocks, optimize
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.backward import Sides
from boundjax.transforms.relaxations import Positions, Relaxations, RowEnds
from boundjax.windows import Rows, Windowed


class Companion(Protocol):
    """A walk beside the interval walk, which visits every node once, in order."""

    def advance(self, node: Node, walk: Walk) -> Interval:
        """The node's bounds, after those of its operands; `walk` has their relaxations."""
        ...


class Walk:
    """The bounds of one graph over one input set.

    Attributes:
      graph, input_set: the graph and the set.
      relaxations: those of the nonlinear nodes, with the intervals and references of all nodes.
      radii: index of an affine node -> half the width of its interval before any intersection.
      errors: what rounding may do to the values; None if bounds are not rounded.
      optimized: how positions are optimised, or None.
      max_rows, max_bytes: see `linear`.
      consumers: index of a node -> the nonlinear nodes that it feeds.
    """

    def __init__(
        self,
        graph: Graph,
        input_set: InputSet,
        policy_of: Callable[[str], Any],
        *,
        refine: bool = False,
        companion: Companion | None = None,
        optimized: Optimized | None = None,
        intersect: bool = True,
        known: Mapping[str, Interval] | None = None,
        max_rows: int | None = None,
        max_bytes: int = 2**30,
        rounding: Rounding = "nearest",
    ) -> None:
        self.graph = graph
        self.input_set = input_set
        self.optimized = optimized
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.errors = intervals_of.analysis_of(graph, rounding)
        self.consumers = _nonlinear_consumers(graph)
        # `spread` measures from the middle of the whole set, even if known bounds cut it.
        sweep = intervals_of.sweep_of(graph, input_set, self.errors, refine)
        self.relaxations = Relaxations(
            graph, sweep.intervals, sweep.references, policy_of, reused=refine, errors=self.errors
        )
        self.radii = sweep.radii
        self._bound(sweep, refine, companion, intersect, by_node(graph, "known", known or {}))

    def unrounded(self) -> Walk:
        """The same walk, whose bounds ignore rounding from here on: half of the work.

        They prove nothing, but an optimiser may maximise them.
        """
        twin = copy.copy(self)
        twin.errors, twin.relaxations = None, self.relaxations.unrounded()
        return twin

    @property
    def intervals(self) -> list[Interval]:
        """The intervals of all nodes so far, in order."""
        return self.relaxations.intervals

    @property
    def references(self) -> list[Array]:
        """The references of all nodes so far, in order, see `backward`."""
        return self.relaxations.references

    def _bound(
        self,
        sweep: intervals_of.Sweep,
        refine: bool,
        companion: Companion | None,
        intersect: bool,
        known: Mapping[int, Interval],
    ) -> None:
        """Bounds all nodes in order, by intervals and as the options say."""
        graph, consumers = self.graph, self.consumers
        sweep.replace(graph.nodes[0], self._with_known(0, self.intervals[0], known))
        if companion is not None:
            companion.advance(graph.nodes[0], self)
        # An op with a limited domain, or one that multiplies ends, needs the tightest intervals.
        needs_tightest = {
            i
            for n in graph.nodes
            if n.is_nonlinear and (not isinstance(n.op, Scalar) or n.op.partial)
            for i in n.inputs
        }
        not_intersected = set() if intersect else consumers.keys() - needs_tightest
        exact = intervals_of.exact_intervals(graph, self.input_set) if refine else set()
        for node in graph.nodes[1:]:
            sweep.advance(node)
            if not jnp.issubdtype(node.dtype, jnp.floating):
                continue
            sweep.replace(node, self._with_known(node.index, self.intervals[-1], known))
            if companion is not None:
                sweep.replace(node, companion.advance(node, self))
            elif refine and node.index in consumers and node.index not in exact:
                optimize_rows = self.optimized is not None and self.optimized.optimize_intermediate
                intersected = node.index not in not_intersected
                wanted = None
                if intersected:
                    wanted = self.relaxations.bent(consumers[node.index], node.index)
                bounds = self.node_bounds(node, "both", optimize_rows, intersected, wanted)
                sweep.replace(node, bounds)
            # Linear bounds may have replaced the known ones, see `intersect`.
            sweep.replace(node, self._with_known(node.index, self.intervals[-1], known))

    def _with_known(
        self, index: int, interval: Interval, known: Mapping[int, Interval]
    ) -> Interval:
        """An interval cut with known bounds; NaN under `jit` where they contradict each other.

        Raises:
          ValueError: for a contradiction, if the values are concrete.
        """
        if index not in known:
            return interval
        cut = interval.cut(known[index])
        values = concrete(~(cut.lower <= cut.upper))
        if values is not None and values.any():
            node = self.graph.nodes[index]
            where = first_index(values)
            ends = [np.asarray(end)[values].flat[0] for end in (*interval, *known[index])]
            raise ValueError(
                f"known bounds of '{node.label or node.primitive}' contradict its interval{where}: "
                f"got [{ends[2]}, {ends[3]}] for a value in [{ends[0]}, {ends[1]}]"
            )
        return cut.unless_empty()

    def node_bounds(
        self,
        node: Node,
        sides: Sides,
        optimize_rows: bool = False,
        intersect: bool = True,
        wanted: Array | None = None,
    ) -> Interval:
        """Linear bounds on a node's value, in blocks of units, intersected with its interval.

        Args:
          node: the node.
          sides: which bounds are wanted.
          optimize_rows: whether to optimise positions for every row.
          intersect: whether to intersect the bounds with the node's interval.
          wanted: the elements to bound, `[*shape]`; None for all.
        """
        interval = self.intervals[node.index]
        if not node.size:
            return interval
        lower, upper = self._in_blocks(node, sides, optimize_rows, wanted)
        bounds = Interval(
            interval.lower if lower is None else lower, interval.upper if upper is None else upper
        )
        return self.intersect(interval if intersect else bounds, bounds)

    def intersect(self, first: Interval, second: Interval) -> Interval:
        """The tighter of two valid bounds at each end, see `Interval.intersect`."""
        return first.intersect(second, crossing=self.errors is None)

    def merged(self, starts: Mapping[int, Array], constant: Array) -> Interval:
        """Interval bounds `[m]` of a specification, merged with the last affine layers."""
        return intervals_of.merged(
            self.graph,
            self.input_set,
            self.intervals,
            self.references,
            starts,
            constant,
            self.errors,
        )

    def pull_back(
        self,
        starts: Mapping[int, Rows],
        sides: Sides,
        positions: Positions | None = None,
        rows_by_label: dict[str, Array] | None = None,
        ends: RowEnds | None = None,
    ) -> backward.Result:
        """Linear bounds in the input.

        Args:
          starts: node index -> coefficients of the rows.
          sides: which bounds are wanted.
          positions: positions to use instead of the shared ones.
          rows_by_label: collects the rows on the output of every nonlinear op, see
            `linear.Auxiliary`.
          ends: for some nodes one interval per row, see `Relaxations`; the rows must be complete.
        """
        if ends and sides == "both":  # the walk will append the negated rows
            ends = jax.tree.map(lambda end: jnp.concatenate([end, end]), ends)

        def lines_of(node: Node, rows: Rows) -> Lines | Planes | backward.PerRow:
            if rows_by_label is not None:
                rows_by_label[node.label] = windows.dense(rows)
            return self.relaxations.lines_of(node, rows, positions, ends)

        return backward.pull_back(self.graph, self.references, starts, lines_of, sides, self.errors)

    def row_ends(self, labelled: Mapping[str, Interval], rows: int) -> RowEnds:
        """Intervals of pre-activations for each row, cut with the intervals that all rows share."""
        ends = by_node(self.graph, "within", labelled, rows)
        return {
            index: interval.cut(Interval(*(end[None] for end in self.intervals[index])))
            for index, interval in ends.items()
        }

    def worst_input(self, side: backward.Side) -> Array:
        """The points `[m, *input]` of the input set that attain the bounds of one side."""
        # The gradient of a support function is the point that attains the maximum.
        return jax.vmap(jax.grad(self.input_set.support))(-windows.dense(side.coefficients))

    def best(
        self,
        starts: Mapping[int, Rows],
        sides: Sides,
        per_row: bool,
        constant: Array | float = 0.0,
        ends: RowEnds | None = None,
    ) -> optimize.BestPositions:
        """The best positions for these rows with their bounds, without a gradient."""
        assert self.optimized is not None, "only a walk with options for it optimises positions"
        ancestors = self._relaxed_ancestors(starts)
        walk = self._detached()
        # Compute the shared relaxations now; inside the gradient they would be its tracers.
        walk._relaxed_ancestors(starts)
        starts, constant, ends = jax.lax.stop_gradient((starts, constant, ends))
        if per_row:
            start = walk._positions_per_row(starts, sides)
        else:
            keys = (key for i in ancestors for key in walk.relaxations.keys.get(i, ()))
            start = {key: walk.relaxations.slopes[key] for key in keys}

        def bound(positions: Positions) -> Array:
            walked = walk.pull_back(starts, sides, positions, ends=ends)
            lower, upper = walked.concretize(walk.input_set)
            signed = [s * (e + constant) for s, e in ((1, lower), (-1, upper)) if e is not None]
            return jnp.concatenate(signed)

        ascent = optimize.Ascent(bound, per_row, self.optimized)
        return jax.lax.stop_gradient(ascent.run(start))

    def _positions_per_row(self, starts: Mapping[int, Rows], sides: Sides) -> Positions:
        """The shared positions, repeated for every row: `[m, *shape]`, or `[m, *window]`."""
        positions: Positions = {}

        def repeat(node: Node, rows: Rows) -> Lines | Planes | backward.PerRow:
            for key in self.relaxations.keys.get(node.index, ()):
                cropped = windows.crop(rows, self.relaxations.slopes[key])
                count = len(windows.values_of(rows))
                positions[key] = jnp.broadcast_to(cropped, (count, *cropped.shape[1:]))
            return self.relaxations.lines_of(node, rows, None)

        backward.pull_back(self.graph, self.references, starts, repeat, sides)
        return positions

    def _detached(self) -> Walk:
        """A copy whose bounds are constants, so that no outer gradient flows through it."""
        twin = copy.copy(self)
        twin.relaxations = self.relaxations.detached()
        twin.graph = twin.relaxations.graph
        twin.input_set = jax.tree.map(jax.lax.stop_gradient, self.input_set)
        return twin

    def _relaxed_ancestors(self, starts: Iterable[int]) -> list[int]:
        """The nodes that rows starting there will meet; computes their shared relaxations."""
        ancestors = sorted(_ancestors(self.graph, starts))
        self.relaxations.make(ancestors)
        return ancestors

    def _in_blocks(
        self, node: Node, sides: Sides, optimize_rows: bool, wanted: Array | None
    ) -> blocks.Ends:
        """Lower and upper bounds `[*shape]`; elements that are not wanted keep their interval."""
        # Compute relaxations before the loop over blocks; inside it they would be its tracers.
        ancestors = self._relaxed_ancestors([node.index])

        def bounds(indices: Array) -> blocks.Ends:
            starts = {node.index: Windowed.of_units(indices, node.shape, node.dtype)}
            positions = self.best(starts, sides, True).parameters if optimize_rows else None
            return self.pull_back(starts, sides, positions).concretize(self.input_set)

        limit = blocks.size_of(
            self.graph,
            node,
            self.relaxations,
            ancestors if optimize_rows else [],
            complete_rows=not self.input_set.is_box,  # `spread` takes complete rows
            max_bytes=self.max_bytes,
        )
        return blocks.bounds_of(bounds, self.intervals[node.index], wanted, limit, self.max_rows)


def _ancestors(graph: Graph, starts: Iterable[int]) -> set[int]:
    """The nodes at `starts` and all nodes that they depend on."""
    ancestors, stack = set(), list(starts)
    while stack:
        index = stack.pop()
        if index not in ancestors:
            ancestors.add(index)
            stack.extend(graph.nodes[index].inputs)
    return ancestors


def _nonlinear_consumers(graph: Graph) -> dict[int, list[Node]]:
    consumers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.is_nonlinear:
            for index in node.inputs:
                consumers.setdefault(index, []).append(node)
    return consumers


def by_node(
    graph: Graph, name: str, labelled: Mapping[str, Interval], rows: int | None = None
) -> dict[int, Interval]:
    """Converts bounds by label, as in `pre_activations`, to bounds by the index of their node.

    Args:
      graph: the graph of the nodes.
      name: the argument's name, for messages.
      labelled: the bounds; several bounds of one node are intersected.
      rows: the length of the bounds' leading axis; None if they have none.

    Raises:
      KeyError: for a label of no op.
      ValueError: for another shape.
    """
    names = intervals_of.pre_activation_nodes(graph)
    bounds: dict[int, Interval] = {}
    for label, interval in labelled.items():
        if label not in names:
            raise KeyError(f"{name} has an entry {label!r} for no op; known: {', '.join(names)}")
        index = names[label]
        node = graph.nodes[index]
        shape = node.shape if rows is None else (rows, *node.shape)
        shapes = {jnp.shape(end) for end in interval}
        if shapes != {shape}:
            raise ValueError(f"{name}[{label!r}] must have shape {shape}, got {sorted(shapes)}")
        bounds[index] = interval.cut(bounds[index]) if index in bounds else interval
    return bounds

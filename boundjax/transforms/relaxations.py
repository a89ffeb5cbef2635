"""Lines and planes of nonlinear nodes, computed when a backward walk first meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import slopes as slope_policies
from boundjax.ir.families import Extremum, Joint, Lines, Loop, Planes, Position, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.numerics import materialized
from boundjax.ops import extremum
from boundjax.sets.interval import Interval
from boundjax.transforms import backward, inside, outward
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.errors import ErrorAnalysis
from boundjax.typing import PyTree
from boundjax.windows import Rows, Windowed

# Label of a free line -> its positions in `[0, 1]`.
Positions: TypeAlias = dict[str, Array]
# Index of a node -> an interval for each row, `[m, *shape]`.
RowEnds: TypeAlias = Mapping[int, Interval]


class Relaxations:
    """The relaxations of a graph's nonlinear nodes over the intervals of their operands.

    Attributes:
      graph: the graph.
      intervals, references: one per node, in order; the walk that bounds the nodes appends them.
      slopes: the positions of the shared relaxations, by label.
      keys: the labels of a node's positions, by the node's index.
    """

    def __init__(
        self,
        graph: Graph,
        intervals: list[Interval],
        references: list[Array],
        policy_of: Callable[[str], Any],
        *,
        reused: bool,
        errors: ErrorAnalysis | None,
    ) -> None:
        """Creates relaxations whose free lines a policy places.

        Args:
          graph: the graph whose nonlinear nodes are relaxed.
          intervals, references: of its nodes.
          policy_of: label -> slope policy.
          reused: whether many walks will meet the same lines, so that XLA should compute them once.
          errors: what rounding may do; moves the relaxations outward.
        """
        self.graph = graph
        self.intervals = intervals
        self.references = references
        self.errors = errors
        self.slopes: Positions = {}
        self.keys: dict[int, list[str]] = {}
        self._policy_of = policy_of
        self._reused = reused
        self._relaxations: dict[int, Lines | Planes] = {}
        # The relaxations of `_relaxations`, around the references and moved outward.
        self._shared: dict[int, Lines | Planes] = {}

    def detached(self) -> Relaxations:
        """A copy whose bounds are constants, so that no outer gradient flows through it."""
        intervals, references, slopes = jax.lax.stop_gradient(
            (self.intervals, self.references, self.slopes)
        )
        twin = Relaxations(
            self.graph.detached(),
            intervals,
            references,
            self._policy_of,
            reused=self._reused,
            errors=self.errors,
        )
        twin.slopes = slopes
        twin.keys = dict(self.keys)
        return twin

    def unrounded(self) -> Relaxations:
        """A copy whose relaxations are not moved outward."""
        twin = Relaxations(
            self.graph,
            self.intervals,
            self.references,
            self._policy_of,
            reused=self._reused,
            errors=None,
        )
        twin.slopes, twin.keys = dict(self.slopes), dict(self.keys)
        twin._relaxations = dict(self._relaxations)
        return twin

    def kept(self, tree: PyTree) -> PyTree:
        """Materializes arrays that every later node will use if pre-activations are walked."""
        return materialized(tree) if self._reused else tree

    def make(self, indices: Iterable[int]) -> None:
        """Computes the shared relaxations of these nodes, outside a loop that would trace them."""
        for index in indices:
            node = self.graph.nodes[index]
            # No coefficient reaches a predicate.
            if node.is_nonlinear and jnp.issubdtype(node.dtype, jnp.floating):
                self.lines_of(node, None, None)

    def lines_of(
        self,
        node: Node,
        rows: Rows | None,
        positions: Positions | None,
        ends: RowEnds | None = None,
    ) -> Lines | Planes | backward.PerRow:
        """The relaxation that `backward.pull_back` asks for.

        Args:
          node: a nonlinear node.
          rows: the rows that meet it.
          positions: positions to use instead of the shared ones, of the node's shape or with a
            leading axis of one entry per row; None for the shared ones.
          ends: for some nodes one interval per row, instead of the interval that all rows share.
        """
        if rows is not None and inside.has_ball(node):
            return self._outward(node, self._inside(node, rows, positions, ends))
        sources, target = [self.references[i] for i in node.inputs], self.references[node.index]
        if ends and not ends.keys().isdisjoint(node.inputs):
            return self._outward(node, self._of_rows(node, positions, ends))
        keys = self.keys.get(node.index, ())
        node_positions = {} if positions is None else {key: positions[key] for key in keys}
        per_row = any(p.ndim > self.slopes[key].ndim for key, p in node_positions.items())
        if per_row and isinstance(rows, Windowed):
            assert isinstance(node.op, Scalar), "other ops take complete rows"
            (operand,) = (self.intervals[i].poisoned() for i in node.inputs)
            # Beyond the border the coefficients are 0, but the lines there must be finite.
            lower, upper = (rows.crop(end, "nearest") for end in operand)
            lines = node.op.lines(node, lower, upper, _replay(node_positions, node.label))
            lines = backward.around(node, lines, [rows.crop(s) for s in sources], rows.crop(target))
            if self.errors is not None:
                lines = outward.lines(self.errors, node, lines, rows.crop)
            return backward.PerRow(lines)
        if node_positions:
            return self._outward(node, self.relaxation(node, positions))
        if node.index not in self._shared:
            relaxation = self._outward(node, self.relaxation(node))
            if isinstance(relaxation, Lines):
                relaxation = Lines(*materialized(tuple(relaxation)))  # every row would repeat them
            self._shared[node.index] = relaxation
        return self._shared[node.index]

    def _inside(
        self, node: Node, rows: Rows, positions: Positions | None, ends: RowEnds | None
    ) -> Lines | Planes:
        """The relaxation of a node whose value lies in a ball, for these rows alone."""
        assert not isinstance(rows, Windowed), "a joint op takes complete rows"
        if ends and not ends.keys().isdisjoint(node.inputs):
            return self._of_rows(node, positions, ends)
        relaxation, image = self.relaxation(node, positions), self.intervals[node.index].poisoned()
        if isinstance(relaxation, Lines):
            return inside.lines(node, rows, relaxation)
        operands = [self.intervals[i].poisoned() for i in node.inputs]
        return inside.planes(node, rows, relaxation, self.references, operands, image)

    def _outward(self, node: Node, relaxation: Lines | Planes) -> Lines | Planes:
        """A relaxation as walks meet it; its arrays have a leading axis."""
        sources, target = [self.references[i] for i in node.inputs], self.references[node.index]
        if isinstance(relaxation, Planes):
            if self.errors is None:
                return relaxation
            return outward.planes(self.errors, node, relaxation, sources, target)
        lines = backward.around(node, relaxation, [s[None] for s in sources], target[None])
        return lines if self.errors is None else outward.lines(self.errors, node, lines)

    def relaxation(self, node: Node, positions: Positions | None = None) -> Lines | Planes:
        """A nonlinear node's lines or planes; arrays have a leading axis, 1 or one per row."""
        if self._is_constant(node):
            return intervals_of.constant_lines(node, self.intervals)
        if positions is None:
            if node.index not in self._relaxations:
                recorder = _Recorder(self._policy_of, node.label)
                relaxation = _with_axis(self._relaxed(node, recorder, {}))
                self._relaxations[node.index] = self._kept_relaxation(relaxation)
                self.keys[node.index] = list(recorder.positions)
                self.slopes.update(recorder.positions)
            return self._relaxations[node.index]
        node_positions = {key: positions[key] for key in self.keys[node.index]}
        if not any(p.ndim > self.slopes[key].ndim for key, p in node_positions.items()):
            return _with_axis(self._relaxed(node, _replay(node_positions, node.label), {}))
        return self._of_rows(node, node_positions, {})

    def _is_constant(self, node: Node) -> bool:
        """Whether the node's interval is its relaxation."""
        return self._policy_of(node.label) is slope_policies.CONSTANT or isinstance(node.op, Loop)

    def _of_rows(self, node: Node, positions: Positions | None, ends: RowEnds) -> Lines | Planes:
        """A separate relaxation for each row, at the row's positions and over the row's intervals.

        Without positions the policy places the free lines for each row's interval.
        """
        if self._is_constant(node):
            return intervals_of.constant_lines(node, self.intervals)
        traced: list[Lines | Planes] = []

        def one(row_positions: Positions | None, row_ends: RowEnds) -> tuple[Any, ...]:
            if row_positions is None:
                position = _Recorder(self._policy_of, node.label)
            else:
                position = _replay(row_positions, node.label)
            relaxation = self._relaxed(node, position, row_ends)
            traced.append(relaxation)
            return relaxation[1:] if isinstance(relaxation, Planes) else tuple(relaxation)

        row_ends = {i: ends[i] for i in node.inputs if i in ends}
        row_positions, axes = None, None
        if positions is not None:
            keys = self.keys[node.index]
            row_positions = {key: positions[key] for key in keys}
            axes = {k: 0 if positions[k].ndim > self.slopes[k].ndim else None for k in keys}
        arrays = jax.vmap(one, in_axes=(axes, 0))(row_positions, row_ends)
        (relaxation,) = traced
        if isinstance(relaxation, Lines):
            return Lines(*arrays)
        lower_weights, lower_offset, upper_weights, upper_offset = arrays
        if relaxation.lower_weights is relaxation.upper_weights:
            upper_weights = lower_weights
        return Planes(relaxation.product, lower_weights, lower_offset, upper_weights, upper_offset)

    def bent(self, consumers: Iterable[Node], index: int) -> Array | None:
        """The elements whose bounds affect the relaxations of their consumers; None for all.

        If the two lines of a piecewise linear function coincide, it is one straight piece on the
        whole interval (a stable ReLU), and a tighter interval would give the same lines.
        """
        bent = None
        for consumer in consumers:
            if not (isinstance(consumer.op, Scalar) and consumer.op.pieces):
                return None
            lines = consumer.op.lines(consumer, *self.intervals[index], _at_zero)
            lower_slope, lower_intercept, upper_slope, upper_intercept = (
                jnp.zeros((), consumer.dtype) if end is None else end for end in lines
            )
            differ = ~((lower_slope == upper_slope) & (lower_intercept == upper_intercept))
            bent = differ if bent is None else bent | differ
        return bent

    def _kept_relaxation(self, relaxation: Lines | Planes) -> Lines | Planes:
        if isinstance(relaxation, Lines):
            return relaxation  # walks use the lines around references, see `lines_of`
        product, lower_weights, lower_offset, upper_weights, upper_offset = relaxation
        parallel = lower_weights is upper_weights
        lower_weights, lower_offset, upper_weights, upper_offset = self.kept(
            (lower_weights, lower_offset, None if parallel else upper_weights, upper_offset)
        )
        if parallel:
            upper_weights = lower_weights
        return Planes(product, lower_weights, lower_offset, upper_weights, upper_offset)

    def _relaxed(self, node: Node, position: Position, ends: RowEnds) -> Lines | Planes:
        operands = [ends.get(i, self.intervals[i]).poisoned() for i in node.inputs]
        match node.op:
            case Extremum():
                lower = node.op.windows(node, *(o.lower for o in operands))
                upper = node.op.windows(node, *(o.upper for o in operands))
                return extremum.window_lines(node.op, lower, upper, node.op.valid(node))
            case Joint():
                assert node.op.planes is not None, "only joint ops on predicates have no planes"
                return node.op.planes(node, *operands, position=position)
            case Scalar():
                (operand,) = operands
                return node.op.lines(node, operand.lower, operand.upper, position)
        raise AssertionError(f"no relaxation for {type(node.op).__name__}")


class _Recorder:
    """A `Position` that asks the slope policies and records their answers by label."""

    def __init__(self, policy_of: Callable[[str], Callable[..., Array]], label: str) -> None:
        self.policy_of = policy_of
        self.label = label
        self.positions: Positions = {}

    def __call__(self, lower: Array, upper: Array, default: Array | None = None) -> Array:
        # An op with two free lines (clip: above, then below) asks twice.
        key = f"{self.label}:below" if self.label in self.positions else self.label
        self.positions[key] = self.policy_of(key)(lower, upper, default)
        return self.positions[key]


def _replay(positions: Positions, label: str) -> _Recorder:
    return _Recorder(slope_policies.resolve(positions), label)


def _at_zero(lower: Array, upper: Array, default: Array | None = None) -> Array:
    """A `Position`: all free lines at 0."""
    return jnp.zeros_like(lower)


def _with_axis(relaxation: Lines | Planes) -> Lines | Planes:
    """Gives every array a leading axis of 1."""

    def lead(value: PyTree) -> PyTree:
        return jax.tree.map(lambda array: array[None], value)

    if isinstance(relaxation, Lines):
        return Lines(*(lead(value) for value in relaxation))
    product, lower_weights, lower_offset, upper_weights, upper_offset = relaxation
    lower = lead(lower_weights)
    upper = lower if upper_weights is lower_weights else lead(upper_weights)
    return Planes(product, lower, lead(lower_offset), upper, lead(upper_offset))

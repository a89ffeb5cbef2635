"""Lines and planes of nonlinear nodes, made when a backward walk first meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import slopes as slope_policies
from boundjax.ir.families import Extremum, Joint, Lines, Loop, Planes, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.numerics import materialized
from boundjax.ops import extremum
from boundjax.sets.interval import Interval
from boundjax.transforms import backward
from boundjax.transforms import interval as intervals_of
from boundjax.windows import Rows, Windowed

Positions = dict[str, Array]
# Index of a node -> an interval for each row, `[m, *shape]`.
RowEnds = Mapping[int, Interval]


class Relaxations:
    """The relaxations of a graph's nonlinear nodes over the intervals of their operands.

    Attributes:
      graph: whose nodes are relaxed.
      intervals, references: per node, in order; whoever bounds the nodes appends to them.
      slopes: the positions that the shared relaxations use, by label.
      keys: the labels of a node's positions, by the node's index.
    """

    def __init__(self, graph: Graph, policy_of: Callable[[str], Any], *, reused: bool) -> None:
        """Relaxations whose free lines a policy places.

        Args:
          graph: whose nodes are relaxed.
          policy_of: the slope policy of a label.
          reused: whether many walks will meet the same lines, which are then computed once.
        """
        self.graph = graph
        self.intervals: list[Interval] = []
        self.references: list[Array] = []
        self.slopes: Positions = {}
        self.keys: dict[int, list[str]] = {}
        self._policy_of = policy_of
        self._reused = reused
        self._made: dict[int, Lines | Planes] = {}
        self._lines: dict[int, Lines] = {}

    def detached(self) -> Relaxations:
        """The same bounds as constants for differentiation: an outer gradient sees none of it."""
        twin = Relaxations(self.graph.detached(), self._policy_of, reused=self._reused)
        twin.intervals, twin.references, twin.slopes = jax.lax.stop_gradient(
            (self.intervals, self.references, self.slopes)
        )
        twin.keys = dict(self.keys)
        return twin

    def kept(self, tree: Any) -> Any:
        """Arrays that are used once more for every later node, if pre-activations are walked."""
        return materialized(tree) if self._reused else tree

    def make(self, indices: Iterable[int]) -> None:
        """Makes the shared relaxations of these nodes: inside a loop they would be its tracers."""
        for index in indices:
            node = self.graph.nodes[index]
            # No coefficient ever reaches a predicate.
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
          positions: other positions than the shared ones, of the node's shape or with a leading
            axis with one for each row; None for the shared ones.
          ends: for some nodes an interval for each row, in place of the one that all rows share.
        """
        if ends and not ends.keys().isdisjoint(node.inputs):
            made = self._of_rows(node, positions, ends)
            if isinstance(made, Planes):
                return made
            sources = [self.references[i][None] for i in node.inputs]
            return backward.around(node, made, sources, self.references[node.index][None])
        keys = self.keys.get(node.index, ())
        own = None if positions is None else {key: positions[key] for key in keys}
        per_row = own and any(own[key].ndim > self.slopes[key].ndim for key in keys)
        sources, target = [self.references[i] for i in node.inputs], self.references[node.index]
        if per_row and isinstance(rows, Windowed):
            (operand,) = (backward.poisoned(self.intervals[i]) for i in node.inputs)
            # Over the border the coefficients are 0; the lines there must be numbers.
            ends = (rows.crop(operand.lower, "nearest"), rows.crop(operand.upper, "nearest"))
            lines = node.op.lines(node, *ends, _replay(own, node.label))
            sources = [rows.crop(source) for source in sources]
            return backward.PerRow(backward.around(node, lines, sources, rows.crop(target)))
        if not own and node.index in self._lines:
            return self._lines[node.index]
        made = self.relaxation(node, positions)
        if not isinstance(made, Planes):
            made = backward.around(node, made, [s[None] for s in sources], target[None])
            if not own:
                made = self._lines[node.index] = Lines(*self.kept(tuple(made)))
        return made

    def is_shared(self, node: Node, made: Any) -> bool:
        """Whether `lines_of` gave the relaxation that all rows share, the same object each time."""
        return made is self._lines.get(node.index) or made is self._made.get(node.index)

    def relaxation(self, node: Node, positions: Positions | None = None) -> Lines | Planes:
        """A nonlinear node's lines or planes; arrays have a leading axis, 1 or one per row."""
        if self._policy_of(node.label) is slope_policies.CONSTANT or isinstance(node.op, Loop):
            return intervals_of.constant_lines(node, self.intervals)
        if positions is None:
            if node.index not in self._made:
                record = _Recorder(self._policy_of, node.label)
                made = self._relaxed(node, record, {})
                self._made[node.index] = self._kept_relaxation(_with_axis(made))
                self.keys[node.index] = list(record.used)
                self.slopes.update(record.used)
            return self._made[node.index]
        own = {key: positions[key] for key in self.keys[node.index]}
        if not any(value.ndim > self.slopes[key].ndim for key, value in own.items()):
            return _with_axis(self._relaxed(node, _replay(own, node.label), {}))
        return self._of_rows(node, own, {})

    def _of_rows(self, node: Node, positions: Positions | None, ends: RowEnds) -> Lines | Planes:
        """A relaxation for each row, of its own positions and over its own ends.

        Without positions the policy places the free lines for each row's ends.
        """
        if self._policy_of(node.label) is slope_policies.CONSTANT or isinstance(node.op, Loop):
            return intervals_of.constant_lines(node, self.intervals)
        product, parallel = None, False

        def one(placed: Positions | None, clamped: RowEnds) -> tuple[Array | None, ...]:
            nonlocal product, parallel
            if placed is None:
                position = _Recorder(self._policy_of, node.label)
            else:
                position = _replay(placed, node.label)
            made = self._relaxed(node, position, clamped)
            if isinstance(made, Planes):
                product, parallel = made.product, made.lower_weights is made.upper_weights
                return made[1:]
            return tuple(made)

        clamped = {i: ends[i] for i in node.inputs if i in ends}
        placed, axes = None, None
        if positions is not None:
            placed = {key: positions[key] for key in self.keys[node.index]}
            axes = {k: 0 if v.ndim > self.slopes[k].ndim else None for k, v in placed.items()}
        arrays = jax.vmap(one, in_axes=(axes, 0))(placed, clamped)
        if product is None:
            return Lines(*arrays)
        if parallel:
            arrays = (arrays[0], arrays[1], arrays[0], arrays[3])
        return Planes(product, *arrays)

    def bent(self, consumers: Iterable[Node], index: int) -> Array | None:
        """Which elements' bounds the relaxations of consumers depend on; None for all.

        Where the two lines of a piecewise linear function coincide it is one straight piece on the
        whole interval (a stable relu), and a tighter interval would give the same lines.
        """
        bent = None
        for consumer in consumers:
            if not (isinstance(consumer.op, Scalar) and consumer.op.pieces):
                return None
            lines = consumer.op.lines(
                consumer, *self.intervals[index], lambda lower, *_: jnp.zeros_like(lower)
            )
            below, above = (
                [jnp.zeros(()) if end is None else end for end in ends]
                for ends in (lines[:2], lines[2:])
            )
            here = ~((below[0] == above[0]) & (below[1] == above[1]))
            bent = here if bent is None else bent | here
        return bent

    def _kept_relaxation(self, made: Lines | Planes) -> Lines | Planes:
        if isinstance(made, Lines):
            return made  # what is used again are lines around references, see `lines_of`
        parallel = made.lower_weights is made.upper_weights
        upper = None if parallel else made.upper_weights
        below, lower, upper, above = self.kept(
            (made.lower_weights, made.lower_offset, upper, made.upper_offset)
        )
        return Planes(made.product, below, lower, below if parallel else upper, above)

    def _relaxed(self, node: Node, position: Callable[..., Array], ends: RowEnds) -> Lines | Planes:
        operands = [backward.poisoned(ends.get(i, self.intervals[i])) for i in node.inputs]
        match node.op:
            case Extremum():
                lower = node.op.windows(node, *(o.lower for o in operands))
                upper = node.op.windows(node, *(o.upper for o in operands))
                return extremum.window_lines(node.op, lower, upper, node.op.valid(node))
            case Joint():
                return node.op.planes(node, *operands, position=position)
            case Scalar():
                (operand,) = operands
                return node.op.lines(node, operand.lower, operand.upper, position)
        raise AssertionError(f"no relaxation for {type(node.op).__name__}")


class _Recorder:
    """Answers an op's questions for positions, and keeps the answers by label."""

    def __init__(self, policy_of: Callable[[str], Callable[..., Array]], label: str) -> None:
        self.policy_of = policy_of
        self.label = label
        self.used: Positions = {}

    def __call__(self, lower: Array, upper: Array, default: Array | None = None) -> Array:
        # An op with two free lines (clip: above, then below) asks twice.
        key = f"{self.label}:below" if self.label in self.used else self.label
        self.used[key] = self.policy_of(key)(lower, upper, default)
        return self.used[key]


def _replay(positions: Positions, label: str) -> _Recorder:
    return _Recorder(slope_policies.resolve(positions), label)


def _with_axis(made: Lines | Planes) -> Lines | Planes:
    """A leading axis of 1 for every array."""

    def lead(value: Any) -> Any:
        return jax.tree.map(lambda array: array[None], value)

    if isinstance(made, Lines):
        return Lines(*(lead(value) for value in made))
    lower = lead(made.lower_weights)
    upper = lower if made.upper_weights is made.lower_weights else lead(made.upper_weights)
    return Planes(made.product, lower, lead(made.lower_offset), upper, lead(made.upper_offset))

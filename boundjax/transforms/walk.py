"""The bounds of one graph over one input set: intervals, pre-activation bounds, relaxations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from chex import Array

from boundjax import slopes as slope_policies
from boundjax import windows
from boundjax.ir.families import Extremum, Joint, Lines, Loop, Planes, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.numerics import materialized
from boundjax.ops import extremum
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.slopes import Optimized
from boundjax.transforms import backward, optimize
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.backward import Sides
from boundjax.transforms.balls import FirstLayers
from boundjax.transforms.optimize import Positions
from boundjax.windows import Rows, Windowed

# Arrays of a block's rows that are alive at once in the backward walk: both sides of coefficients
# before and after an op, and what their product with the lines needs.
_LIVE_ARRAYS = 6
# Arrays per free line of a row that is optimised: it, its gradient, the best, two moments.
_LIVE_POSITIONS = 6
# On CPU: larger blocks leave the caches, which costs twice the time.
_CACHED_BYTES = 2**26
# Units of a block where blocks without a unit that matters are skipped: neither so few that matrix
# products become inefficient, nor so many that little is skipped.
_SMALLEST_BLOCK = 256
_MOST_SKIPPED = 64


class Companion(Protocol):
    """A walk beside the interval walk, which sees every node once, in order."""

    def advance(self, node: Node, walk: Walk) -> Interval:
        """The node's bounds; its operands have been seen, ``walk`` has their relaxations."""


class Walk:
    """The bounds of one graph over one input set.

    Attributes:
      graph, input_set: what is bounded.
      intervals, references: per node, see ``backward``.
      slopes: the positions that the shared relaxations use, by label.
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
        max_rows: int | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        self.graph = graph
        self.input_set = input_set
        self.policy_of = policy_of
        self.optimized = optimized
        self.refine = refine
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.slopes: Positions = {}
        self.keys: dict[int, list[str]] = {}
        self.relaxations: dict[int, Lines | Planes] = {}
        self.lines: dict[int, Lines] = {}
        self.intervals = [input_set.interval()]
        self.references = [self.intervals[0].middle]
        if companion is not None:
            companion.advance(graph.nodes[0], self)
        self.consumers = _nonlinear_consumers(graph)
        # An op with a domain, or with ends that it multiplies, needs the best interval there is.
        demanding = {
            i
            for n in graph.nodes
            if n.is_nonlinear and (not isinstance(n.op, Scalar) or n.op.partial)
            for i in n.inputs
        }
        apart = set() if intersect else self.consumers.keys() - demanding
        exact = intervals_of.exact_intervals(graph, input_set) if refine else set()
        first = FirstLayers(input_set)
        # Nodes whose reference is the middle of their interval: its image is the next reference and
        # the next interval's center. Computed once it is differentiated once, too.
        centered = {0}
        for node in graph.nodes[1:]:
            operands = tuple(self.intervals[i] for i in node.inputs)
            linear, center = node.is_linear, None
            if linear:
                backward.extend_references(self.references, node, None)
                if centered.issuperset(node.inputs):
                    center = self.references[-1]
            found = first.cut(node, intervals_of.propagate(node, operands, center))
            self.intervals.append(found if linear else self.kept(found))
            if not linear:
                backward.extend_references(self.references, node, self.intervals[-1])
            if not jnp.issubdtype(node.dtype, jnp.floating):
                continue
            if not linear or (center is not None and input_set.is_box):
                centered.add(node.index)
            if companion is not None:
                found = companion.advance(node, self)
                self.intervals[-1] = found
                centered.discard(node.index)
            elif refine and node.index in self.consumers and node.index not in exact:
                optimize_rows = optimized is not None and optimized.optimize_intermediate
                together = node.index not in apart
                wanted = self._bent(node) if together else None
                self.intervals[-1] = self.node_bounds(node, "both", optimize_rows, together, wanted)
                centered.discard(node.index)

    def node_bounds(
        self,
        node: Node,
        sides: Sides,
        optimize_rows: bool = False,
        intersect: bool = True,
        wanted: Array | None = None,
    ) -> Interval:
        """Linear bounds on a node's value, in blocks of units, intersected with its interval.

        Only for the elements that are ``wanted``, ``[*shape]``, if not for all.
        """
        known = self.intervals[node.index]
        if not node.size:
            return known
        lower, upper = self._in_blocks(node, sides, optimize_rows, wanted)
        found = Interval(
            known.lower if lower is None else lower, known.upper if upper is None else upper
        )
        return backward.intersect(known if intersect else found, found)

    def _bent(self, node: Node) -> Array | None:
        """Which elements' bounds the next relaxations depend on, ``[*shape]``; None for all.

        Where the two lines of a piecewise linear function coincide it is one straight piece on the
        whole interval (a stable relu), and a tighter interval would give the same lines.
        """
        bent = None
        for consumer in self.consumers[node.index]:
            if not (isinstance(consumer.op, Scalar) and consumer.op.pieces):
                return None
            lines = consumer.op.lines(
                consumer, *self.intervals[node.index], lambda lower, *_: jnp.zeros_like(lower)
            )
            below, above = (
                [jnp.zeros(()) if end is None else end for end in ends]
                for ends in (lines[:2], lines[2:])
            )
            here = ~((below[0] == above[0]) & (below[1] == above[1]))
            bent = here if bent is None else bent | here
        return bent

    def merged(self, starts: dict[int, Array], constant: Array) -> Interval:
        """Interval bounds ``[m]`` of a specification, merged with the last affine layers."""
        return intervals_of.merged(
            self.graph, self.input_set, self.intervals, self.references, starts, constant
        )

    def pull_back(
        self,
        starts: dict[int, Array],
        sides: Sides,
        positions: Positions | None = None,
        met: dict[str, Array] | None = None,
    ) -> backward.Result:
        """Linear bounds in the input; with other positions than the shared ones where given.

        ``met`` takes up the rows on the output of every nonlinear op, see ``linear.Auxiliary``.
        """

        def lines_of(node: Node, rows: Rows) -> Lines | Planes | backward.PerRow:
            if met is not None:
                met[node.label] = windows.dense(rows)
            return self.lines_of(node, rows, positions)

        return backward.pull_back(self.graph, self.references, starts, lines_of, sides)

    def worst_input(self, side: backward.Side) -> Array:
        """Where in the input set the bounds of one side are attained, ``[m, *input]``."""
        # The gradient of a support function is where its maximum is attained.
        return jax.vmap(jax.grad(self.input_set.support))(-side.coefficients)

    def best(
        self, starts: dict[int, Array], sides: Sides, per_row: bool, constant: Array | float = 0.0
    ) -> optimize.Found:
        """The best positions for these rows, and the bounds that were seen; no gradient flows."""
        ancestors = self._relaxed_ancestors(starts)
        walk = self._detached()
        walk._relaxed_ancestors(starts)  # what the gradient's trace makes would be its tracers
        starts, constant = jax.lax.stop_gradient((starts, constant))
        if per_row:
            start = walk._positions_per_row(starts, sides)
        else:
            start = {key: walk.slopes[key] for i in ancestors for key in walk.keys.get(i, ())}

        def bound(positions: Positions) -> Array:
            ends = walk.pull_back(starts, sides, positions).concretize(walk.input_set)
            signed = [
                s * (e + constant) for s, e in zip((1, -1), ends, strict=True) if e is not None
            ]
            return jnp.concatenate(signed)

        found = optimize.best_positions(bound, start, per_row, self.optimized)
        return jax.lax.stop_gradient(found)

    def _positions_per_row(self, starts: dict[int, Rows], sides: Sides) -> Positions:
        """The shared positions for every row, ``[m, *shape]``, or of its windows only."""
        found: Positions = {}

        def note(node: Node, rows: Rows) -> Lines | Planes:
            for key in self.keys.get(node.index, ()):
                cropped = windows.crop(rows, self.slopes[key])
                count = len(windows.values_of(rows))
                found[key] = jnp.broadcast_to(cropped, (count, *cropped.shape[1:]))
            return self.lines_of(node, rows, None)

        backward.pull_back(self.graph, self.references, starts, note, sides)
        return found

    def _detached(self) -> Walk:
        """The same bounds as constants for differentiation: an outer gradient sees none of it."""
        twin = object.__new__(Walk)
        twin.__dict__.update(self.__dict__)
        twin.graph = self.graph.detached()
        for name in ("input_set", "intervals", "references", "slopes"):
            setattr(twin, name, jax.tree.map(jax.lax.stop_gradient, getattr(self, name)))
        twin.relaxations, twin.lines = {}, {}
        return twin

    def _relaxed_ancestors(self, starts: Iterable[int]) -> list[int]:
        """The nodes that rows starting there will meet, with their shared relaxations made."""
        ancestors = sorted(_ancestors(self.graph, starts))
        for index in ancestors:
            node = self.graph.nodes[index]
            # No coefficient ever reaches a predicate.
            if node.is_nonlinear and jnp.issubdtype(node.dtype, jnp.floating):
                self.lines_of(node, None, None)
        return ancestors

    def _in_blocks(
        self, node: Node, sides: Sides, optimize_rows: bool, wanted: Array | None
    ) -> tuple[Array | None, Array | None]:
        """Lower and upper bounds ``[*shape]``; what is not wanted keeps its interval."""
        # Relaxations are made before the loop: inside it they would be tracers of its body.
        ancestors = self._relaxed_ancestors([node.index])

        def block_bounds(indices: Array) -> tuple[Array | None, Array | None]:
            starts = {node.index: Windowed.of_units(indices, node.shape, node.dtype)}
            positions = self.best(starts, sides, True).positions if optimize_rows else None
            return self.pull_back(starts, sides, positions).concretize(self.input_set)

        limit = self._block_size(node, ancestors if optimize_rows else [])
        chosen = None  # all units, in order
        if self.max_rows is not None and self.max_rows < node.size:
            chosen = self._widest(node, wanted, self.max_rows)
        elif wanted is not None and node.size > limit:
            limit = min(limit, max(_SMALLEST_BLOCK, math.ceil(node.size / _MOST_SKIPPED)))
            (chosen,) = jnp.nonzero(wanted.reshape(-1), size=node.size, fill_value=node.size)
        indices = jnp.arange(node.size) if chosen is None else chosen
        ends = _mapped(block_bounds, indices, limit, node.size)
        known = self.intervals[node.index]

        def placed(end: Array, old: Array) -> Array:
            if chosen is not None:
                return old.reshape(-1).at[chosen].set(end, mode="drop").reshape(node.shape)
            end = end.reshape(node.shape)
            return end if wanted is None else jnp.where(wanted, end, old)

        return tuple(
            None if end is None else placed(end, old) for end, old in zip(ends, known, strict=True)
        )

    def _block_size(self, node: Node, optimized: Iterable[int]) -> int:
        """How many units of a node are walked at once."""
        frames = backward.frames_of(self.graph, node.index)
        largest = max(windows.elements(frame) for frame in frames.values())
        if not self.input_set.is_box:  # its spread takes complete rows
            largest = max(largest, self.graph.nodes[0].size)
        row = _LIVE_ARRAYS * largest
        for i in optimized:
            for key in self.keys.get(i, ()):
                windowed = isinstance(self.graph.nodes[i].op, Scalar)
                frame = frames[self.graph.nodes[i].inputs[0]]
                size = windows.elements(frame) if windowed else self.slopes[key].size
                row += _LIVE_POSITIONS * size
        budget = self.max_bytes
        if jax.default_backend() == "cpu":
            budget = min(budget, _CACHED_BYTES)
        return max(1, budget // max(1, row * jnp.dtype(node.dtype).itemsize))

    def _widest(self, node: Node, wanted: Array | None, count: int) -> Array:
        """The wanted units of the widest intervals, ``[count]``; ``node.size`` if too few."""
        width = self.intervals[node.index].width
        known = ~jnp.isnan(width)
        wanted = known if wanted is None else wanted & known
        width = jnp.where(wanted, width, -1.0).reshape(-1)
        found, indices = jax.lax.top_k(jax.lax.stop_gradient(width), count)
        return jnp.where(found >= 0, indices, node.size)

    def kept(self, tree: Any) -> Any:
        """Arrays that are used once more for every later node, if pre-activations are walked."""
        return materialized(tree) if self.refine else tree

    def _kept_relaxation(self, made: Lines | Planes) -> Lines | Planes:
        if isinstance(made, Lines):
            return made  # what is used again are lines around references, see `lines_of`
        parallel = made.lower_weights is made.upper_weights
        upper = None if parallel else made.upper_weights
        below, lower, upper, above = self.kept(
            (made.lower_weights, made.lower_offset, upper, made.upper_offset)
        )
        return Planes(made.product, below, lower, below if parallel else upper, above)

    def lines_of(
        self, node: Node, rows: Rows | None, positions: Positions | None
    ) -> Lines | Planes | backward.PerRow:
        """What ``backward.pull_back`` asks for."""
        keys = self.keys.get(node.index, ())
        given = None if positions is None else {key: positions[key] for key in keys}
        per_row = given and any(given[key].ndim > self.slopes[key].ndim for key in keys)
        sources, target = [self.references[i] for i in node.inputs], self.references[node.index]
        if per_row and isinstance(rows, Windowed):
            (operand,) = (backward.poisoned(self.intervals[i]) for i in node.inputs)
            # Over the border the coefficients are 0; the lines there must be numbers.
            ends = (rows.crop(operand.lower, "nearest"), rows.crop(operand.upper, "nearest"))
            lines = node.op.lines(node, *ends, _replay(given, node.label))
            sources = [rows.crop(source) for source in sources]
            return backward.PerRow(backward.around(node, lines, sources, rows.crop(target)))
        if not given and node.index in self.lines:
            return self.lines[node.index]
        made = self.relaxation(node, positions)
        if not isinstance(made, Planes):
            made = backward.around(node, made, [s[None] for s in sources], target[None])
            if not given:
                made = self.lines[node.index] = Lines(*self.kept(tuple(made)))
        return made

    def relaxation(self, node: Node, positions: Positions | None = None) -> Lines | Planes:
        """A nonlinear node's lines or planes; arrays have a leading axis, 1 or one per row."""
        if self.policy_of(node.label) is slope_policies.CONSTANT or isinstance(node.op, Loop):
            return intervals_of.constant_lines(node, self.intervals)
        if positions is None:
            if node.index not in self.relaxations:
                record = _Recorder(self.policy_of, node.label)
                made = self._relaxation(node, record)
                self.relaxations[node.index] = self._kept_relaxation(_with_axis(made))
                self.keys[node.index] = list(record.used)
                self.slopes.update(record.used)
            return self.relaxations[node.index]
        given = {key: positions[key] for key in self.keys[node.index]}
        per_row = any(value.ndim > self.slopes[key].ndim for key, value in given.items())
        if not per_row:
            return _with_axis(self._relaxation(node, _replay(given, node.label)))
        product, parallel = None, False

        def one(row: Positions) -> tuple[Array | None, ...]:
            nonlocal product, parallel
            made = self._relaxation(node, _replay(row, node.label))
            if isinstance(made, Planes):
                product, parallel = made.product, made.lower_weights is made.upper_weights
                return made[1:]
            return tuple(made)

        arrays = jax.vmap(one)(given)
        if product is None:
            return Lines(*arrays)
        if parallel:
            arrays = (arrays[0], arrays[1], arrays[0], arrays[3])
        return Planes(product, *arrays)

    def _relaxation(self, node: Node, position: Callable[..., Array]) -> Lines | Planes:
        operands = [backward.poisoned(self.intervals[i]) for i in node.inputs]
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


def _ancestors(graph: Graph, starts: Iterable[int]) -> set[int]:
    found, stack = set(), list(starts)
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            stack.extend(graph.nodes[index].inputs)
    return found


def _mapped(
    bounds: Callable[[Array], tuple[Array | None, Array | None]],
    indices: Array,
    limit: int,
    end: int,
) -> tuple[Array | None, Array | None]:
    """Bounds of the units ``[k]``, in blocks of at most ``limit``; ``end`` stands for none.

    Blocks without a unit are skipped; under ``vmap`` they are computed.
    """
    count = len(indices)
    if count <= limit:
        return bounds(indices)
    blocks = math.ceil(count / limit)
    block = math.ceil(count / blocks)
    indices = jnp.pad(indices, (0, blocks * block - count), constant_values=end)
    shapes = jax.eval_shape(bounds, indices[:block])
    none = jax.tree.map(lambda found: jnp.zeros(found.shape, found.dtype), shapes)

    def if_any(indices: Array) -> tuple[Array | None, Array | None]:
        some = (indices < end).any()
        return jax.lax.cond(some, jax.checkpoint(bounds), lambda _: none, indices)

    found = jax.lax.map(if_any, indices.reshape(blocks, block))
    return jax.tree.map(lambda array: array.reshape(-1)[:count], found)


def _nonlinear_consumers(graph: Graph) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.is_nonlinear:
            for index in node.inputs:
                found.setdefault(index, []).append(node)
    return found

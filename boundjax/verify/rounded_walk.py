"""Lower bounds reduced by everything that float32 rounding may have added.

The error analysis of `rounding` runs beside the backward walk of `boundjax.transforms`. The
intervals that the walk starts from hold the values of every computed network. The lines and planes
of nonlinear ops are moved outward by what is charged there; the rest is subtracted where rows begin
and covered by a slightly larger box where they end. So intermediate bounds are as sound as the last
ones, and every error is weighed by the actual coefficients of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import slopes as slope_policies
from boundjax import windows
from boundjax.ir.families import Extremum, Lines, Planes
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.numerics import materialized
from boundjax.ops import matmul
from boundjax.sets.box import Box
from boundjax.sets.interval import Interval
from boundjax.slopes import Optimized
from boundjax.tracing.trace import trace
from boundjax.transforms import backward
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.relaxations import Positions, Relaxations, RowEnds
from boundjax.transforms.walk import Walk
from boundjax.typing import PyTree
from boundjax.verify import rounding
from boundjax.verify.rounding import MORE, UNDERFLOW, UNIT, gamma
from boundjax.windows import Rows, Windowed


class RoundedBounds(NamedTuple):
    """Bounds of `R` rows over a box.

    Attributes:
      lower: `[R]`, never above the value of a row at a point of the box, in any arithmetic (see
        `rounding`); infinite or NaN if there is no bound.
      coefficients: `[R, *input]`, of the linear functions in the input.
      largest: of the output's shape, the largest magnitude of each output on the box.
    """

    lower: Array
    coefficients: Array
    largest: Array


def lower_bounds(
    function: Callable[[Array], Array],
    *,
    slopes: slope_policies.Slopes | Optimized = "adaptive",
    intermediate: str = "interval",
    max_bytes: int = 2**30,
) -> Callable[[Box, Array], RoundedBounds]:
    """Turns a function of one example into rounded lower bounds of rows over a box.

    Args:
      function: a JAX function of one float32 array with one output array.
      slopes, intermediate, max_bytes: as `boundjax.linear` takes them; `intermediate` is
        `"interval"` or `"linear"`.

    Returns:
      `bounds(box, rows)` for rows `[R, *out]`, which are taken as exact.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for a function with several outputs.
    """
    optimized = slopes if isinstance(slopes, Optimized) else None
    policy_of = slope_policies.resolve(slopes.start if isinstance(slopes, Optimized) else slopes)

    def bounds(box: Box, rows: Array) -> RoundedBounds:
        graph = trace(function, box.lower)
        walk = _RoundedWalk(
            graph,
            _larger_box(box),
            policy_of,
            refine=intermediate == "linear",
            optimized=optimized,
            max_bytes=max_bytes,
        )
        starts, constant = intervals_of.starts_of(graph, rows)
        positions = None
        if optimized is not None:
            positions = walk.best(starts, "lower", optimized.per_spec, constant).parameters
        walked = walk.pull_back(starts, "lower", positions)
        lower, _ = walked.concretize(walk.input_set)
        assert walked.below is not None, "the lower side was asked for"
        assert lower is not None, "the lower side was asked for"
        if slopes != "constant":
            lower = jnp.maximum(lower, walk.interval_bounds(starts))  # NaN stays NaN
        error, largest = walk.at_outputs(rows)
        lower = lower + constant - error
        lower = lower - (4.0 * UNIT * jnp.abs(lower) + UNDERFLOW)
        return RoundedBounds(lower, windows.dense(walked.below.coefficients), largest)

    return bounds


def _larger_box(box: Box) -> Box:
    """Moves the box outward by what rounding may do to its middle, its radius and their sums."""
    radius = 0.5 * (box.upper - box.lower)
    size = jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))
    by = gamma(box.lower.size + 8) * radius + 8.0 * UNIT * size + UNDERFLOW
    by = jnp.where(box.lower == box.upper, 0.0, by * MORE)  # a fixed input is its own middle
    return Box(box.lower - by, box.upper + by)


class _Companion:
    """Makes the intervals of a walk hold computed values, and refines them."""

    def __init__(self, graph: Graph, box: Box, refine: bool) -> None:
        self.analysis = rounding.ErrorAnalysis(graph)
        self._refine = refine
        # Intervals that no walk could tighten.
        self._exact = intervals_of.exact_intervals(graph, box) if refine else set()

    def advance(self, node: Node, walk: Walk) -> Interval:
        index = node.index
        interval = self.analysis.note(node, walk.intervals[index], walk.references[index])
        if not node.is_linear and node.inputs:
            interval = materialized(interval) if self._refine else interval
            # Use the new interval's middle, so that the next layer's reference is its center, too.
            walk.references.pop()
            backward.extend_references(walk.references, node, interval)
            self.analysis.tighten(node, interval, walk.references[index])
        walk.intervals[index] = interval
        if node.inputs and self._refine and index in walk.consumers and index not in self._exact:
            optimized = walk.optimized is not None and walk.optimized.optimize_intermediate
            wanted = walk.relaxations.bent(walk.consumers[index], index)
            interval = walk.node_bounds(node, "both", optimized, wanted=wanted)
            interval = rounding.outward(interval, self.analysis.of_rows(index, 1))
            self.analysis.tighten(node, interval, walk.references[index])
        return interval


class _RoundedRelaxations(Relaxations):
    """The relaxations of `boundjax.transforms`, moved outward to hold for computed networks."""

    def __init__(
        self, graph: Graph, policy_of: Callable[[str], Any], analysis: rounding.ErrorAnalysis
    ) -> None:
        super().__init__(graph, policy_of, reused=False)  # materialized below, after moving them
        self.analysis = analysis
        self._shared: dict[int, Lines | Planes | backward.PerRow] = {}

    def lines_of(
        self,
        node: Node,
        rows: Rows | None,
        positions: Positions | None,
        ends: RowEnds | None = None,
    ) -> Lines | Planes | backward.PerRow:
        """The lines of `Relaxations.lines_of`, moved outward."""
        made = super().lines_of(node, rows, positions, ends)
        if not self.is_shared(node, made):
            return self._moved_outward(node, made, rows)
        if node.index not in self._shared:
            self._shared[node.index] = self._moved_outward(node, made, rows)
        return self._shared[node.index]

    def constant_lines(self, node: Node) -> Lines:
        """Interval bounds as a relaxation, moved outward."""
        sources = [self.references[i][None] for i in node.inputs]
        constant = intervals_of.constant_lines(node, self.intervals)
        lines = backward.around(node, constant, sources, self.references[node.index][None])
        return self._lines_outward(node, lines, lambda array: array[None])

    def _moved_outward(
        self, node: Node, made: Lines | Planes | backward.PerRow, rows: Rows | None
    ) -> Lines | Planes | backward.PerRow:
        if isinstance(made, backward.PerRow):
            assert isinstance(rows, Windowed), "only rows in windows have lines each"
            return backward.PerRow(self._lines_outward(node, made.lines, rows.crop))
        if isinstance(made, Planes):
            return self._planes_outward(node, made)
        return Lines(*materialized(tuple(self._lines_outward(node, made, lambda a: a[None]))))

    def _lines_outward(self, node: Node, lines: Lines, layout: Callable[[Array], Array]) -> Lines:
        """Moves lines around references outward by all that is charged at a nonlinear node.

        Args:
          node: the node.
          lines: arrays with a leading axis.
          layout: gives an array of the node's or an operand's shape the layout of the lines.
        """
        analysis = self.analysis
        of_value, of_sum = layout(analysis.of_value(node)), analysis.of_sum(node)
        # Only scalar functions and extrema have slopes, both of numbers and not of predicates.
        of_slopes = [layout(a) for a in analysis.of_slopes(node) if a is not None]
        if isinstance(node.op, Extremum):
            of_slopes = [node.op.windows(node, *(a[0] for a in of_slopes))[None]]

        def loss(slope: Array | None, intercept: Array) -> Array:
            total = of_value + of_sum * _finite_size(intercept)
            if slope is not None:
                terms = _weighed(slope, of_slopes[0])
                total = total + (terms.sum(-1) if isinstance(node.op, Extremum) else terms)
            return total * MORE

        below, above = lines.lower_intercept, lines.upper_intercept
        assert below is not None, "`backward.around` makes every intercept an array"
        assert above is not None, "`backward.around` makes every intercept an array"
        return lines._replace(
            lower_intercept=below - loss(lines.lower_slope, below),
            upper_intercept=above + loss(lines.upper_slope, above),
        )

    def _planes_outward(self, node: Node, planes: Planes) -> Planes:
        """Moves planes outward by all that is charged at a joint node."""
        analysis = self.analysis
        floating = [i for i in node.inputs if i in analysis.errors]
        sizes = [analysis.errors[i].size for i in floating]
        of_slopes = [loss for loss in analysis.of_slopes(node) if loss is not None]
        references = [
            jnp.where(jnp.isinf(self.references[i]), 0.0, self.references[i]) for i in floating
        ]
        target = self.references[node.index]
        of_value, of_sum = analysis.of_value(node), analysis.of_sum(node)
        relative = gamma(rounding.terms_of_planes(node))

        def loss(weights: PyTree, offset: Array) -> Array:
            absolute = jax.tree.map(jnp.abs, weights)
            terms = planes.product(absolute, *sizes) + _finite_size(offset)
            constants = planes.product(weights, *references) - target
            constants = jnp.abs(constants) + _finite_size(offset)
            total = planes.product(absolute, *of_slopes) + relative * terms
            return (total + of_value + of_sum * constants) * MORE

        below = _per_row(loss, planes.lower_weights, planes.lower_offset)
        above = _per_row(loss, planes.upper_weights, planes.upper_offset)
        parallel = planes.upper_weights is planes.lower_weights
        lower_weights, lower_offset, upper_weights, upper_offset = materialized(
            (
                planes.lower_weights,
                planes.lower_offset - below,
                None if parallel else planes.upper_weights,
                planes.upper_offset + above,
            )
        )
        upper_weights = lower_weights if parallel else upper_weights
        return Planes(planes.product, lower_weights, lower_offset, upper_weights, upper_offset)


class _RoundedWalk(Walk):
    """A walk whose bounds hold for computed networks, up to what `at_outputs` says."""

    def __init__(self, graph: Graph, box: Box, policy_of: Callable[[str], Any], **options: Any):
        companion = _Companion(graph, box, options["refine"])
        self.analysis = companion.analysis
        self.rounded = _RoundedRelaxations(graph, policy_of, self.analysis)
        super().__init__(
            graph, box, policy_of, companion=companion, relaxations=self.rounded, **options
        )

    def interval_bounds(self, starts: Mapping[int, Array]) -> Array:
        """Lower bounds `[R]` by intervals, merged with the last affine layers."""
        walked = backward.pull_back(
            self.graph,
            self.references,
            starts,
            lambda node, rows: self.rounded.constant_lines(node),
            "lower",
        )
        lower, _ = walked.concretize(self.input_set)
        assert lower is not None, "the lower side was asked for"
        return lower

    def at_outputs(self, rows: Array) -> tuple[Array, Array]:
        """What rows `[R, *out]` lose where they begin, `[R]`, and the outputs' magnitudes."""
        (output,) = self.graph.outputs
        if isinstance(output, Perturbed):
            size = self.analysis.errors[output.index].size
            loss = self.analysis.of_rows(output.index, size.size)
        else:
            size = jnp.abs(output)
            loss = gamma(size.size + 4) * size
        rows = jnp.abs(rows.reshape(len(rows), size.size))
        total = matmul.rows_matmul(rows, loss.reshape(-1, 1))[:, 0]
        return total * (MORE + 2.0 * gamma(size.size)), size


def _finite_size(intercept: Array) -> Array:
    """The magnitude of an intercept; 0 if it is infinite, since moving it changes nothing."""
    return jnp.where(jnp.isinf(intercept), 0.0, jnp.abs(intercept))


def _weighed(slope: Array, loss: Array) -> Array:
    """`|slope| loss`; a slope of 0 gives 0 even if the loss is infinite."""
    return jnp.where(slope == 0, 0.0, jnp.abs(slope) * loss)


def _per_row(function: Callable[..., Array], *arguments: PyTree) -> Array:
    """Maps a function over the leading axes of arrays, whose length is 1 or the number of rows."""
    leaves, tree = jax.tree.flatten(arguments)
    axes = [0 if len(leaf) > 1 else None for leaf in leaves]
    leaves = [leaf if len(leaf) > 1 else leaf[0] for leaf in leaves]
    if all(axis is None for axis in axes):
        return function(*jax.tree.unflatten(tree, leaves))[None]
    in_axes = tuple(jax.tree.unflatten(tree, axes))
    return jax.vmap(function, in_axes=in_axes)(*jax.tree.unflatten(tree, leaves))

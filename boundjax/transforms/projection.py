"""Random-projection estimates of the bounds of Wong & Kolter 2018 (CAP), for training.

Every nonlinear op is written as `y = s x + c + e u` with one slope per unit, `|u| <= 1` and a
radius `e >= 0`. The network is then linear in the input and in all `u`, and a unit's range is

    value +- (||r * row of the input||_1 + sum over relaxed ops ||e_i * row_i||_1).

A row has as many elements as its source (the input or a relaxed op), and there is one row per unit.
Instead, draw independent standard Cauchy numbers `R [k, n]`. For a row `v` the `k` numbers `R v`
are Cauchy with scale `||v||_1`, which is the median of their absolute values, and pushing `k` rows
`R * e` forward through the linearised network gives `R v` for every unit at once. Over an l2 ball
the input's part is `||v||_2`, which Gaussian rows estimate as `||R v||_2 / sqrt(k)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Never, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax import slopes as slope_policies
from boundjax.ir.node import Node, Perturbed
from boundjax.sets.ball import LpBall
from boundjax.sets.input_set import InputSet, InputTree
from boundjax.sets.interval import Interval
from boundjax.transforms import interval as intervals_of
from boundjax.transforms import problem as problems
from boundjax.transforms.forward import apply_planes, concretized, linear_part, planes_of
from boundjax.transforms.signatures import ArrayFunction, BoundsFunction, TreeFunction
from boundjax.transforms.walk import Walk

EstimateSides: TypeAlias = Literal["both", "lower"]


class Estimate(NamedTuple):
    """Estimates of bounds for training; they bound nothing.

    They come from medians of random numbers, each of which is too small with a probability of about
    one half. The fields are not named `lower` and `upper`, so that an estimate cannot be mistaken
    for an `Interval`.
    """

    lower_estimate: Float[Array, "*shape"]
    upper_estimate: Float[Array, "*shape"]


class EstimateAuxiliary(NamedTuple):
    """Intermediate results that `estimate(..., has_aux=True)` returns, see `linear.Auxiliary`.

    `pre_activations` are estimates, too, and bound nothing.
    """

    pre_activations: dict[str, Interval]
    rows: dict[str, Float[Array, "rows ..."]]
    worst_input: Float[Array, " m *input"]


@dataclasses.dataclass(frozen=True)
class ProjectedValue:
    """The middle of a value's range, and the projected rows that widen it.

    Attributes:
      value: the middle, `[*shape]`.
      rows: the rows of all sources one after another, `[K, *shape]`.
      sources: the nodes that the rows come from, in the same order.
    """

    value: Array
    rows: Array
    sources: tuple[int, ...]


class Projection:
    """The walk of projected norms beside the interval walk, a `walk.Companion`.

    Its intervals are estimates, which are not intersected with any others.

    Attributes:
      key: seeds the random numbers; every source derives a separate key.
      projections: the largest number of random rows of a source; a source with no more elements
        than that is exact.
    """

    def __init__(self, key: Array, projections: int) -> None:
        self.key = key
        self.projections = projections
        self._values: dict[int, ProjectedValue] = {}
        self._sizes: dict[int, int] = {}
        self._euclidean = False
        self._concretized: frozenset[int] = frozenset()

    def advance(self, node: Node, walk: Walk) -> Interval:
        """The next node's estimated range, or the walk's interval if nothing uses the range."""
        interval = walk.intervals[node.index]
        if not node.inputs:
            self._concretized = concretized(walk.graph)
            value, radius, self._euclidean = _middle(walk.input_set)
            rows = self._source_rows(node, radius)
            self._values[node.index] = ProjectedValue(value, rows, (node.index,))
            return interval
        floating = [i for i in node.inputs if i in self._values]
        operands = [self._values[i] for i in floating]
        if node.is_linear:
            rows, sources = self._aligned(operands)
            value = node.apply(*(operand.value for operand in operands))
            projected = ProjectedValue(value, linear_part(node, *rows), sources)
        else:
            intervals = [walk.intervals[i] for i in floating]
            projected = self._relaxed(node, walk, operands, intervals)
        self._values[node.index] = projected
        if node.index not in self._concretized:
            return interval
        radius = self._radius(projected)
        return Interval(projected.value - radius, projected.value + radius)

    def _count(self, source: int) -> int:
        return min(self._sizes[source], self.projections)

    def _source_rows(self, node: Node, radius: Array) -> Array:
        """The rows `[k, *shape]` of a new source: its elements, or random projections of them."""
        self._sizes[node.index] = node.size
        count = self._count(node.index)
        if count == node.size:
            rows = node.unit_rows()
        else:
            key = jax.random.fold_in(self.key, node.index)
            gaussian = self._euclidean and not node.inputs
            draw = jax.random.normal if gaussian else jax.random.cauchy
            rows = draw(key, (count, *node.shape), node.dtype)
        return rows * radius[None]

    def _aligned(self, operands: list[ProjectedValue]) -> tuple[list[Array], tuple[int, ...]]:
        """All operands' rows for one list of sources; 0 if a source does not reach an operand."""
        sources = tuple(sorted({s for operand in operands for s in operand.sources}))
        return [self._rows_of(operand, sources) for operand in operands], sources

    def _rows_of(self, operand: ProjectedValue, sources: tuple[int, ...]) -> Array:
        if operand.sources == sources:
            return operand.rows
        parts = self._split(operand)
        shape = operand.value.shape
        return jnp.concatenate(
            [
                parts[s] if s in parts else jnp.zeros((self._count(s), *shape), operand.rows.dtype)
                for s in sources
            ]
        )

    def _split(self, operand: ProjectedValue) -> dict[int, Array]:
        """The rows by source."""
        parts, start = {}, 0
        for source in operand.sources:
            stop = start + self._count(source)
            parts[source] = operand.rows[start:stop]
            start = stop
        return parts

    def _relaxed(
        self, node: Node, walk: Walk, operands: list[ProjectedValue], intervals: list[Interval]
    ) -> ProjectedValue:
        """Passes a nonlinear op by two parallel planes, whose distance is a new source."""
        planes = planes_of(node, walk.relaxations.relaxation(node))
        lower, upper = planes.lower_offset, planes.upper_offset
        weights = planes.lower_weights
        if planes.lower_weights is not planes.upper_weights:
            # Take the mean of the two weights; the offsets cover the rest over the operands' box.
            weights = jax.tree.map(
                lambda a, b: 0.5 * (a + b), planes.lower_weights, planes.upper_weights
            )
            half = jax.tree.map(
                lambda a, b: 0.5 * (b - a), planes.lower_weights, planes.upper_weights
            )
            middles = [interval.middle for interval in intervals]
            radii = [interval.radius for interval in intervals]
            tilt = apply_planes(planes, half, middles)
            reach = apply_planes(planes, jax.tree.map(jnp.abs, half), radii)
            lower, upper = lower - tilt - reach, upper + tilt + reach
        value = apply_planes(planes, weights, [operand.value for operand in operands])
        value = value + 0.5 * (lower + upper)
        new = self._source_rows(node, 0.5 * (upper - lower))
        if not operands:  # a selection of constants
            return ProjectedValue(value, new, (node.index,))
        rows, sources = self._aligned(operands)
        moved = apply_planes(planes, weights, rows, rows=True)
        return ProjectedValue(value, jnp.concatenate([moved, new]), (*sources, node.index))

    def _radius(self, projected: ProjectedValue) -> Array:
        """Half the width of the estimated range: the sum of the norms of all sources."""
        total = jnp.zeros_like(projected.value)
        for source, rows in self._split(projected).items():
            exact = self._count(source) == self._sizes[source]
            if self._euclidean and source == 0:
                total = total + euclidean_norm(rows) / (1.0 if exact else len(rows) ** 0.5)
            elif exact:
                total = total + jnp.sum(jnp.abs(rows), axis=0)
            else:
                total = total + median_magnitude(rows)
        return total


def _middle(input_set: InputSet) -> tuple[Array, Array, bool]:
    """Middle and radius of every element of an input set, and whether it is an l2 ball.

    Raises:
      ValueError: for a set that is neither a box nor an l2 ball.
    """
    if input_set.is_box:
        interval = input_set.interval()
        return interval.middle, interval.radius, False
    if isinstance(input_set, LpBall) and input_set.p == 2:
        # Leave the clip range out: no norm describes a clipped ball.
        ball = dataclasses.replace(input_set, clip=None).interval()
        return ball.middle, ball.radius, True
    raise ValueError(
        f"estimates need a box, p=inf or p=2, got {type(input_set).__name__}"
        f"(p={getattr(input_set, 'p', None)})"
    )


def median_magnitude(rows: Array) -> Array:
    """The median of `|rows_k|`, `[k, ...] -> [...]`; for an even `k` the lower of the middle two.

    NaN if any is NaN. The authors' code also takes the lower one. Nonnegative numbers have the same
    order as their bits, so counting determines the median's bits one after another; XLA's CPU
    backend is several times slower at sorting.
    """
    values = jnp.abs(rows)
    integer = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(values, integer)
    rank = (len(values) - 1) // 2
    one = jnp.ones((), integer)
    count = 8 * values.dtype.itemsize - 1

    def next_bit(k: Array, prefix: Array) -> Array:
        with_bit = prefix | (one << (count - 1 - k).astype(integer))
        below = jnp.sum(bits < with_bit[None], axis=0)
        return jnp.where(below <= rank, with_bit, prefix)

    median_bits = jax.lax.fori_loop(0, count, next_bit, jnp.zeros(values.shape[1:], integer))
    # Take the nearest rather than the equal element: XLA may recompute `values` with different
    # rounding.
    index = jnp.argmin(jnp.abs(bits - median_bits[None]), axis=0)
    median = jnp.take_along_axis(values, index[None], axis=0)[0]
    return jnp.where(jnp.isnan(values).any(axis=0), jnp.nan, median)


def euclidean_norm(rows: Array) -> Array:
    """`sqrt(sum_k rows_k^2)`, `[k, ...] -> [...]`; its gradient at 0 is 0."""
    square = jnp.sum(jnp.square(rows), axis=0)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


@overload
def estimate(
    function: ArrayFunction,
    key: Array,
    *,
    projections: int = 50,
    sides: EstimateSides = "both",
    has_aux: Literal[False] = False,
) -> BoundsFunction[Estimate, Estimate]: ...


@overload
def estimate(
    function: TreeFunction,
    key: Array,
    *,
    projections: int = 50,
    sides: EstimateSides = "both",
    has_aux: Literal[False] = False,
) -> BoundsFunction[Any, Estimate]: ...


@overload
def estimate(
    function: TreeFunction,
    key: Array,
    *,
    projections: int = 50,
    sides: EstimateSides = "both",
    has_aux: Literal[True],
) -> BoundsFunction[Never, tuple[Estimate, EstimateAuxiliary]]: ...


def estimate(
    function: TreeFunction,
    key: Array,
    *,
    projections: int = 50,
    sides: EstimateSides = "both",
    has_aux: bool = False,
) -> BoundsFunction[Any, Any]:
    """Turns a function of one example into a function from an input set to CAP's estimates.

    The estimates are for training and are no bounds: every norm with more terms than `projections`
    is the median of random numbers, too small with a probability of about one half. They estimate
    the bounds `linear(function, slopes="parallel", intermediate="linear", intersect=False)` before
    the final intersection with interval bounds, and equal them if the input and every relaxed op
    have at most `projections` units. Only the pre-activations are estimated; the specification
    itself takes an exact backward walk with parallel slopes, as in the authors' code.
    Pre-activations are not intersected with anything, so a function with a limited domain (`sqrt`
    after a `relu`) may see values outside it.

    Args:
      function: any JAX function of one array, or of one pytree of arrays. It may close over
        weights; the estimates are differentiable in them (which units are unstable is constant).
      key: a PRNG key; the same key gives the same estimates. Under `vmap` all examples share one
        set of projections, unless each has a key.
      projections: how many random rows replace a larger source; 50 in the paper. With 50, a norm's
        estimate has a standard deviation of 22 %.
      sides: `"lower"` costs half if there is a specification, and its upper estimates are then
        infinite.
      has_aux: also return `EstimateAuxiliary`; needs a specification.

    Returns:
      `estimates(input_set, specification=None)`: an `Estimate` per output leaf, or `[m]` on
      `<specification_k, f(x)>` for a specification `[m, *out]`. With `has_aux` a pair. The input
      set is a box (`inf` balls are boxes, clipped ones too) or an l2 ball, whose clip range only
      the last walk uses.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for less than one projection, other sides, another input set, `has_aux` without
        a specification, or a specification that does not fit the output.

    Source: Wong, Schmidt, Metzen & Kolter 2018, "Scaling provable adversarial defenses".
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    if sides not in ("both", "lower"):
        raise ValueError(f"sides must be 'both' or 'lower', got {sides!r}")
    policy_of = slope_policies.resolve("parallel")

    def estimates(input_set: InputTree, specification: Array | None = None) -> Any:
        graph, input_set, inputs = problems.traced(function, input_set, "nearest")
        walk = Walk(graph, input_set, policy_of, companion=Projection(key, projections))
        if specification is not None:
            starts, constant = problems.starts_of(graph, specification)
            result, aux = _specified(walk, starts, constant, sides)
            aux = aux._replace(worst_input=inputs.points(aux.worst_input))
            return (result, aux) if has_aux else result
        if has_aux:
            raise ValueError("has_aux needs a specification, e.g. margin_specification(label, C)")
        return jax.tree.unflatten(graph.output_tree, [_output(walk, o) for o in graph.outputs])

    return estimates


def _specified(
    walk: Walk, starts: Mapping[int, Array], constant: Array, sides: EstimateSides = "both"
) -> tuple[Estimate, EstimateAuxiliary]:
    """The exact backward walk of a specification, from the estimated pre-activations."""
    rows: dict[str, Array] = {}
    walked = walk.pull_back(starts, sides, None, rows)
    lower, upper = walked.concretize(walk.input_set)
    assert lower is not None, "the lower side is always asked for"
    assert walked.below is not None, "the lower side is always asked for"
    if upper is None:
        upper = jnp.full_like(lower, jnp.inf)
    # Lines that are not parallel cross outside their interval, which may be too narrow here.
    crossed = lower > upper
    result = Estimate(
        jnp.where(crossed, upper, lower) + constant, jnp.where(crossed, lower, upper) + constant
    )
    return result, EstimateAuxiliary(
        pre_activations=intervals_of.pre_activations(walk.graph, walk.intervals),
        rows=rows,
        worst_input=walk.worst_input(walked.below),
    )


def _output(walk: Walk, output: Perturbed | Array) -> Estimate:
    """The estimate of one output leaf."""
    if not isinstance(output, Perturbed):
        return Estimate(output, output)
    node = walk.graph.nodes[output.index]
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return Estimate(*walk.intervals[node.index])  # a predicate: true, false, or either
    zero = jnp.zeros((node.size,), node.dtype)
    result, _ = _specified(walk, {node.index: node.unit_rows()}, zero)
    return Estimate(*(end.reshape(node.shape) for end in result))

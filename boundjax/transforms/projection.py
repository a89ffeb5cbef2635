"""Random-projection estimates of the bounds of Wong & Kolter 2018 (CAP), for training.

Every nonlinear op is written as `y = s x + c + e u` with one slope per unit, `|u| <= 1` and a
radius `e >= 0`. Then the network is linear in the input and in all `u`, and a unit's range is

    value +- (||r * row of the input||_1 + sum over relaxed ops ||e_i * row_i||_1).

A row is as long as its source is large, and there are as many of them as units. But for a row `v`
and independent standard Cauchy numbers `R [k, n]` the `k` numbers `R v` are Cauchy with scale
`||v||_1`, the median of their absolute values; and pushing `k` rows `R * e` forward through
the linearised network gives `R v` for every unit at once. Over an l2 ball the input's part is
`||v||_2`, estimated by Gaussian rows as `||R v||_2 / sqrt(k)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import slopes as slope_policies
from boundjax.ir.node import Node, Perturbed
from boundjax.sets.ball import LpBall
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.tracing.trace import trace
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.forward import apply_planes, concretized, linear_part, planes_of
from boundjax.transforms.walk import Walk


class Estimate(NamedTuple):
    """Estimates of bounds, which bound nothing: for training only.

    They rest on medians of random numbers, each of which is too small with a probability of about
    one half. The fields are not called `lower` and `upper` so that nothing takes them for an
    `Interval`.
    """

    lower_estimate: Array
    upper_estimate: Array


class EstimateAuxiliary(NamedTuple):
    """What `estimate(..., has_aux=True)` met on the way; the fields are `linear`'s.

    `pre_activations` are estimates too, and bound nothing.
    """

    pre_activations: dict[str, Interval]
    rows: dict[str, Array]
    worst_input: Array


@dataclasses.dataclass(frozen=True)
class Disturbed:
    """`value` in the middle, and what moves it.

    Attributes:
      value: `[*shape]`.
      rows: `[K, *shape]`, the counts of all sources added up.
      sources: the nodes that the rows come from, in order.
    """

    value: Array
    rows: Array
    sources: tuple[int, ...]


class Projection:
    """The walk of projected norms beside the interval walk, a `walk.Companion`.

    Its intervals are estimates: they are intersected with nothing.

    Attributes:
      key: for the random numbers; every source draws its own.
      projections: how many random rows a source has, at most; a source of no more elements than
        that is exact.
    """

    def __init__(self, key: Array, projections: int) -> None:
        self.key = key
        self.projections = projections
        self.values: dict[int, Disturbed] = {}
        self.sizes: dict[int, int] = {}
        self.euclidean = False
        self.wanted: frozenset[int] = frozenset()

    def advance(self, node: Node, walk: Walk) -> Interval:
        """The next node's estimated range; that of the interval walk where nothing needs it."""
        known = walk.intervals[node.index]
        if not node.inputs:
            self.wanted = concretized(walk.graph)
            value, radius, self.euclidean = _middle(walk.input_set)
            rows = self._rows(node, radius)
            self.values[node.index] = Disturbed(value, rows, (node.index,))
            return known
        floating = [i for i in node.inputs if i in self.values]
        operands = [self.values[i] for i in floating]
        if node.is_linear:
            rows, sources = self._aligned(operands)
            value = node.apply(*(operand.value for operand in operands))
            self.values[node.index] = Disturbed(value, linear_part(node, *rows), sources)
        else:
            intervals = [walk.intervals[i] for i in floating]
            self.values[node.index] = self._relaxed(node, walk, operands, intervals)
        if node.index not in self.wanted:
            return known
        found = self.values[node.index]
        radius = self._radius(found)
        return Interval(found.value - radius, found.value + radius)

    def _count(self, source: int) -> int:
        return min(self.sizes[source], self.projections)

    def _rows(self, node: Node, radius: Array) -> Array:
        """`[k, *shape]`: a new source's elements, or random rows of them."""
        self.sizes[node.index] = node.size
        count = self._count(node.index)
        if count == node.size:
            rows = node.unit_rows()
        else:
            key = jax.random.fold_in(self.key, node.index)
            gaussian = self.euclidean and not node.inputs
            draw = jax.random.normal if gaussian else jax.random.cauchy
            rows = draw(key, (count, *node.shape), node.dtype)
        return rows * radius[None]

    def _aligned(self, operands: list[Disturbed]) -> tuple[list[Array], tuple[int, ...]]:
        """The operands' rows in one order of sources; 0 where a source does not reach one."""
        sources = tuple(sorted({s for operand in operands for s in operand.sources}))
        return [self._spaced(operand, sources) for operand in operands], sources

    def _spaced(self, operand: Disturbed, sources: tuple[int, ...]) -> Array:
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

    def _split(self, operand: Disturbed) -> dict[int, Array]:
        parts, start = {}, 0
        for source in operand.sources:
            stop = start + self._count(source)
            parts[source] = operand.rows[start:stop]
            start = stop
        return parts

    def _relaxed(
        self, node: Node, walk: Walk, operands: list[Disturbed], intervals: list[Interval]
    ) -> Disturbed:
        """Through a nonlinear op by two parallel planes; their distance is a new source."""
        planes = planes_of(node, walk.relaxations.relaxation(node))
        lower, upper = planes.lower_offset, planes.upper_offset
        weights = planes.lower_weights
        if planes.lower_weights is not planes.upper_weights:
            # The mean of the two weights, and what is left of either over the operands' box.
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
        new = self._rows(node, 0.5 * (upper - lower))
        if not operands:  # a selection of constants
            return Disturbed(value, new, (node.index,))
        rows, sources = self._aligned(operands)
        moved = apply_planes(planes, weights, rows, rows=True)
        return Disturbed(value, jnp.concatenate([moved, new]), (*sources, node.index))

    def _radius(self, found: Disturbed) -> Array:
        """Half of the estimated range: the norms of all sources, added up."""
        total = jnp.zeros_like(found.value)
        for source, rows in self._split(found).items():
            exact = self._count(source) == self.sizes[source]
            if self.euclidean and source == 0:
                total = total + euclidean_norm(rows) / (1.0 if exact else len(rows) ** 0.5)
            elif exact:
                total = total + jnp.sum(jnp.abs(rows), axis=0)
            else:
                total = total + median_magnitude(rows)
        return total


def _middle(input_set: InputSet) -> tuple[Array, Array, bool]:
    """Middle and radius per element of an input set, and whether they are those of an l2 ball.

    Raises:
      ValueError: for a set that is neither a box nor an l2 ball.
    """
    if input_set.is_box:
        interval = input_set.interval()
        return interval.middle, interval.radius, False
    if isinstance(input_set, LpBall) and input_set.p == 2:
        # Without the clip range, over which there is no norm.
        ball = dataclasses.replace(input_set, clip=None).interval()
        return ball.middle, ball.radius, True
    raise ValueError(
        f"estimates need a box, p=inf or p=2, got {type(input_set).__name__}"
        f"(p={getattr(input_set, 'p', None)})"
    )


def median_magnitude(rows: Array) -> Array:
    """The median of `|rows_k|`, `[k, ...] -> [...]`; the lower of two for an even `k`.

    NaN if any is NaN. The choice of the two is that of the authors' code. The bits of numbers
    that are not negative are ordered as they are, so the median's are found one after the
    other by counting; XLA's CPU backend is several times slower at sorting.
    """
    values = jnp.abs(rows)
    integer = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(values, integer)
    rank = (len(values) - 1) // 2
    one = jnp.ones((), integer)
    count = 8 * values.dtype.itemsize - 1

    def next_bit(k: Array, found: Array) -> Array:
        with_bit = found | (one << (count - 1 - k).astype(integer))
        below = jnp.sum(bits < with_bit[None], axis=0)
        return jnp.where(below <= rank, with_bit, found)

    median = jax.lax.fori_loop(0, count, next_bit, jnp.zeros(values.shape[1:], integer))
    # Not the equal one: XLA may compute a value twice, with different rounding.
    index = jnp.argmin(jnp.abs(bits - median[None]), axis=0)
    found = jnp.take_along_axis(values, index[None], axis=0)[0]
    return jnp.where(jnp.isnan(values).any(axis=0), jnp.nan, found)


def euclidean_norm(rows: Array) -> Array:
    """`sqrt(sum_k rows_k^2)`, `[k, ...] -> [...]`; its gradient at 0 is 0."""
    square = jnp.sum(jnp.square(rows), axis=0)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def estimate(
    function: Callable[[Array], Any],
    key: Array,
    *,
    projections: int = 50,
    sides: str = "both",
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Turns a function of one example into one from an input set to CAP's estimates, for training.

    Not bounds: every norm with more terms than `projections` is the median of random numbers,
    too small with a probability of about one half. The bounds that they estimate are
    `linear(function, slopes="parallel", intermediate="linear", intersect=False)`, before the
    intersection with interval bounds at the end; with no more than `projections` units in the
    input and every relaxed op they are these. Only the pre-activations are estimated: the
    specification itself takes an exact backward walk with parallel slopes, as in the authors' code.
    Pre-activations are intersected with nothing, so a function with a limited domain (`sqrt`
    after a `relu`) may meet values outside of it.

    Args:
      function: any JAX function of one array; it may close over weights, with respect to which the
        estimates are differentiable (which units are unstable is constant).
      key: a PRNG key; the same key gives the same estimates. Under `vmap` all examples share one
        set of projections, or have their own with a key each.
      projections: how many random rows replace a larger source; 50 in the paper. At 50 a norm's
        estimate has a standard deviation of 22 %.
      sides: `"lower"` costs half where there is a specification; its upper estimates are
        infinite.
      has_aux: also return `EstimateAuxiliary`; needs a specification.

    Returns:
      `estimates(input_set, specification=None)`: an `Estimate` per output leaf, or `[m]` on
      `<specification_k, f(x)>` for a specification `[m, *out]`. The input set is a box (`inf`
      balls are, clipped ones too) or an l2 ball, whose clip range only the last walk uses.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for less than one projection, other sides, another input set, `has_aux` without
        a specification, or one that does not fit the output.

    Source: Wong, Schmidt, Metzen & Kolter 2018, "Scaling provable adversarial defenses".
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    if sides not in ("both", "lower"):
        raise ValueError(f"sides must be 'both' or 'lower', got {sides!r}")
    policy_of = slope_policies.resolve("parallel")

    def estimates(input_set: InputSet, specification: Array | None = None) -> Any:
        graph = trace(function, intervals_of.example_of(input_set))
        walk = Walk(graph, input_set, policy_of, companion=Projection(key, projections))
        if specification is not None:
            found = _specified(walk, *intervals_of.starts_of(graph, specification), sides)
            return found if has_aux else found[0]
        if has_aux:
            raise ValueError("has_aux needs a specification, e.g. margin_specification(label, C)")
        return jax.tree.unflatten(graph.output_tree, [_output(walk, o) for o in graph.outputs])

    return estimates


def _specified(
    walk: Walk, starts: dict[int, Array], constant: Array, sides: str = "both"
) -> tuple[Estimate, EstimateAuxiliary]:
    """The exact backward walk of a specification, given the estimated pre-activations."""
    rows: dict[str, Array] = {}
    walked = walk.pull_back(starts, sides, None, rows)
    lower, upper = walked.concretize(walk.input_set)
    if upper is None:
        upper = jnp.full_like(lower, jnp.inf)
    # Lines that are not parallel cross outside of their interval, which may be too narrow here.
    crossed = lower > upper
    found = Estimate(
        jnp.where(crossed, upper, lower) + constant, jnp.where(crossed, lower, upper) + constant
    )
    return found, EstimateAuxiliary(
        pre_activations=intervals_of.pre_activations(walk.graph, walk.intervals),
        rows=rows,
        worst_input=walk.worst_input(walked.below),
    )


def _output(walk: Walk, output: Perturbed | Array) -> Estimate:
    if not isinstance(output, Perturbed):
        return Estimate(output, output)
    node = walk.graph.nodes[output.index]
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return Estimate(*walk.intervals[node.index])  # a predicate: true, false, or either
    rows = node.unit_rows()
    found, _ = _specified(walk, {node.index: rows}, jnp.zeros((node.size,), node.dtype))
    return Estimate(*(end.reshape(node.shape) for end in found))

"""Lower bounds on many domains of a branch and bound in one walk: a domain is a row.

A *domain* is the part of the input set on which some operands `z` of piecewise linear ops lie on
one side of a kink `p` (`Scalar.kinks`), for a ReLU on one side of 0. All domains share the set, the
intervals and the references; each has its own row of the specification, its own clamped intervals
and positions of the free lines. A split `s (z - p) >= 0` with a multiplier `b >= 0` enters the
Lagrangian of the bound, which is one more start of the walk:

    f >= f - b s (z - p)    where the domain is, so a lower bound of the right side is one of f

(beta-CROWN, Wang et al. 2021, eq. 8). Computed networks are split at their own values of `z`, so
that with rounding (`errors`) a bound holds for each of them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int8

from boundjax.ir.families import Lines, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.sets.interval import Interval
from boundjax.transforms import problem as problems
from boundjax.transforms.relaxations import Positions
from boundjax.transforms.walk import Walk


class Kink(NamedTuple):
    """One kink of one op, with the units that it makes.

    Attributes:
      node: of the op.
      at: where the operand is split, a number or an array of its shape.
      start: the number of the first of its units, which are the elements of the operand.
    """

    node: Node
    at: Array | float
    start: int

    @property
    def operand(self) -> int:
        """The index of the node that is split."""
        return self.node.inputs[0]

    @property
    def units(self) -> slice:
        """The numbers of its units."""
        return slice(self.start, self.start + self.node.size)

    def points(self) -> Array:
        """Where every row is split, `[1, *shape]`."""
        return jnp.broadcast_to(jnp.asarray(self.at, self.node.dtype), self.node.shape)[None]

    def of(self, units: Array) -> Array:
        """The part `[N, *shape]` of an array `[N, U]` over all units that is about this kink."""
        return units[:, self.units].reshape(len(units), *self.node.shape)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The places where the domains of a graph may be split, the *units*.

    Attributes:
      kinks: in the order of the graph.
      size: `U`, the number of units.
    """

    kinks: tuple[Kink, ...]
    size: int

    @classmethod
    def of(cls, graph: Graph) -> Splits:
        """All kinks of all ops."""
        kinks: list[Kink] = []
        size = 0
        for node in graph.nodes:
            if isinstance(node.op, Scalar):
                for at in node.op.kinks(node):
                    kinks.append(Kink(node, at, size))
                    size += node.size
        return cls(tuple(kinks), size)

    def unstable(self, intervals: list[Interval]) -> Array:
        """Which units have a kink inside their operand's interval, bool `[U]`."""
        inside = [jnp.zeros(0, bool)]
        for kink in self.kinks:
            lower, upper = intervals[kink.operand]
            inside.append(((lower < kink.points()[0]) & (kink.points()[0] < upper)).reshape(-1))
        return jnp.concatenate(inside)


class Domains(NamedTuple):
    """`N` domains with the parameters of their bounds.

    Attributes:
      signs: `[N, U]`: 1 where the operand is at least the kink, -1 where it is at most the kink, 0
        where the domain is not split.
      positions: of the free lines by label, `[N, *shape]`, in `[0, 1]`.
      multipliers: `[N, U]`; negative ones count as 0, and so do those of units without a split.
    """

    signs: Int8[Array, "N U"]
    positions: Positions
    multipliers: Float[Array, "N U"]


class DomainBounds(NamedTuple):
    """Bounds on domains.

    Attributes:
      lower: `[N]`, of the rows on their domains; anything on an empty domain.
      empty: `[N]`, whether the splits contradict one another; other domains may be empty, too.
      worst_input: the points `[N, *input]` of the input set where the linear bounds are least.
      scores: `[N, U]`, how much of the bound the relaxation of a unit costs where the domain could
        still be split, else -1: the gap between a line and the function at the kink, weighted by
        the coefficient (the intercept score of BaBSR, Bunel et al. 2020).
      coefficients, bias: `[N, *input]` and `[N]`, of the linear functions of the input that bound
        the rows from below; `lower` is their least value on the set.
    """

    lower: Float[Array, " N"]
    empty: Bool[Array, " N"]
    worst_input: Float[Array, " N *input"]
    scores: Float[Array, "N U"]
    coefficients: Float[Array, " N *input"]
    bias: Float[Array, " N"]


def bound(
    walk: Walk, rows: Float[Array, " N *out"], domains: Domains, operand: int | None = None
) -> DomainBounds:
    """Bounds row `k` from below on domain `k`.

    Args:
      walk: over the input set; every relaxation that the rows meet is at its own positions.
      rows: `[N, *out]`.
      domains: `N` of them.
      operand: the index of the node of which the rows are functions; None for the output.

    Raises:
      ValueError: for rows that do not fit the output.
    """
    splits = Splits.of(walk.graph)
    if operand is None:
        starts, constant = problems.starts_of(walk.graph, rows)
    else:
        node = walk.graph.nodes[operand]
        starts = {operand: rows.reshape(-1, *node.shape)}
        constant = jnp.zeros(len(rows), node.dtype)
    signs = domains.signs.astype(constant.dtype)
    # A negative one would not bound anything. NaN stays NaN.
    multipliers = jnp.where(domains.multipliers < 0, 0.0, domains.multipliers)
    forces = -signs * multipliers
    size = jnp.zeros_like(constant)
    for kink in splits.kinks:
        coefficients = kink.of(forces)
        start = starts.get(kink.operand)
        starts[kink.operand] = coefficients if start is None else start + coefficients
        if isinstance(kink.at, float) and kink.at == 0.0:
            continue
        terms = (coefficients * kink.points()).reshape(len(coefficients), -1)
        constant = constant - jnp.sum(terms, axis=1)
        size = size + jnp.sum(jnp.abs(terms), axis=1)
    coefficients_of: dict[str, Array] = {}
    ends = _ends(walk, splits, domains.signs)
    empty = jnp.zeros(len(constant), bool)
    for lower, upper in ends.values():
        empty = empty | jnp.any((lower > upper).reshape(len(constant), -1), axis=1)
    result = walk.pull_back(starts, "lower", domains.positions, coefficients_of, ends)
    assert result.below is not None, "the lower side was asked for"
    lower = result.below.least(walk.input_set) + constant
    if walk.errors is not None:
        arithmetic = walk.errors.arithmetic
        by = arithmetic.gamma(splits.size + 4) * (size + jnp.abs(constant))
        by = by + 2.0 * splits.size * arithmetic.underflow  # products that are flushed to 0
        lower = walk.errors.outward(Interval(lower, lower), by).lower
    scores = [_scores(walk, kink, coefficients_of, domains.signs) for kink in splits.kinks]
    nothing = jnp.zeros((len(constant), 0), constant.dtype)
    coefficients, bias = result.below.in_input(walk.references[0])
    return DomainBounds(
        lower,
        empty,
        walk.worst_input(result.below),
        jnp.concatenate([nothing, *scores], axis=1),
        coefficients,
        bias + constant,
    )


def _ends(walk: Walk, splits: Splits, signs: Array) -> dict[int, Interval]:
    """The intervals `[N, *shape]` of split operands on each domain, by index."""
    ends: dict[int, Interval] = {}
    for kink in splits.kinks:
        sign = kink.of(signs)
        shared = Interval(*(end[None] for end in walk.intervals[kink.operand]))
        lower, upper = ends.get(kink.operand, shared)
        ends[kink.operand] = Interval(
            jnp.where(sign > 0, jnp.maximum(lower, kink.points()), lower),
            jnp.where(sign < 0, jnp.minimum(upper, kink.points()), upper),
        )
    return ends


def _scores(walk: Walk, kink: Kink, coefficients_of: dict[str, Array], signs: Array) -> Array:
    node = kink.node
    op, interval = node.op, walk.intervals[kink.operand]
    assert isinstance(op, Scalar), "other ops have no kinks"
    at = kink.points()[0]
    lines = walk.relaxations.relaxation(node)
    assert isinstance(lines, Lines), "elementwise functions have lines"
    value = node.apply(at)

    def gap(slope: Array | None, intercept: Array | None) -> Array:
        line = 0.0 if slope is None else slope[0] * at
        line = line if intercept is None else line + intercept[0]
        return jnp.abs(line - value)

    below = gap(lines.lower_slope, lines.lower_intercept)
    above = gap(lines.upper_slope, lines.upper_intercept)
    rows = coefficients_of.get(node.label)
    if rows is None:
        return jnp.full((len(signs), node.size), -1.0, node.dtype)
    cost = jnp.where(rows > 0, below[None], above[None]) * jnp.abs(rows)
    # Among units that cost nothing at this kink the widest relaxation is the best choice.
    cost = cost + 1e-6 * jnp.maximum(below, above)[None]
    unstable = (interval.lower < at) & (at < interval.upper)
    splittable = unstable[None] & (kink.of(signs) == 0)
    return jnp.where(splittable, cost, -1.0).reshape(len(signs), -1)

"""What is compiled for a search over domains: bounds of the root, an optimiser's step, bounds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from boundjax import slopes
from boundjax.precision import training_precision
from boundjax.search.constraints import SetOf
from boundjax.search.network import Flat, FlatNetwork
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.transforms import domains
from boundjax.transforms.domains import DomainBounds, Domains, Splits
from boundjax.transforms.interval import exact_intervals, pre_activation_nodes
from boundjax.transforms.linear import RelaxOptions, relax
from boundjax.transforms.optimize import Ascent, BestPositions, State, unit_interval
from boundjax.transforms.presets import LINEAR_OPTIONS
from boundjax.transforms.walk import Walk

# Units that are looked at before one of them is split.
CANDIDATES = 6
_RULE = optax.adam(optax.exponential_decay(0.1, transition_steps=1, decay_rate=0.98))
_OPTIONS = slopes.optimized(1, _RULE, per_spec=True)


class Root(NamedTuple):
    """Bounds on the whole box.

    Attributes:
      lower: `[R]`, of the rows.
      largest: `[m]`, the largest magnitude of each output.
      outputs: `[m]`, at the centre.
      intervals: of the operands of nonlinear ops, by label.
      positions: `[Q]`, those of all free lines.
      active: bool `[Q]`, whether a position matters.
      unstable: bool `[U]`, the units that can be split.
    """

    lower: Array
    largest: Array
    outputs: Array
    intervals: Mapping[str, Interval]
    positions: Array
    active: Array
    unstable: Array


class Parameters(NamedTuple):
    """The parameters of the bounds on `N` domains, arrays or functions of them.

    Attributes:
      positions: `[N, Q]`, of all free lines.
      multipliers: `[N, U]`, of the splits.
      mix: `[N, R]`, the weights of the rows of a conjunction, which sum to 1: if all rows can be at
        most 0 together, so can each such mean of them.
    """

    positions: Any
    multipliers: Any
    mix: Any


class Evaluated(NamedTuple):
    """Bounds on `N` domains.

    Attributes:
      lower: `[N]`, of the rows.
      empty: `[N]`, whether splits contradict one another.
      candidates: int `[N, K]`, the units to split, best first.
      scores: `[N, K]`, theirs; negative for one that cannot be split.
      points: `[N, n]`, where the linear bounds are least.
      outputs: `[N, m]`, there.
    """

    lower: Array
    empty: Array
    candidates: Array
    scores: Array
    points: Array
    outputs: Array


def _mean_weights(mix: Array) -> Array:
    """The projection of the weights of rows, which need not be the nearest ones."""
    positive = jax.nn.relu(mix)
    return positive / jnp.maximum(jnp.sum(positive, axis=1, keepdims=True), 1e-12)


_PROJECTION = Parameters(unit_interval, jax.nn.relu, _mean_weights)


def begin(parameters: Parameters) -> State:
    """The state before the first step."""
    worst = jnp.full(len(parameters.mix), -jnp.inf, jnp.float32)
    best = BestPositions(worst, parameters)
    return State(parameters, _RULE.init(parameters), best, jnp.float32(jnp.inf))


def walk_within(
    flat: Flat,
    box: InputSet,
    intervals: Mapping[str, Interval],
    rounding: Rounding,
    max_bytes: int,
    rounded: bool = True,
) -> Walk:
    """A walk from known intervals; unless `rounded`, its bounds are proposals, not proofs."""
    relaxed = relax(flat, known=intervals, sides="lower", rounding=rounding, max_bytes=max_bytes)
    walk = relaxed(box).walk if rounded else relaxed(box).walk.unrounded()
    walk.relaxations.make(range(1, len(walk.graph.nodes)))
    return walk


class Op(NamedTuple):
    """An op with kinks; every element of its operand is a unit at each of them.

    Attributes:
      label: of the op.
      kinks: how many it has.
      size: the number of elements.
      at_zero: whether they all lie at 0.
    """

    label: str
    kinks: int
    size: int
    at_zero: bool


class Operand(NamedTuple):
    """An operand of a nonlinear op.

    Attributes:
      node: its index in the graph.
      shape: its shape.
      is_exact: whether its interval is its range, so that nothing can be tighter.
    """

    node: int
    shape: tuple[int, ...]
    is_exact: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """What is compiled for a network, whatever its weights.

    Attributes:
      rounding, max_bytes: as of `DomainPrograms`.
      ops: those with kinks, in the order of the graph.
      shapes: of the positions by label, in their order.
      operands: of all nonlinear ops by the labels of `Root.intervals`, in the order of the graph.
      all_split: whether every nonlinear op has kinks.
      set_of: as of `DomainPrograms`.
    """

    rounding: Rounding
    max_bytes: int
    ops: tuple[Op, ...]
    shapes: Mapping[str, tuple[int, ...]]
    operands: Mapping[str, Operand]
    all_split: bool
    set_of: SetOf

    @classmethod
    def traced(
        cls, network: FlatNetwork, rounding: Rounding, max_bytes: int, set_of: SetOf
    ) -> Bounds:
        """Traces a network for its units, positions and operands."""
        layout: list[Bounds] = []

        def trace(lower: Array) -> None:
            walk = walk_within(network, set_of(lower, lower), {}, rounding, max_bytes)
            graph = walk.graph
            by_index = itertools.groupby(Splits.of(graph).kinks, lambda k: k.node.index)
            groups = [list(kinks) for _, kinks in by_index]
            ops = [
                Op(
                    kinks[0].node.label,
                    len(kinks),
                    kinks[0].node.size,
                    all(isinstance(kink.at, float) and kink.at == 0.0 for kink in kinks),
                )
                for kinks in groups
            ]
            exact = exact_intervals(graph, walk.input_set)
            operands = {
                label: Operand(index, graph.nodes[index].shape, index in exact)
                for label, index in pre_activation_nodes(graph).items()
            }
            split = {kinks[0].node.index for kinks in groups}
            bent = {node.index for node in graph.nodes if node.is_nonlinear}
            shapes = {label: p.shape for label, p in walk.relaxations.slopes.items()}
            layout.append(
                cls(rounding, max_bytes, tuple(ops), shapes, operands, bent <= split, set_of)
            )

        jax.eval_shape(trace, jax.ShapeDtypeStruct((network.input_size,), jnp.float32))
        return layout[0]

    @property
    def units(self) -> int:
        """The number of units."""
        return sum(op.kinks * op.size for op in self.ops)

    def root(self, flat: Flat) -> Callable[..., Root]:
        """See `DomainPrograms.root`."""

        @training_precision("highest")
        def root(lower: Array, upper: Array, rows: Array, known: Mapping[str, Interval]) -> Root:
            options: RelaxOptions = {
                "known": known,
                "sides": "lower",
                "rounding": self.rounding,
                "max_bytes": self.max_bytes,
                **LINEAR_OPTIONS["crown"],
            }
            relaxation = relax(flat, **options)(self.set_of(lower, upper))
            walk = relaxation.walk
            bounds = relaxation.bounds(rows).lower
            walk.relaxations.make(range(1, len(walk.graph.nodes)))
            splits = Splits.of(walk.graph)
            positions = walk.relaxations.slopes
            unstable = splits.unstable(walk.intervals)

            def active(label: str) -> Array:
                op = label.removesuffix(":below")
                inside = [unstable[k.units] for k in splits.kinks if k.node.label == op]
                return (
                    jnp.any(jnp.stack(inside), axis=0)
                    if inside
                    else jnp.ones(positions[label].size, bool)
                )

            labels = list(self.shapes)
            empty = jnp.zeros(0, jnp.float32)
            return Root(
                bounds,
                relaxation.largest_output(),
                flat(jnp.clip(0.5 * lower + 0.5 * upper, lower, upper)),
                relaxation.pre_activations,
                jnp.concatenate([empty, *(positions[label].reshape(-1) for label in labels)]),
                jnp.concatenate([empty.astype(bool), *map(active, labels)]),
                unstable,
            )

        return root

    def step(self, flat: Flat, operand: str | None) -> Callable[..., State]:
        """See `DomainPrograms.step`."""

        @training_precision("highest")
        def step(
            box: InputSet,
            intervals: Mapping[str, Interval],
            signs: Array,
            rows: Array,
            offset: Array,
            state: State,
        ) -> State:
            moved = self._ascent(flat, operand, box, intervals, signs, rows, offset).step(state)
            # The objective of a batch picks nothing where rows have separate parameters, and its
            # sum would be one over devices.
            return moved._replace(least=state.least)

        return step

    def _ascent(
        self,
        flat: Flat,
        operand: str | None,
        box: InputSet,
        intervals: Mapping[str, Interval],
        signs: Array,
        rows: Array,
        offset: Array,
    ) -> Ascent:
        walk = self._walk(flat, box, intervals, rounded=False)

        def bound(parameters: Parameters) -> Array:
            mean = jnp.einsum("nr,nrm->nm", parameters.mix, rows)
            bounds = self._bound(walk, operand, mean, signs, parameters)
            return bounds.lower + jnp.sum(parameters.mix * offset, axis=1)

        return Ascent(bound, True, _OPTIONS, _PROJECTION)

    def evaluate(self, flat: Flat, operand: str | None) -> Callable[..., Evaluated]:
        """See `DomainPrograms.evaluate`."""

        def evaluated(bounds: DomainBounds) -> Evaluated:
            scores, candidates = jax.lax.top_k(bounds.scores, min(CANDIDATES, self.units))
            points = bounds.worst_input
            outputs = jax.vmap(flat)(points)
            return Evaluated(bounds.lower, bounds.empty, candidates, scores, points, outputs)

        return self._of_bounds(flat, operand, evaluated, rounded=True)

    def probe(self, flat: Flat) -> Callable[..., Array]:
        """See `DomainPrograms.probe`."""
        return self._of_bounds(
            flat, None, lambda bounds: jnp.where(bounds.empty, jnp.inf, bounds.lower), rounded=False
        )

    def lines(self, flat: Flat) -> Callable[..., tuple[Array, Array]]:
        """See `DomainPrograms.lines`."""
        return self._of_bounds(
            flat, None, lambda bounds: (bounds.coefficients, bounds.bias), rounded=False
        )

    def _of_bounds(
        self,
        flat: Flat,
        operand: str | None,
        result: Callable[[DomainBounds], Any],
        rounded: bool,
    ) -> Callable[..., Any]:
        """A function of box, intervals, signs, rows and parameters: a result of the bounds."""

        @training_precision("highest")
        def function(
            box: InputSet,
            intervals: Mapping[str, Interval],
            signs: Array,
            rows: Array,
            parameters: Parameters,
        ) -> Any:
            walk = self._walk(flat, box, intervals, rounded)
            return result(self._bound(walk, operand, rows, signs, parameters))

        return function

    def _bound(
        self, walk: Walk, operand: str | None, rows: Array, signs: Array, parameters: Parameters
    ) -> DomainBounds:
        node = None if operand is None else self.operands[operand].node
        return domains.bound(walk, rows, self._domains(signs, parameters), node)

    def _walk(
        self, flat: Flat, box: InputSet, intervals: Mapping[str, Interval], rounded: bool
    ) -> Walk:
        return walk_within(flat, box, intervals, self.rounding, self.max_bytes, rounded)

    def _domains(self, signs: Array, parameters: Parameters) -> Domains:
        positions: dict[str, Array] = {}
        start = 0
        for label, shape in self.shapes.items():
            stop = start + math.prod(shape)
            positions[label] = parameters.positions[:, start:stop].reshape(-1, *shape)
            start = stop
        return Domains(signs, positions, parameters.multipliers)

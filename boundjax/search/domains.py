"""The compiled parts of a search over domains: bounds of the root, an optimiser's step, bounds.

Everything of a property is an argument, so that a network is compiled once for all properties whose
arrays have the same shapes. Arrays of a batch have one of two sizes (`sizes`), and the devices of a
mesh divide it: each runs the same program on its own domains.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from boundjax import sharding, slopes
from boundjax.precision import training_precision
from boundjax.search.constraints import SetOf
from boundjax.search.network import Flat, FlatNetwork, Program
from boundjax.search.proof import Units
from boundjax.sets.box import Box
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.transforms import domains
from boundjax.transforms.domains import DomainBounds, Domains, Splits
from boundjax.transforms.linear import RelaxOptions, relax
from boundjax.transforms.optimize import Ascent, BestPositions, State, unit_interval
from boundjax.transforms.presets import LINEAR_OPTIONS
from boundjax.transforms.walk import Walk
from boundjax.typing import PyTree

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


class DomainPrograms:
    """Jitted functions of one network for a search over domains.

    Attributes:
      sizes: the two sizes of batches, on all devices together.
    """

    def __init__(
        self, network: FlatNetwork, rounding: Rounding, max_bytes: int, set_of: SetOf = Box
    ) -> None:
        """Traces nothing yet.

        Args:
          network: the network.
          rounding: what bounds hold for.
          max_bytes: memory budget of one call on each device.
          set_of: from the ends of a box to the inputs in it that count.
        """
        self._network, self.set_of = network, set_of
        self._rounding: Rounding = rounding
        self._max_bytes = max_bytes

    @property
    def _bounds(self) -> _Bounds:
        return self._network.shared("domains", self._traced)

    def _traced(self) -> _Bounds:
        """Traces the network for its units and positions."""
        layout: list[_Bounds] = []

        def trace(lower: Array) -> None:
            walk = _walk(self._network, Box(lower, lower), {}, self._rounding, self._max_bytes)
            shapes = {label: p.shape for label, p in walk.relaxations.slopes.items()}
            by_index = itertools.groupby(Splits.of(walk.graph).kinks, lambda k: k.node.index)
            groups = [list(kinks) for _, kinks in by_index]
            ops = [_Op(g[0].node.label, len(g), g[0].node.size) for g in groups]
            split = {group[0].node.index for group in groups}
            bent = {node.index for node in walk.graph.nodes if node.is_nonlinear}
            layout.append(
                _Bounds(
                    self._rounding,
                    self._max_bytes,
                    tuple(ops),
                    shapes,
                    bent <= split,
                    self.set_of,
                )
            )

        jax.eval_shape(trace, jax.ShapeDtypeStruct((self._network.input_size,), jnp.float32))
        return layout[0]

    def units_of(self, numbers: np.ndarray) -> Units:
        """Op, kink and element of some of the units."""
        places = [
            (number, kink, element)
            for number, op in enumerate(self._bounds.ops)
            for kink in range(op.kinks)
            for element in range(op.size)
        ]
        return Units(*np.array(places, np.int32).reshape(-1, 3)[numbers].T)

    def free_of(self, numbers: np.ndarray) -> Units:
        """Op, line and element of some of the positions; -1 as the op where it has no kinks."""
        by_label = {op.label: number for number, op in enumerate(self._bounds.ops)}
        places = []
        for label, shape in self._bounds.shapes.items():
            op = label.removesuffix(":below")
            place = by_label.get(op, -1), int(op != label)
            places += [(*place, element) for element in range(int(np.prod(shape)))]
        return Units(*np.array(places, np.int32).reshape(-1, 3)[numbers].T)

    @property
    def all_split(self) -> bool:
        """Whether the network is affine on a domain on which every unit is split."""
        return self._bounds.all_split

    @property
    def sizes_of_ops(self) -> tuple[int, ...]:
        """The elements of each op with kinks."""
        return tuple(op.size for op in self._bounds.ops)

    @property
    def units(self) -> int:
        """`U`, the number of units."""
        return self._bounds.units

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """Small enough that the rows of all nodes of a batch fit into the memory budget."""
        shapes = self._bounds.shapes
        row = 4 * (self.units + sum(int(np.prod(shape)) for shape in shapes.values()))
        # The optimiser keeps five copies of every parameter, and its gradient the rows of a walk.
        most = self._max_bytes // (16 * max(1, row))
        large = min(256, 1 << max(0, int(most).bit_length() - 1))
        devices = sharding.count(self._network.mesh)
        return devices * min(16, large), devices * large

    def whole(self, tree: PyTree) -> PyTree:
        """Arrays that all domains share, for the programs of batches."""
        return sharding.whole(tree, self._network.mesh)

    def parts(self, array: np.ndarray) -> Array:
        """An array of a batch, `[N, ...]`, for these programs."""
        return sharding.parts(array, self._network.mesh)

    @property
    def root(self) -> Program:
        """`(lower [n], upper [n], rows [R, m]) -> Root`, by CROWN."""
        return self._network.program("root", self._bounds.root)

    @functools.cached_property
    def begin(self) -> Callable[[Parameters], State]:
        """`parameters -> state` before the first step."""
        return sharding.compiled_result(_begin, self._network.mesh)

    @property
    def step(self) -> Program:
        """`(box, intervals, signs [N, U], rows [N, R, m], offset [N, R], state) -> state`.

        It maximises bounds that ignore rounding; `evaluate` decides what its parameters prove.
        """
        return self._network.program("step", self._bounds.step, whole=2, like=5)

    @property
    def probe(self) -> Program:
        """As `evaluate`; the lower bounds `[N]` without rounding, inf on empty domains."""
        return self._network.program("probe", self._bounds.probe, whole=2)

    @property
    def lines(self) -> Program:
        """As `evaluate`; the linear bounds in the input, coefficients `[N, n]` and bias `[N]`.

        They ignore rounding.
        """
        return self._network.program("lines", self._bounds.lines, whole=2)

    @property
    def evaluate(self) -> Program:
        """`(box, intervals, signs [N, U], rows [N, m], parameters) -> Evaluated`."""
        return self._network.program("evaluate", self._bounds.evaluate, whole=2)


def _begin(parameters: Parameters) -> State:
    worst = jnp.full(len(parameters.mix), -jnp.inf, jnp.float32)
    best = BestPositions(worst, parameters)
    return State(parameters, _RULE.init(parameters), best, jnp.float32(jnp.inf))


def _walk(
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


class _Op(NamedTuple):
    """An op with kinks; every element of its operand is a unit at each of them."""

    label: str
    kinks: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Bounds:
    """What is compiled for a network, whatever its weights.

    Attributes:
      rounding, max_bytes: as of `DomainPrograms`.
      ops: those with kinks, in the order of the graph.
      shapes: of the positions by label, in their order.
      all_split: whether every nonlinear op has kinks.
      set_of: as of `DomainPrograms`.
    """

    rounding: Rounding
    max_bytes: int
    ops: tuple[_Op, ...]
    shapes: Mapping[str, tuple[int, ...]]
    all_split: bool
    set_of: SetOf = Box

    @property
    def units(self) -> int:
        """The number of units."""
        return sum(op.kinks * op.size for op in self.ops)

    def root(self, flat: Flat) -> Callable[[Array, Array, Array], Root]:
        """See `DomainPrograms.root`."""
        options: RelaxOptions = {
            "sides": "lower",
            "rounding": self.rounding,
            "max_bytes": self.max_bytes,
            **LINEAR_OPTIONS["crown"],
        }
        relaxed = relax(flat, **options)

        @training_precision("highest")
        def root(lower: Array, upper: Array, rows: Array) -> Root:
            relaxation = relaxed(self.set_of(lower, upper))
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

    def step(self, flat: Flat) -> Callable[..., State]:
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
            moved = self._ascent(flat, box, intervals, signs, rows, offset).step(state)
            # The objective of a batch picks nothing where rows have separate parameters, and its
            # sum would be one over devices.
            return moved._replace(least=state.least)

        return step

    def _ascent(
        self,
        flat: Flat,
        box: InputSet,
        intervals: Mapping[str, Interval],
        signs: Array,
        rows: Array,
        offset: Array,
    ) -> Ascent:
        walk = self._walk(flat, box, intervals, rounded=False)

        def bound(parameters: Parameters) -> Array:
            mean = jnp.einsum("nr,nrm->nm", parameters.mix, rows)
            bounds = domains.bound(walk, mean, self._domains(signs, parameters))
            return bounds.lower + jnp.sum(parameters.mix * offset, axis=1)

        return Ascent(bound, True, _OPTIONS, _PROJECTION)

    def evaluate(self, flat: Flat) -> Callable[..., Evaluated]:
        """See `DomainPrograms.evaluate`."""

        def evaluated(bounds: DomainBounds) -> Evaluated:
            scores, candidates = jax.lax.top_k(bounds.scores, min(CANDIDATES, self.units))
            points = bounds.worst_input
            outputs = jax.vmap(flat)(points)
            return Evaluated(bounds.lower, bounds.empty, candidates, scores, points, outputs)

        return self._of_bounds(flat, evaluated, rounded=True)

    def probe(self, flat: Flat) -> Callable[..., Array]:
        """See `DomainPrograms.probe`."""
        return self._of_bounds(
            flat, lambda bounds: jnp.where(bounds.empty, jnp.inf, bounds.lower), rounded=False
        )

    def lines(self, flat: Flat) -> Callable[..., tuple[Array, Array]]:
        """See `DomainPrograms.lines`."""
        return self._of_bounds(
            flat, lambda bounds: (bounds.coefficients, bounds.bias), rounded=False
        )

    def _of_bounds(
        self, flat: Flat, result: Callable[[DomainBounds], Any], rounded: bool
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
            return result(domains.bound(walk, rows, self._domains(signs, parameters)))

        return function

    def _walk(
        self, flat: Flat, box: InputSet, intervals: Mapping[str, Interval], rounded: bool
    ) -> Walk:
        return _walk(flat, box, intervals, self.rounding, self.max_bytes, rounded)

    def _domains(self, signs: Array, parameters: Parameters) -> Domains:
        positions: dict[str, Array] = {}
        start = 0
        for label, shape in self.shapes.items():
            stop = start + int(np.prod(shape))
            positions[label] = parameters.positions[:, start:stop].reshape(-1, *shape)
            start = stop
        return Domains(signs, positions, parameters.multipliers)

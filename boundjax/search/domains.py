"""The compiled parts of a search over domains: bounds of the root, an optimiser's step, bounds.

Everything of a property is an argument, so that a network is compiled once for all properties whose
arrays have the same shapes. Arrays of a batch have one of two sizes (`sizes`), and the devices of a
mesh divide it: each runs the same program on its own domains.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax import sharding
from boundjax.search.constraints import SetOf
from boundjax.search.domain_bounds import Bounds, Parameters, begin
from boundjax.search.network import FlatNetwork, Program
from boundjax.search.proof import Units
from boundjax.sets.box import Box
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.transforms.optimize import State
from boundjax.typing import PyTree


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
        self._operand: str | None = None

    @property
    def _bounds(self) -> Bounds:
        options = self._rounding, self._max_bytes, self.set_of
        make = functools.partial(Bounds.traced, self._network, *options)
        return self._network.shared("domains", make)

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

    @property
    def refinable(self) -> tuple[str, ...]:
        """The labels of `Root.intervals` that may be tightened, in the order of the graph."""
        return tuple(label for label, o in self._bounds.operands.items() if not o.is_exact)

    def of_operand(self, label: str) -> DomainPrograms:
        """The same, for rows that are functions of an operand instead of the output.

        `step` and `evaluate` then take rows over the elements of the operand; the outputs of
        `evaluate` stay those of the network.
        """
        twin = copy.copy(self)
        twin._operand = label
        return twin

    def kinked(self, label: str, unstable: np.ndarray) -> tuple[np.ndarray, bool]:
        """Which elements of an operand the relaxation depends on, bool `[size]`.

        Args:
          label: of the operand.
          unstable: bool `[U]`, the units with a kink inside their interval.

        Returns:
          Those with a kink inside, or all elements if the op has no kinks; and whether all kinks
          lie at 0.
        """
        start = 0
        for op in self._bounds.ops:
            if op.label == label:
                inside = unstable[start : start + op.kinks * op.size].reshape(op.kinks, op.size)
                return np.any(inside, axis=0), op.at_zero
            start += op.kinks * op.size
        return np.ones(int(np.prod(self._bounds.operands[label].shape)), bool), False

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
        """`(lower [n], upper [n], rows [R, m], known) -> Root`, by CROWN.

        Its intervals are cut with those of `known`, which are like `Root.intervals`.
        """
        return self._network.program("root", self._bounds.root)

    @property
    def unknown(self) -> dict[str, Interval]:
        """What `root` takes as `known` while nothing is."""
        shapes = {label: operand.shape for label, operand in self._bounds.operands.items()}
        return {
            label: Interval(jnp.full(shape, -jnp.inf), jnp.full(shape, jnp.inf))
            for label, shape in shapes.items()
        }

    @functools.cached_property
    def begin(self) -> Callable[[Parameters], State]:
        """`parameters -> state` before the first step."""
        return sharding.compiled_result(begin, self._network.mesh)

    @property
    def step(self) -> Program:
        """`(box, intervals, signs [N, U], rows [N, R, m], offset [N, R], state) -> state`.

        It maximises bounds that ignore rounding; `evaluate` decides what its parameters prove.
        """
        return self._network.program(
            ("step", self._operand),
            functools.partial(self._bounds.step, operand=self._operand),
            whole=2,
            like=5,
        )

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
        return self._network.program(
            ("evaluate", self._operand),
            functools.partial(self._bounds.evaluate, operand=self._operand),
            whole=2,
        )

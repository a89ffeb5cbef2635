"""Bounds on the domains of a queue, in batches of a fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from boundjax.search.domain_bounds import Parameters
from boundjax.search.domains import DomainPrograms
from boundjax.search.queue import Queue
from boundjax.search.rows import FLOAT64, lost_of
from boundjax.sets.input_set import InputSet


class Root(NamedTuple):
    """What is kept of the bounds on the whole box.

    Attributes:
      intervals: of the operands of nonlinear ops, by label.
      positions: `[Q]`, of all free lines.
      active: the indices of the positions that matter.
      unstable: the indices of the units that can be split.
    """

    intervals: Any
    positions: np.ndarray
    active: np.ndarray
    unstable: np.ndarray


class Conjunctions(NamedTuple):
    """The rows of `C` conjunctions, each a function of `m` values.

    Attributes:
      weights: float64 `[C, R, m]`.
      offset: float64 `[C, R]`.
      largest: `[m]`, the largest magnitude of each value on the box.
    """

    weights: np.ndarray
    offset: np.ndarray
    largest: np.ndarray


class Bounder:
    """Bounds domains of one box, whose intervals they share.

    Attributes:
      slack: by how much bounds fell short of those without rounding, the last time.
    """

    def __init__(
        self,
        programs: DomainPrograms,
        box: InputSet,
        root: Root,
        conjunctions: Conjunctions,
        check_time: Callable[[], None],
        aim: float = 0.0,
    ) -> None:
        """Keeps its arguments.

        Args:
          programs: of the network.
          box: all inputs that count.
          root: the bounds on it.
          conjunctions: the rows.
          check_time: is called between batches, and may raise.
          aim: bounds above it are good enough.
        """
        self.slack = 0.0
        self._aim = aim
        self.root = root
        self.programs = programs
        self._box, self._conjunctions, self._check_time = box, conjunctions, check_time

    def batches(self, queue: Queue) -> Iterator[tuple[Queue, np.ndarray, Array, Parameters]]:
        """Domains in batches of a fixed size, which copies of the last domain fill up.

        Yields:
          The domains, the index of the domain in each place of the batch, and the batch's signs and
          parameters.
        """
        root, place = self.root, self.programs.parts
        small, large = self.programs.sizes
        size = large if len(queue) > 2 * small else small
        for first in range(0, len(queue), size):
            part = queue.take(slice(first, first + size))
            fill = np.minimum(np.arange(size), len(part) - 1)
            signs = np.zeros((size, self.programs.units), np.int8)
            multipliers = np.zeros(signs.shape, np.float32)
            positions = np.tile(root.positions, (size, 1)).copy()  # empty ones are no copies
            signs[:, root.unstable] = part.signs[fill]
            multipliers[:, root.unstable] = part.multipliers[fill]
            positions[:, root.active] = part.positions[fill]
            arrays = positions, multipliers, part.mix[fill]
            yield part, fill, place(signs), Parameters(*map(place, arrays))

    def optimized(self, queue: Queue, steps: int) -> Iterator[tuple[Queue, np.ndarray]]:
        """Batches of domains with the best parameters after some steps, or as soon as they suffice.

        Yields:
          The domains, and their bounds without rounding.
        """
        for part, fill, signs, parameters in self.batches(queue):
            self._check_time()
            best, values = self._ascent(part, fill, signs, parameters, steps)
            self._check_time()
            kept = slice(0, len(part))
            part = part.with_parameters(
                np.asarray(best.positions)[kept, self.root.active].astype(np.float16),
                np.asarray(best.multipliers)[kept, self.root.unstable],
                np.asarray(best.mix)[kept],
            )
            yield part, values[kept]

    def _ascent(
        self, part: Queue, fill: np.ndarray, signs: Array, parameters: Parameters, steps: int
    ) -> tuple[Parameters, np.ndarray]:
        member, of = part.member[fill], self._conjunctions
        context = (
            self._box,
            self.root.intervals,
            signs,
            self.programs.parts(of.weights[member].astype(np.float32)),
            self.programs.parts(of.offset[member].astype(np.float32)),
        )
        # Aim higher by as much as the previous bounds lost to rounding.
        goal = self._aim + 2.0 * self._means(part)[2] + self.slack
        state = self.programs.begin(parameters)
        for step in range(steps):
            state = self.programs.step(*context, state)
            if step % 4 == 3 and (np.asarray(state.best.values) > goal[fill]).all():
                break
        return state.best.parameters, np.asarray(state.best.values)

    def _means(self, queue: Queue) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The means of the rows of domains as float32, `[N, m]`, of their offsets, `[N]`.

        The third array is what the rounding of the rows may change, `[N]`.
        """
        weights_of = self._conjunctions.weights[queue.member]
        mix = queue.mix.astype(np.float64)[:, None]
        weights = (mix @ weights_of)[:, 0]
        sizes = (mix @ np.abs(weights_of))[:, 0]
        offset = (mix[:, 0] * self._conjunctions.offset[queue.member]).sum(axis=1)
        single = weights.astype(np.float32)
        single[np.abs(single) < np.finfo(np.float32).tiny] = 0.0
        errors = np.abs(weights - single) + 4.0 * FLOAT64 * sizes * mix.shape[-1]
        return single, offset, lost_of(errors, np.abs(offset), self._conjunctions.largest)

    def probed(self, queue: Queue) -> np.ndarray:
        """Lower bounds of domains without rounding, to compare them."""
        results = []
        for part, fill, signs, parameters in self.batches(queue):
            single, offset, _ = self._means(part)
            arrays = signs, self.programs.parts(single[fill]), parameters
            lower = self.programs.probe(self._box, self.root.intervals, *arrays)
            results.append(np.asarray(lower)[: len(part)] + offset)
        return np.concatenate(results)

    def lines(
        self, signs: Array, rows: np.ndarray, parameters: Parameters
    ) -> tuple[np.ndarray, np.ndarray]:
        """Linear bounds of the rows `[N, m]` of a batch, see `DomainPrograms.lines`; float64."""
        of_batch = self.programs.parts(rows)
        arrays = self.programs.lines(self._box, self.root.intervals, signs, of_batch, parameters)
        coefficients, bias = (np.asarray(array, np.float64) for array in arrays)
        return coefficients, bias

    def values(
        self, queue: Queue, proposed: np.ndarray | None = None
    ) -> tuple[Queue, np.ndarray, np.ndarray]:
        """Domains with proved lower bounds and what to split, and their worst inputs and outputs.

        A mean of the rows that is positive on a domain refutes the conjunction there. It is bounded
        for the float32 numbers nearest to its weights; what this changes is subtracted. `proposed`
        are the bounds without rounding.
        """
        results = []
        inverse = np.zeros(self.programs.units, int)
        inverse[self.root.unstable] = np.arange(len(self.root.unstable))
        for part, fill, signs, parameters in self.batches(queue):
            single, offset, lost = self._means(part)
            evaluated = self.programs.evaluate(
                self._box,
                self.root.intervals,
                signs,
                self.programs.parts(single[fill]),
                parameters,
            )
            lower, empty, candidates, scores, points, outputs = (
                np.asarray(array)[: len(part)] for array in evaluated
            )
            with np.errstate(invalid="ignore"):
                value = lower.astype(np.float64) + offset - lost
            value = np.where(np.isfinite(value), value, -np.inf)
            value[empty] = np.inf
            results.append((value, inverse[candidates], scores, points, outputs))
        value, candidates, scores, points, outputs = map(np.concatenate, zip(*results, strict=True))
        if proposed is not None:
            with np.errstate(invalid="ignore"):
                fell = proposed - value
            self.slack = float(np.max(fell[np.isfinite(fell)], initial=0.0))
        return queue.with_bounds(value, candidates, scores), points, outputs

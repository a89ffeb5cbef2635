"""Tighter intervals of the operands of nonlinear ops, for a search that would not end soon.

The relaxations of a search over domains rest on the intervals of CROWN over the whole box. Here
every operand's elements are bounded once more, in the order of the graph: with free lines that are
optimised for each bound alone (alpha-CROWN, Xu et al. 2021), and on the halves of the domains where
that bound is least (a small branch and bound for each of them, in one batch). Others solve mixed
integer programs for this (MN-BaB, Ferrari et al. 2022; alpha-beta-CROWN).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.search.bounder import Bounder, Conjunctions, Root
from boundjax.search.domains import DomainPrograms
from boundjax.search.queue import Queue
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval

_STEPS = 20  # for the whole box
_SPLIT_STEPS = 12
_MOST_SPLITS = 64  # of one bound


def refined(
    programs: DomainPrograms,
    box: InputSet,
    root: Root,
    *,
    domains: int,
    max_bytes: int,
    check_time: Callable[[], None],
) -> Mapping[str, Interval]:
    """Tighter intervals of the operands, by label.

    Args:
      programs: of the network.
      box: all inputs that count.
      root: the bounds on it.
      domains: how many domains may be bounded; of the elements those with the widest intervals are
        bounded if there are more.
      max_bytes: memory for the domains of one operand.
      check_time: is called between batches, and may raise.
    """
    intervals = dict(jax.device_get(root.intervals))
    unstable = np.zeros(programs.units, bool)
    unstable[root.unstable] = True
    bytes_of_domain = 4 * (len(root.active) + 2 * len(root.unstable) + 16)
    labels = programs.refinable
    for number, label in enumerate(labels):
        share = min(domains // (len(labels) - number), max_bytes // bytes_of_domain)
        kinked, at_zero = programs.kinked(label, unstable)
        within = root._replace(intervals=programs.whole(intervals))
        operand = _Operand(programs.of_operand(label), box, within, intervals[label], check_time)
        intervals[label], used = operand.tightened(np.flatnonzero(kinked), at_zero, share)
        domains -= used
    return intervals


class _Operand:
    """The bounds on one operand."""

    def __init__(
        self,
        programs: DomainPrograms,
        box: InputSet,
        root: Root,
        interval: Interval,
        check_time: Callable[[], None],
    ) -> None:
        self._programs, self._box, self._root = programs, box, root
        self._shape = interval.lower.shape
        self._lower, self._upper = (np.array(end, np.float32).reshape(-1) for end in interval)
        self._check_time = check_time

    def tightened(self, elements: np.ndarray, at_zero: bool, domains: int) -> tuple[Interval, int]:
        """Bounds some elements from both sides.

        Args:
          elements: their indices.
          at_zero: whether only the sign of an element matters.
          domains: how many domains may be bounded.

        Returns:
          The interval, and how many domains were bounded.
        """
        elements = self._widest(elements, at_zero, domains // 2)
        bounded = 0
        if len(elements):
            queue, bounded = self._bounded(elements, at_zero, domains)
            least = np.full(2 * len(elements), np.inf)
            np.minimum.at(least, queue.member, queue.value)
            ends = np.where(np.isfinite(least), least, -np.inf).reshape(2, -1)
            lower, upper = _rounded_down(ends[0]), -_rounded_down(ends[1])
            self._lower[elements] = np.fmax(self._lower[elements], lower)
            self._upper[elements] = np.fmin(self._upper[elements], upper)
        lower, upper = (jnp.asarray(e.reshape(self._shape)) for e in (self._lower, self._upper))
        return Interval(lower, upper), bounded

    def _widest(self, elements: np.ndarray, at_zero: bool, most: int) -> np.ndarray:
        lower, upper = self._lower[elements], self._upper[elements]
        width = np.minimum(-lower, upper) if at_zero else upper - lower
        usable = np.isfinite(width) & (width > 0)
        elements, width = elements[usable], width[usable]
        return elements[np.argsort(-width, kind="stable")[:most]]

    def _bounded(self, elements: np.ndarray, at_zero: bool, domains: int) -> tuple[Queue, int]:
        """Domains that cover the box for each bound, lower ones first; how many were bounded."""
        count, size = 2 * len(elements), len(self._lower)
        weights = np.zeros((count, 1, size))
        weights[np.arange(count), 0, np.tile(elements, 2)] = np.repeat([1.0, -1.0], len(elements))
        largest = np.maximum(np.abs(self._lower), np.abs(self._upper))
        rows = Conjunctions(weights, np.zeros((count, 1)), largest)
        aim = 0.0 if at_zero else np.inf
        bounder = Bounder(self._programs, self._box, self._root, rows, self._check_time, aim)
        queue = self._values(bounder, self._begun(elements), _STEPS)
        splits = min(_MOST_SPLITS, (domains - count) // (2 * count))
        bounded = count
        for _ in range(splits):
            limiting = self._worst(queue, at_zero)
            if not len(limiting):
                break
            children = self._values(bounder, _halves(queue.take(limiting)), _SPLIT_STEPS)
            bounded += len(children)
            rest = np.setdiff1d(np.arange(len(queue)), limiting)
            queue = queue.take(rest).followed_by(children)
        return queue, bounded

    def _begun(self, elements: np.ndarray) -> Queue:
        """The whole box for each bound, with what the intervals say."""
        root, count = self._root, 2 * len(elements)
        positions = root.positions[root.active].astype(np.float16)
        return Queue(
            member=np.arange(count),
            signs=np.zeros((count, len(root.unstable)), np.int8),
            positions=np.tile(positions, (count, 1)),
            multipliers=np.zeros((count, len(root.unstable)), np.float32),
            mix=np.ones((count, 1), np.float32),
            value=np.concatenate([self._lower[elements], -self._upper[elements]]).astype(float),
            candidates=np.zeros((count, 1), int),
            scores=np.full((count, 1), -1.0),
            node=np.zeros(count, int),
        )

    @staticmethod
    def _values(bounder: Bounder, queue: Queue, steps: int) -> Queue:
        parts = [bounder.values(part)[0] for part, _ in bounder.optimized(queue, steps)]
        return functools.reduce(Queue.followed_by, parts)

    @staticmethod
    def _worst(queue: Queue, at_zero: bool) -> np.ndarray:
        """For each bound the index of the domain that limits it, where splitting may help."""
        order = np.lexsort((queue.value, queue.member))
        first = np.unique(queue.member[order], return_index=True)[1]
        worst = order[first]
        useful = queue.scores[worst, 0] >= 0
        if at_zero:  # an element whose sign is known has straight lines
            useful &= queue.value[worst] < 0
        return worst[useful]


def _halves(queue: Queue) -> Queue:
    """Both halves of every domain, split at its best candidate."""
    halves = queue.take(np.repeat(np.arange(len(queue)), 2))
    unit = halves.candidates[:, 0]
    halves.signs[np.arange(len(halves)), unit] = np.tile([1, -1], len(queue))
    return halves


def _rounded_down(values: np.ndarray) -> np.ndarray:
    """float64 as float32, none of them larger."""
    single = values.astype(np.float32)
    return np.where(single > values, np.nextafter(single, np.float32(-np.inf)), single)

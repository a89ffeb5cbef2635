"""Branch and bound over domains: a conjunction is refuted on the parts of a box, one by one.

A domain whose bound is not positive is split where the relaxation costs most, at a kink of one unit
or of several, until every domain is refuted. The units are chosen as in BaBSR (Bunel et al. 2020),
and the best of them by bounds on both children (kFSB, De Palma et al. 2021); the bounds are those
of beta-CROWN (Wang et al. 2021).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from boundjax.properties import Case, Conjunction
from boundjax.search import limits, refinement
from boundjax.search.bounder import Bounder, Conjunctions, Root
from boundjax.search.constraints import Constraints
from boundjax.search.domains import DomainPrograms
from boundjax.search.leaves import MOST, Affine, Solution, solve
from boundjax.search.proof import Case as ProvedCase
from boundjax.search.proof import Leaf, Recorder
from boundjax.search.queue import Queue, at
from boundjax.search.rows import FLOAT64, Rows, lost_of, proved_values
from boundjax.sets.interval import Interval

_ROOT_STEPS = 40
_STEPS = 12
_BEFORE_REFINING = 512  # domains that are bounded before intervals are refined
_BETWEEN_REFININGS = 4  # the factor by which their number grows from one time to the next
_REFINING = 2  # domains that refining may bound, for each that was bounded before
_LEAF_STEPS = 200  # with nothing left to split, in a network with other nonlinear ops
_LEVELS = 3  # splits of one domain at once, while few are left
_ATTACK_EVERY = 8  # rounds
_ATTACKED = 16  # points of an attack


class Attacker(Protocol):
    """What a tree asks of the search that it is a part of; any call may end the search."""

    def check_time(self) -> None:
        """Ends the search when its time is over."""
        ...

    def note(self, domains: int, still_open: int, least: float) -> None:
        """Notes how far the tree is, see `Round`."""
        ...

    def look_at(self, members: np.ndarray, points: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Ends the search at a counterexample.

        Args:
          members: `[P]`, the conjunction that each point is to satisfy.
          points, outputs: `[P, n]` and `[P, m]`.

        Returns:
          `[P]`, how far each point is from unsafe.
        """
        ...

    def attack_from(self, members: np.ndarray, points: np.ndarray) -> None:
        """Moves points towards unsafe ones."""
        ...


class Tree:
    """The search for one box.

    Attributes:
      domains: how many domains have been bounded.
      record: the tree, with the parameters of its leaves.
      margins: float64 `[C]`, see `Result`.
      reason: why the search ended without an answer; empty before.
    """

    def __init__(
        self,
        programs: DomainPrograms,
        case: Case,
        conjunctions: Sequence[Conjunction],
        attacker: Attacker,
        with_proof: bool = False,
        max_queue_bytes: int = limits.MAX_QUEUE_BYTES,
        constraints: Constraints | None = None,
    ) -> None:
        """Prepares the rows.

        Args:
          programs: of the network.
          case: the box.
          conjunctions: all of the case, in its order.
          attacker: looks for counterexamples, and at the clock.
          with_proof: whether `record` is kept.
          max_queue_bytes: memory of the open domains at which the search ends.
          constraints: those of the programs.
        """
        self.domains, self.reason = 0, ""
        self.record = Recorder(off=not with_proof)
        self.margins = np.full(len(conjunctions), -np.inf)
        self._least = np.full(len(conjunctions), np.inf)  # of the domains that are refuted
        self._programs, self._attacker = programs, attacker
        self._max_queue_bytes = max_queue_bytes
        self._lower, self._upper = jnp.asarray(case.lower), jnp.asarray(case.upper)
        self._constraints = constraints
        self._box = programs.whole(programs.set_of(self._lower, self._upper))
        self._conjunctions = conjunctions
        count = max(len(c.offset) for c in conjunctions)
        rows = [Rows.of([conjunction], count) for conjunction in conjunctions]
        self._weights = np.stack([r.weights for r in rows])  # [C, R, m]
        self._offset = np.stack([r.offset for r in rows])  # [C, R]

    def refutes(self) -> bool:
        """Whether every conjunction is refuted; `reason` says why not."""
        most = _BEFORE_REFINING
        bounder, queue = self._from(self._programs.unknown, most if self._refines else None)
        while len(queue) and not self.reason:
            intervals = refinement.refined(
                self._programs,
                self._box,
                bounder.root,
                domains=_REFINING * most,
                max_bytes=self._max_queue_bytes,
                check_time=self._attacker.check_time,
            )
            most *= _BETWEEN_REFININGS
            bounder, queue = self._from(intervals, most)
        return not len(queue)

    @property
    def _refines(self) -> bool:
        """Whether intervals are refined; a proof has no place for what they are proved by."""
        return self.record.off and bool(self._programs.refinable)

    def _from(self, known: Mapping[str, Interval], most: int | None) -> tuple[Bounder, Queue]:
        """Searches from the whole box until no domain is open or `most` have been bounded.

        Returns what bounds the domains, and those that stay open.
        """
        bounder, queue = self._root(known)
        begun = queue.member
        if len(queue):
            queue = self._searched(bounder, self._bounded(bounder, queue, _ROOT_STEPS), most)
        refuted = np.setdiff1d(begun, queue.member)
        self.margins[refuted] = self._least[refuted]
        return bounder, queue

    def _searched(self, bounder: Bounder, queue: Queue, most: int | None) -> Queue:
        """Splits domains until none is open, `most` are bounded, or there is a `reason` to stop.

        Returns those that stay open.
        """
        rounds = 0
        while len(queue) and (most is None or self.domains < most):
            self._attacker.note(self.domains, len(queue), float(queue.value.min()))
            self._attacker.check_time()
            leaves = (queue.scores < 0).all(axis=1)
            if leaves.any():
                queue = queue.take(~leaves).followed_by(self._leaves(bounder, queue.take(leaves)))
                if self.reason:
                    break
                continue
            if queue.nbytes > self._max_queue_bytes:
                kept = queue.nbytes, self._max_queue_bytes
                self.reason = limits.full(len(queue), "domains", *kept)
                break
            parents = max(1, self._programs.sizes[1] // 2)
            rest, taken = queue.take(slice(0, -parents)), queue.take(slice(-parents, None))
            children = self._bounded(bounder, self._children(bounder, taken), _STEPS, rounds)
            # Depth first, the easiest last.
            children = children.take(np.argsort(children.value, kind="stable"))
            queue = rest.followed_by(children)
            rounds += 1
        self._attacker.note(self.domains, len(queue), float(queue.value.min(initial=np.inf)))
        return queue

    def _leaves(self, bounder: Bounder, leaves: Queue) -> Queue:
        """Refutes domains with nothing left to split by linear programs; the ones that stay open.

        Then the search ends, with its `reason`, unless an optimum is unsafe.
        """
        optima: list[Solution] = []
        if not self._programs.all_split:
            leaves = self._bounded(bounder, leaves, _LEAF_STEPS)
        for most in MOST if len(leaves) else ():
            self._attacker.check_time()
            solved, optima = [], []
            for index in range(len(leaves)):
                leaf = leaves.take([index])
                solution = self._solved(bounder, leaf, most)
                solved.append(leaf if solution is None else at(leaf, solution))
                optima += [] if solution is None else [solution]
            self.domains += len(solved)
            batches = bounder.batches(functools.reduce(Queue.followed_by, solved))
            parts = [self._evaluated(bounder, part)[0] for part, *_ in batches]
            leaves = functools.reduce(Queue.followed_by, parts)
            if not len(leaves):
                break
        if not len(leaves):
            return leaves
        unsafe = sorted(optima, key=lambda solution: solution.value)[:_ATTACKED]
        if unsafe:
            points = np.stack([solution.point for solution in unsafe]).astype(np.float32)
            self._attacker.attack_from(np.resize(leaves.member, len(points)), points)
        # On a domain where the network is affine, a bound misses the optimum by rounding alone.
        inside = [solution.inside for solution in optima]
        exact = self._programs.all_split and bool(inside) and all(inside)
        what = "are undecided within the rounding of bounds" if exact else "cannot be split further"
        lack = -leaves.value.min()
        self.reason = f"{len(leaves)} domains {what}; their bounds lack up to {lack:.3g}"
        return leaves

    def _solved(self, bounder: Bounder, leaf: Queue, most: float) -> Solution | None:
        """What a solver proposes for one domain."""
        member, splits = int(leaf.member[0]), np.flatnonzero(leaf.signs[0])
        count = len(self._conjunctions[member].offset)
        repeated = leaf.take(np.zeros(count + len(splits), int))
        repeated.multipliers[:] = 0.0
        repeated.multipliers[np.arange(count, len(repeated)), splits] = 1.0
        rows = np.zeros((len(repeated), self._weights.shape[-1]), np.float32)
        rows[:count] = self._weights[member, :count]
        coefficients, bias, start = [], [], 0
        for part, fill, signs, parameters in bounder.batches(repeated):
            lines = bounder.lines(signs, rows[start : start + len(part)][fill], parameters)
            for list_of, array in zip((coefficients, bias), lines, strict=True):
                list_of.append(array[: len(part)])
            start += len(part)
        affine = Affine(np.concatenate(coefficients), np.concatenate(bias))
        affine.bias[:count] += self._offset[member, :count]
        parts = Affine(*(a[:count] for a in affine)), Affine(*(a[count:] for a in affine))
        lower, upper = (np.asarray(end, np.float64) for end in (self._lower, self._upper))
        if self._constraints is None:
            return solve(*parts, lower, upper, most)
        rows, splits = parts
        solution = solve(rows, self._constraints.after(splits), lower, upper, most)
        # The bounds find the multipliers of the constraints by themselves.
        of_splits = len(splits.bias)
        return solution and solution._replace(multipliers=solution.multipliers[:of_splits])

    def _root(self, known: Mapping[str, Interval]) -> tuple[Bounder, Queue]:
        """Bounds the whole box; queues the conjunctions that this leaves open."""
        total = sum(len(c.offset) for c in self._conjunctions)
        rows = Rows.of(self._conjunctions, 1 << max(0, total - 1).bit_length())
        root = self._programs.root(self._lower, self._upper, jnp.asarray(rows.single), known)
        lower, largest, outputs = map(np.asarray, (root.lower, root.largest, root.outputs))
        lost = lost_of(rows.errors, rows.offset, largest)
        inside = self._constraints is None or self._constraints.hold_at_middle(
            *(np.asarray(end)[None] for end in (self._lower, self._upper))
        )
        proved = proved_values(lower, rows.weights, rows.offset, outputs, lost, inside)
        np.maximum.at(self.margins, rows.member, proved)
        still_open = np.flatnonzero(~(self.margins > 0))
        kept = Root(
            self._programs.whole(root.intervals),
            np.asarray(root.positions),
            np.flatnonzero(root.active),
            np.flatnonzero(root.unstable),
        )
        with np.errstate(invalid="ignore"):
            value = np.where(np.isfinite(lower), lower + rows.offset - lost, -np.inf)
        mix = np.zeros((len(still_open), self._offset.shape[1]), np.float32)
        best = np.full(len(still_open), -np.inf)
        for index, member in enumerate(still_open):
            values = value[rows.member == member][: self._offset.shape[1]]
            mix[index, values.argmax()], best[index] = 1.0, values.max()
        count, units = len(still_open), len(kept.unstable)
        positions = kept.positions[kept.active].astype(np.float16)
        self._record_root(kept, positions, rows, proved > 0)
        conjunctions = Conjunctions(self._weights, self._offset, largest)
        bounder = Bounder(self._programs, self._box, kept, conjunctions, self._attacker.check_time)
        return bounder, Queue(
            member=still_open,
            signs=np.zeros((count, units), np.int8),
            positions=np.tile(positions, (count, 1)),
            multipliers=np.zeros((count, units), np.float32),
            mix=mix,
            value=best,
            candidates=np.zeros((count, 1), int),
            scores=np.zeros((count, 1)),
            node=self._roots[still_open],
        )

    def _record_root(
        self, root: Root, positions: np.ndarray, rows: Rows, positive: np.ndarray
    ) -> None:
        """Begins the record, with the conjunctions of the rows that are `positive`, bool `[R]`."""
        self.record.units = self._programs.units_of(root.unstable)
        self.record.free = self._programs.free_of(root.active)
        self.record.sizes = self._programs.sizes_of_ops
        self._roots = self.record.roots(len(self._conjunctions))
        for row in np.flatnonzero(positive):
            conjunction = int(rows.member[row])
            mix = rows.alone(int(row), self._offset.shape[1])
            leaf = Leaf(mix, positions, np.zeros(len(root.unstable), np.float32))
            self.record.prove(int(self._roots[conjunction]), conjunction, leaf)

    def _children(self, bounder: Bounder, parents: Queue) -> Queue:
        """Splits every domain at its best candidates; several at once while domains are few."""
        count, width = parents.candidates.shape
        usable = parents.scores >= 0
        levels = int(np.log2(max(1, self._programs.sizes[1] // 2 // count)))
        levels = max(1, min(_LEVELS, levels, int(usable.sum(axis=1).min())))
        order = np.tile(np.arange(width), (count, 1))
        if width > 1:
            # The bounds on both halves, with the parameters of the parent.
            halves = parents.take(np.repeat(np.arange(count), 2 * width))
            index = np.arange(len(halves))
            halves.signs[index, np.repeat(parents.candidates, 2)] = np.tile([1, -1], count * width)
            lower = bounder.probed(halves).reshape(count, width, 2)
            lower = np.where(usable[..., None] & ~np.isnan(lower), lower, -np.inf)
            with np.errstate(invalid="ignore"):
                quality = lower.min(axis=-1) + 0.1 * np.minimum(lower.max(axis=-1), 1.0)
            order = np.argsort(-quality, axis=1, kind="stable")
        signs = np.array([*itertools.product([1, -1], repeat=levels)], np.int8)
        children = parents.take(np.repeat(np.arange(count), len(signs)))
        index = np.arange(len(children))
        units = np.take_along_axis(parents.candidates, order[:, :levels], axis=1)
        for level in range(levels):
            unit = np.repeat(units[:, level], len(signs))
            children.signs[index, unit] = np.tile(signs[:, level], count)
        nodes = self.record.split_units(parents.node, units)
        return dataclasses.replace(children, node=nodes.reshape(-1))

    def _bounded(self, bounder: Bounder, queue: Queue, steps: int, rounds: int = 0) -> Queue:
        """Optimises the bounds of domains, looks at their worst inputs, returns the open ones."""
        self.domains += len(queue)
        parts, points, distances = [], [], []
        for part, proposed in bounder.optimized(queue, steps):
            part, where, distance = self._evaluated(bounder, part, proposed)
            parts.append(part)
            points.append(where)
            distances.append(distance)
        remaining = functools.reduce(Queue.followed_by, parts)
        if len(remaining) and rounds % _ATTACK_EVERY == 0:
            nearest = np.argsort(np.concatenate(distances), kind="stable")[:_ATTACKED]
            self._attacker.attack_from(remaining.member[nearest], np.concatenate(points)[nearest])
        return remaining

    def _evaluated(
        self, bounder: Bounder, part: Queue, proposed: np.ndarray | None = None
    ) -> tuple[Queue, np.ndarray, np.ndarray]:
        """The domains that their parameters leave open, worst inputs there, and how far from sat.

        A counterexample among the worst inputs ends the search. `proposed` are the bounds without
        rounding.
        """
        part, points, outputs = bounder.values(part, proposed)
        still_open = ~(part.value > 0.0)
        refuted = part.take(~still_open)
        self._record_leaves(refuted)
        # The weights of the mean sum to 1 up to their own rounding.
        total = refuted.mix.astype(np.float64).sum(axis=1) * (1.0 + FLOAT64)
        np.minimum.at(self._least, refuted.member, refuted.value / total)
        part, points, outputs = part.take(still_open), points[still_open], outputs[still_open]
        if not len(part):
            return part, points, np.zeros(0)
        return part, points, self._attacker.look_at(part.member, points, outputs)

    def _record_leaves(self, proved: Queue) -> None:
        for index, node in enumerate(proved.node.tolist()):
            arrays = proved.mix, proved.positions, proved.multipliers
            leaf = Leaf(*(array[index].copy() for array in arrays))
            self.record.prove(node, int(proved.member[index]), leaf)

    def proof(self) -> ProvedCase:
        """The trees, once every conjunction is refuted."""
        return ProvedCase(self.record, dict(enumerate(self._roots.tolist())))

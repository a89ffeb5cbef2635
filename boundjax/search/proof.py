"""What a search keeps so that its answer `unsat` can be proved again: trees with their leaves.

`boundjax.certification.trees` writes files of them, which `python -m boundjax.check_tree` proves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, Float32, Int32

from boundjax.properties import Property
from boundjax.sets.rounding import Rounding

LEAF = -1
MAX_BYTES = 2**30


class Leaf(NamedTuple):
    """The parameters of a positive bound on one part of a box.

    Attributes:
      mix: `[R]`, the weights of the rows of the conjunction.
      positions: of the free lines that matter, `[F]`; empty for CROWN's own.
      multipliers: of the units, `[U]`; empty without units.
    """

    mix: Float32[np.ndarray, " R"]
    positions: Float16[np.ndarray, " F"]
    multipliers: Float32[np.ndarray, " U"]

    @property
    def nbytes(self) -> int:
        """The memory of all arrays."""
        return sum(array.nbytes for array in self)


class Units(NamedTuple):
    """Elements of the operands of piecewise linear ops, in the order of their graph.

    Attributes:
      op: which of the ops with kinks.
      kink: which of the kinks of that op, or for free lines which of its lines; from 0.
      element: of the operand, in C order.
    """

    op: Int32[np.ndarray, " U"]
    kink: Int32[np.ndarray, " U"]
    element: Int32[np.ndarray, " U"]


NO_UNITS = Units(*np.zeros((3, 0), np.int32))


class Recorder:
    """The trees of one box as they grow. Every part of the box is a node, numbered as it comes.

    A node is cut at units, or at a number of an input, or it is a leaf of the conjunctions that are
    refuted there.

    Attributes:
      units, free: those that `split_units` and the positions of leaves refer to.
      sizes: how many elements each of the ops has that units number.
      off: whether nothing is recorded: nobody wants it, or more came than there is memory for.
    """

    def __init__(self, off: bool = False) -> None:
        """Starts without nodes."""
        self.units, self.free, self.off = NO_UNITS, NO_UNITS, off
        self.sizes: tuple[int, ...] = ()
        self._children: list[tuple[int, int] | None] = []
        # The number of a unit, or an input and the number at which it is cut.
        self._splits: list[int | tuple[int, float]] = []
        self._leaves: dict[tuple[int, int], Leaf] = {}
        self._bytes = 0

    def roots(self, count: int) -> np.ndarray:
        """New nodes that are no parts of others, `[count]`."""
        if self.off:
            return np.zeros(count, int)
        first = len(self._children)
        self._children += [None] * count
        self._splits += [LEAF] * count
        return np.arange(first, first + count)

    def split_units(self, nodes: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Cuts nodes `[N]` at units `[N, L]`, one after the other.

        Returns:
          The parts, `[N, 2 ** L]`, in the order of `itertools.product([1, -1], repeat=L)`.
        """
        parts = np.asarray(nodes)[:, None]
        for level in range(units.shape[1]):
            width = parts.shape[1]
            at = np.repeat(units[:, level], width).tolist()
            parts = self._split(parts.reshape(-1), at).reshape(-1, 2 * width)
        return parts

    def split_inputs(self, nodes: np.ndarray, inputs: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Cuts nodes `[N]` at numbers of inputs; the parts `[N, 2]`, the larger inputs first."""
        return self._split(nodes, list(zip(inputs.tolist(), at.tolist(), strict=True)))

    def _split(self, nodes: np.ndarray, splits: list[int] | list[tuple[int, float]]) -> np.ndarray:
        parts = self.roots(2 * len(nodes)).reshape(-1, 2)
        if self.off:
            return parts
        pairs = map(tuple, parts.tolist())
        for node, split, pair in zip(nodes.tolist(), splits, pairs, strict=True):
            self._splits[node], self._children[node] = split, pair
        return parts

    def prove(self, node: int, conjunction: int, leaf: Leaf) -> None:
        """Notes that a conjunction is refuted on a node."""
        if self.off:
            return
        self._leaves[node, conjunction] = leaf
        self._bytes += leaf.nbytes + 300
        if self._bytes > MAX_BYTES:
            self.off = True
            self._leaves.clear()

    def walk(self, root: int, conjunction: int) -> Iterator[int | tuple[int, float] | Leaf]:
        """The nodes below a root in preorder: splits, and leaves where the conjunction is refuted.

        Raises:
          LookupError: at a part on which it is not.
        """
        nodes = [root]
        while nodes:
            node = nodes.pop()
            leaf, children = self._leaves.get((node, conjunction)), self._children[node]
            if leaf is not None:
                yield leaf
                continue
            if children is None:
                raise LookupError(f"conjunction {conjunction} is not refuted on part {node}")
            yield self._splits[node]
            nodes += reversed(children)


class Case(NamedTuple):
    """The trees of one box.

    Attributes:
      recorder: their nodes.
      roots: the root of each conjunction, by its index.
    """

    recorder: Recorder
    roots: Mapping[int, int]


class Proof(NamedTuple):
    """Trees that refute every conjunction of a property.

    Attributes:
      property: what is proved.
      rounding: which arithmetic it holds for.
      cases: the trees of each of the property's cases.
    """

    property: Property
    rounding: Rounding
    cases: tuple[Case, ...]

"""Proofs of properties as files, which `python -m boundjax.check_tree` proves again."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from boundjax import check, check_onnx, check_tree
from boundjax.certification import export, files
from boundjax.search.proof import LEAF, Leaf, Proof, Units


def save_proof(path: str | os.PathLike[str], proof: Proof, network: str | os.PathLike[str]) -> None:
    """Writes the proof of a property as a file that `python -m boundjax.check_tree` proves again.

    Args:
      path: of the file, an npz without pickles; see `docs/certificates.md`.
      proof: the `proof` of a `Result`.
      network: the path of the network's file: an ONNX file, or what `export_weights` wrote (npz).
        The proof holds a hash of it.

    Raises:
      ValueError: for a network that the checker cannot read, or that is not the one that was
        searched, as far as its piecewise linear ops tell.
      OSError: if a file cannot be read or written.
    """
    read = check.read_weights if Path(network).suffix == ".npz" else _read_onnx
    nodes, identity = files.reading(read, Path(network))
    entries = _Entries([node for node in nodes if node.op == "ramp"], proof)
    claims = {
        "format": check_tree.FORM,
        "version": 1,
        "arithmetic": proof.rounding,
        "witness": "crown",
        "network": identity,
        "versions": files.versions_of(),
    }
    export.write(path, {**entries.arrays(), "json": export.encoded(claims)}, compressed=True)


def _read_onnx(path: Path) -> Any:
    return check_onnx.read_onnx(path, check.append)


class _Entries:
    """The arrays of a file, from the trees of a proof.

    The checker's network has a ramp for each piecewise linear op, in the same order.
    """

    def __init__(self, ramps: Sequence[Any], proof: Proof) -> None:
        self._ramps, self._proof = ramps, proof
        # The columns of units and of shares in the file, by ramp, kink and element.
        self._units: dict[tuple[int, int, int], int] = {}
        self._free: dict[tuple[int, int, int], int] = {}
        self._cuts: dict[tuple[int, float], int] = {}
        self._tree: list[int | tuple[int, float]] = []
        self._leaves: list[tuple[Leaf, np.ndarray, np.ndarray]] = []

    def arrays(self) -> dict[str, np.ndarray]:
        """All entries."""
        cases = self._proof.property.cases
        box: list[int] = []
        rows, offset, member = [], [], []
        for number, (case, proved) in enumerate(zip(cases, self._proof.cases, strict=True)):
            sizes = [ramp.size for ramp in self._ramps]
            if proved.recorder.sizes and list(proved.recorder.sizes) != sizes:
                raise ValueError(
                    f"the network has piecewise linear ops of {sizes} elements, the one that was "
                    f"searched {list(proved.recorder.sizes)}; give the file of the same network"
                )
            units = self._places(proved.recorder.units, lines=False)
            free = self._places(proved.recorder.free, lines=True)
            for index, conjunction in enumerate(case.conjunctions):
                trees = proved.recorder.walk(proved.roots[index], index)
                self._add(trees, len(conjunction.offset), units, free)
                member += [len(box)] * len(conjunction.offset)
                rows.append(conjunction.weights)
                offset.append(conjunction.offset)
                box.append(number)
        return {
            "lower": np.stack([case.lower for case in cases]),
            "upper": np.stack([case.upper for case in cases]),
            "weights": np.concatenate(rows),
            "offset": np.concatenate(offset),
            "member": np.array(member, np.int32),
            "box": np.array(box, np.int32),
            "tree": self._numbers(),
            "units": np.array(list(self._units), np.int32).reshape(-1, 3),
            "free": np.array(list(self._free), np.int32).reshape(-1, 3),
            "cuts": np.array([i for i, _ in self._cuts], np.int32),
            "cuts_at": np.array([at for _, at in self._cuts], np.float32),
            **self._parameters(),
        }

    def _places(self, units: Units, lines: bool) -> np.ndarray:
        """Ramp, kink and element of units or of free lines, `[U, 3]`; -1 for no ramp."""
        places = np.stack(units, axis=1).astype(np.int32)
        for op in np.unique(units.op[units.op >= 0]):
            of_op = np.flatnonzero(units.op == op)
            ramp, elements = self._ramps[op], units.element[of_op]
            low, high = (np.isfinite(end[elements]) for end in (ramp.low, ramp.high))
            # The line above, which turns about the upper kink, is the first of two.
            both = 1 - units.kink[of_op] if lines else units.kink[of_op]
            one = np.where(low, check_tree.LOW, check_tree.HIGH)
            places[of_op, 1] = np.where(low & high, both, one)
        return places

    def _add(self, nodes: Any, rows: int, units: np.ndarray, free: np.ndarray) -> None:
        """Appends the tree of one conjunction of some rows."""
        names = [tuple(place) for place in units.tolist()]
        for node in nodes:
            if isinstance(node, Leaf):
                # Searches repeat the last row of a conjunction to make up the longest one.
                mix = np.append(node.mix[: rows - 1], node.mix[rows - 1 :].sum())
                self._tree.append(LEAF)
                self._leaves.append((node._replace(mix=mix), units, free))
            elif isinstance(node, tuple):
                self._cuts.setdefault(node, len(self._cuts))
                self._tree.append(node)
            else:
                self._tree.append(self._units.setdefault(names[node], len(self._units)))
        for place in free.tolist():
            if place[0] >= 0:
                self._free.setdefault((place[0], place[1], place[2]), len(self._free))

    def _numbers(self) -> np.ndarray:
        """The nodes; cuts of inputs are numbered after the units."""
        count = len(self._units)
        numbers = [n if isinstance(n, int) else count + self._cuts[n] for n in self._tree]
        return np.array(numbers, np.int32)

    def _parameters(self) -> dict[str, np.ndarray]:
        """The arrays with a row for each leaf."""
        count = len(self._leaves)
        mix = np.zeros((count, max(len(leaf.mix) for leaf, _, _ in self._leaves)), np.float32)
        multipliers = np.zeros((count, len(self._units)), np.float32)
        shares = np.zeros((count, len(self._free)), np.float16)
        for row, (leaf, units, free) in enumerate(self._leaves):
            mix[row, : len(leaf.mix)] = np.maximum(leaf.mix, 0.0)
            for values, places, columns, array in (
                (leaf.multipliers, units, self._units, multipliers),
                (leaf.positions, free, self._free, shares),
            ):
                if len(values):
                    index = _columns(places, columns)
                    array[row, index[index >= 0]] = values[index >= 0]
        return {"mix": mix, "multipliers": np.maximum(multipliers, 0.0), "shares": shares}


def _columns(places: np.ndarray, columns: dict[tuple[int, int, int], int]) -> np.ndarray:
    """The column of every place, -1 where the file has none."""
    return np.array([columns.get(tuple(place), -1) for place in places.tolist()], int)

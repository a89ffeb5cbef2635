"""Proves a property of a network again from the tree of a branch and bound, with NumPy alone.

A tree covers a box by parts, and every leaf has the numbers from which a bound follows that no
input of its part is unsafe. Nothing in the file is trusted: any numbers give bounds that hold, and
the checker asks whether they suffice. It needs `check.py` beside it: run
`python -m boundjax.check_tree`, or this file by its path. `docs/certificates.md` has the format,
the assumptions and the exit statuses.
"""

import os
import sys

if not __package__ and os.path.dirname(os.path.abspath(__file__)) in sys.path[:1]:
    del sys.path[0]  # run by its path: modules beside this file would hide those of Python

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_FOLDER = os.path.dirname(os.path.abspath(__file__))
if __package__:
    from boundjax import check
else:
    sys.path.append(_FOLDER)
    check: Any = __import__("check")

Array = np.ndarray[Any, Any]
# The decisions on the way from the root to a leaf: numbers of splits, and 1 or -1 for the sides.
Path = tuple[tuple[int, int], ...]

FORM = "boundjax-tree"
CLAIMS = {"arithmetic", "witness", "network", "versions"}
# Entry of the file -> its kind of numbers and of axes.
ENTRIES = {"lower": "f2", "upper": "f2", "weights": "f2", "offset": "f1"}
ENTRIES |= {"box": "i1", "member": "i1", "tree": "i1"}
ENTRIES |= {"units": "i2", "cuts": "i1", "cuts_at": "f1", "free": "i2"}
ENTRIES |= {"mix": "f2", "multipliers": "f2", "shares": "f2"}
LEAF = -1
LOW, HIGH = 0, 1  # the two kinks of a ramp
# Weights and offsets are numbers of a property rounded to float64.
ROUNDED = 2.0**-50


def read_tree(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The claims and the arrays of a tree's file.

    Raises:
      ValueError: for a file of another format, or arrays that do not fit together.
    """
    arrays = check.read_arrays(path)
    claims = check.description(arrays, FORM, CLAIMS)
    fits = claims["arithmetic"] in ("nearest", "real", "float32")
    check.require(fits and claims["witness"] in check.WITNESSES, "unknown arithmetic or witness")
    check.require(set(arrays) == set(ENTRIES), f"expected the entries {', '.join(ENTRIES)}")
    a = arrays
    for name, value in arrays.items():
        kind, axes = ENTRIES[name]
        fits = value.dtype.kind == kind and value.ndim == int(axes) and np.isfinite(value).all()
        check.require(fits, f"{name}: expected finite numbers of kind {kind} with {axes} axes")
    count, rows, leaves = len(a["box"]), len(a["offset"]), int((a["tree"] == LEAF).sum())
    fits = a["lower"].shape == a["upper"].shape and (a["lower"] <= a["upper"]).all()
    check.require(fits and len(a["lower"]), "lower and upper must be the ends of boxes")
    fits = a["weights"].shape[:1] == a["member"].shape == (rows,) and rows > 0
    fits = fits and np.array_equal(np.unique(a["member"]), np.arange(count))
    fits = fits and np.isin(a["box"], np.arange(len(a["lower"]))).all()
    check.require(fits, "every row must belong to a conjunction, and every conjunction to a box")
    splits = len(a["units"]) + len(a["cuts"])
    fits = ((a["tree"] >= LEAF) & (a["tree"] < splits)).all() and a["cuts"].shape == (
        len(a["cuts_at"]),
    )
    fits = fits and np.isin(a["cuts"], np.arange(a["lower"].shape[1])).all()
    check.require(fits, "a split that is not in units or cuts")
    fits = a["units"].shape[1:] == a["free"].shape[1:] == (3,)
    check.require(fits, "units and free must be [., 3]: a ramp, one of its kinks, an element")
    for name, width in (("multipliers", len(a["units"])), ("shares", len(a["free"]))):
        check.require(a[name].shape == (leaves, width), f"{name} must be [{leaves}, {width}]")
    most = int(np.bincount(a["member"]).max())
    check.require(a["mix"].shape == (leaves, most), f"mix must be [{leaves}, {most}]")
    check.require((a["mix"] >= 0).all(), "mix must not be negative")
    check.require((a["multipliers"] >= 0).all(), "multipliers must not be negative")
    return claims, arrays


def leaves_of(tree: Array, conjunctions: int) -> Iterator[tuple[int, Path]]:
    """The conjunction and the path of every leaf, in the order of the file.

    A tree is its nodes in preorder: the number of a split, then the tree where it holds (side 1),
    then the tree of the other side (-1); or a leaf. So the leaves of a tree cover its box.

    Raises:
      ValueError: unless the nodes are as many trees.
    """
    nodes = iter(tree.tolist())
    for conjunction in range(conjunctions):
        open_paths: list[Path] = [()]
        while open_paths:
            path = open_paths.pop()
            split = next(nodes, None)
            if split is None:
                raise ValueError("the tree ends before all of its parts are covered")
            if split == LEAF:
                yield conjunction, path
            else:
                open_paths.append((*path, (split, -1)))
                open_paths.append((*path, (split, 1)))
    check.require(next(nodes, None) is None, "the tree goes on after all of its parts are covered")


class Splits:
    """The places that `units` and `free` of a file name, as nodes of the checker.

    Attributes:
      units: for every operand the numbers of the units, and their elements and points.
      free: for every ramp the numbers of the shares, their kinks and elements.
    """

    def __init__(self, nodes: Sequence[Any], arrays: Mapping[str, Array]) -> None:
        ramps = [k for k, node in enumerate(nodes) if node.op == "ramp"]
        self.units: dict[int, tuple[Array, Array, Array]] = {}
        self.free: dict[int, tuple[Array, Array, Array]] = {}
        for name in ("units", "free"):
            ramp, kink, element = arrays[name].astype(np.int64).T
            fits = np.isin(ramp, np.arange(len(ramps))).all() and np.isin(kink, (LOW, HIGH)).all()
            check.require(fits and (element >= 0).all(), f"{name}: there is no such ramp")
            for number, k in enumerate(ramps):
                columns = np.flatnonzero(ramp == number)
                kinks, elements, node = kink[columns], element[columns], nodes[k]
                check.require((elements < node.size).all(), f"{name}: there is no such element")
                if name == "free" and columns.size:
                    self.free[k] = columns, kinks, elements
                elif columns.size:
                    points = np.where(kinks == LOW, node.low[elements], node.high[elements])
                    check.require(np.isfinite(points).all(), "units: a ramp without that kink")
                    (i,) = node.inputs
                    nothing = np.zeros(0, int), np.zeros(0, int), np.zeros(0)
                    of_others = self.units.get(i, nothing)  # ramps of the same operand
                    self.units[i] = (
                        np.concatenate([of_others[0], columns]),
                        np.concatenate([of_others[1], elements]),
                        np.concatenate([of_others[2], points]),
                    )


class Leaves(check.Bounds):
    """Bounds on the parts of a box where some operands of ramps lie on one side of a kink.

    Everything else is that of the box, or of one box for each leaf. A split `s (z - p) >= 0` with a
    multiplier `b >= 0` gives `row >= row - b s (z - p)` on its part (beta-CROWN, Wang et al. 2021).

    Attributes:
      empty: bool `[N]`, whether nothing is left of the part.
    """

    def __init__(
        self, walk: Any, splits: Splits, signs: Array, multipliers: Array, shares: Array
    ) -> None:
        """Clamps the operands that are split, and draws the lines at the shares.

        Args:
          walk: the bounds on the box, or on a box of each of N leaves.
          splits: the places.
          signs: `[N, U]`: 1, -1, or 0 where a unit is not split.
          multipliers: `[N, U]`.
          shares: `[N, F]`, of the free lines.
        """
        self.__dict__.update(walk.__dict__)
        self.low, self.high = list(walk.low), list(walk.high)
        self.charge, self.lines = list(walk.charge), list(walk.lines)
        self.rule, self.empty = "shares", np.zeros(len(signs), bool)
        self.starts: dict[int, Array] = {}
        self.constant, self.lost = np.zeros((2, len(signs), 1))
        for i, units in splits.units.items():
            self.split(i, units, signs, -signs * multipliers.astype(np.float64))
        for k, node in enumerate(self.nodes):
            clamped = node.op not in check.LINEAR and any(i in splits.units for i in node.inputs)
            if clamped or k in splits.free:
                self.tie = self.shares_of(node)
                if k in splits.free:
                    numbers, kinks, elements = splits.free[k]
                    self.tie[kinks, :, elements] = shares[:, numbers].T
                values = self.nonlinear(node)
                self.charge[k], self.lines[k] = values[2], values[4]

    def split(self, i: int, units: tuple[Array, Array, Array], signs: Array, forces: Array) -> None:
        """Clamps the operand `i` on every part, and adds what the multipliers pull at it."""
        numbers, elements, points = units
        low, high = (np.tile(a[i], (len(signs) // len(a[i]), 1)) for a in (self.low, self.high))
        rows, gamma = np.zeros(low.shape), check.gamma(len(numbers) + 4)
        for number, element, point in zip(numbers, elements, points, strict=True):
            sign, force = signs[:, number], forces[:, number]
            floor, ceiling = np.where(sign > 0, point, -np.inf), np.where(sign < 0, point, np.inf)
            low[:, element] = np.maximum(low[:, element], floor)
            high[:, element] = np.minimum(high[:, element], ceiling)
            rows[:, element] += force
            size = np.abs(force) * (
                np.abs(point) + np.broadcast_to(self.reach[i], low.shape)[:, element]
            )
            self.constant[:, 0] -= force * point
            self.lost[:, 0] += 4 * gamma * size
        self.empty |= (low > high).any(axis=1)
        # Whatever lies between the ends of an empty part serves.
        self.low[i], self.high[i] = np.fmin(low, high), np.fmax(low, high)
        self.starts[i] = rows[:, None]

    def shares_of(self, node: Any) -> Array:
        """CROWN's shares `[2, N, size]`: 1 on the larger side of a kink, else 0."""
        low, high = (
            np.broadcast_to(a[node.inputs[0]], (len(self.empty), a[node.inputs[0]].shape[1]))
            for a in (self.low, self.high)
        )
        start = np.stack((low - node.low, node.high - high))
        end = np.stack((high - node.low, node.high - low))
        return (end > -start).astype(np.float64)

    def least_of(self, rows: Array) -> Array:
        """Lower bounds `[N]` on `<row, outputs>`, one row `[N, outputs]` for each part."""
        last = len(self.nodes) - 1
        bound = self.bound(last, rows[:, None], starts=self.starts) + self.constant
        return (bound - self.lost - 4 * check.UNIT * np.abs(bound))[:, 0]


class Tree:
    """The claims of a file about one network.

    Attributes:
      arrays: of the file.
      nodes: of the network.
      leaves: the conjunction and the path of every leaf.
    """

    def __init__(
        self, claims: Mapping[str, Any], arrays: dict[str, Array], nodes: list[Any]
    ) -> None:
        """Checks that the claims are about a network of this size.

        Raises:
          ValueError: if they are not.
        """
        self.arrays, self.nodes, self.witness = arrays, nodes, claims["witness"]
        self.unit = 2.0**-24 * (claims["arithmetic"] == "float32")
        fits = arrays["lower"].shape[1] == nodes[0].size
        fits = fits and arrays["weights"].shape[1] == nodes[-1].size
        check.require(fits, "it is about other numbers of inputs or outputs")
        self.splits = Splits(nodes, arrays)
        self.leaves = list(leaves_of(arrays["tree"], len(arrays["box"])))
        # The leaves are proved in batches whose largest arrays have `check.BLOCK` elements.
        work = max(max(node.work for node in nodes), len(arrays["units"]), len(arrays["free"]))
        self.step = max(1, check.BLOCK // work)

    def proved(self) -> Array:
        """Whether each leaf is proved, bool `[L]`.

        Rounding may have decided on which side of a tie a slope fell, so that several are tried.
        """
        box = self.arrays["box"][[conjunction for conjunction, _ in self.leaves]]
        proved = np.zeros(len(self.leaves), bool)
        for tie, number in itertools.product(check.TIES, np.unique(box)):
            left = np.flatnonzero((box == number) & ~proved)
            walk = None
            if left.size and not len(self.arrays["cuts"]):
                lower, upper = (self.arrays[name][[number]] for name in ("lower", "upper"))
                walk = self.walk(lower, upper, tie)
            for start in range(0, len(left), self.step):
                part = left[start : start + self.step]
                proved[part] = self.proved_part(part, walk, tie)
        return proved

    def walk(self, lower: Array, upper: Array, tie: Any) -> Any:
        """The bounds on boxes `[N, n]`."""
        low, high = lower.astype(np.float64), upper.astype(np.float64)
        sets = low, np.zeros_like(low), low, high, math.inf
        return check.Bounds(self.nodes, sets, self.witness, self.unit, tie)

    def proved_part(self, part: Array, walk: Any, tie: Any) -> Array:
        """Whether each of the leaves `[N]` is proved; `walk` is None if inputs are cut."""
        a, units = self.arrays, len(self.arrays["units"])
        signs = np.zeros((len(part), units), np.int8)
        box = a["box"][[self.leaves[leaf][0] for leaf in part]]
        lower, upper = (a[name][box].astype(np.float64) for name in ("lower", "upper"))
        for n, leaf in enumerate(part):
            for split, side in self.leaves[leaf][1]:
                if split < units:
                    # A unit that is split again keeps its first side, which only enlarges the part.
                    signs[n, split] = signs[n, split] or side
                else:
                    at, i = a["cuts_at"][split - units], a["cuts"][split - units]
                    ends = (np.maximum, lower) if side > 0 else (np.minimum, upper)
                    ends[1][n, i] = ends[0](ends[1][n, i], at)
        nothing = (lower > upper).any(axis=1)
        if walk is None:
            walk = self.walk(lower, np.maximum(lower, upper), tie)
        shares = a["shares"][part].astype(np.float64)
        bounds = Leaves(walk, self.splits, signs, a["multipliers"][part], shares)
        member = np.array([self.leaves[leaf][0] for leaf in part])
        rows, offset, lost = self.means(member, a["mix"][part], walk.reach[-1])
        # The bounds on a box hold on its parts.
        flat = walk.bound(len(self.nodes) - 1, rows[:, None], True)[:, 0]
        least = np.fmax(bounds.least_of(rows), flat)
        with np.errstate(invalid="ignore"):
            value = least + offset
            value = value - lost - 4 * check.UNIT * np.abs(value)
        return (value > 0) | bounds.empty | nothing

    def means(self, member: Array, mix: Array, reach: Array) -> tuple[Array, Array, Array]:
        """The sums `[N, outputs]` of the rows of conjunctions with the weights `mix`, `[N, R]`.

        If each of the rows can be at most 0 at once, so can a sum with weights of at least 0.

        Returns:
          Rows, their offsets `[N]`, and what their rounding may change, `[N]`.
        """
        rows = np.zeros((len(member), self.nodes[-1].size))
        offset, sizes, offsets = np.zeros(len(member)), np.zeros_like(rows), np.zeros(len(member))
        for conjunction in np.unique(member):
            of_it = member == conjunction
            index = np.flatnonzero(self.arrays["member"] == conjunction)
            weights = self.arrays["weights"][index].astype(np.float64)
            constants = self.arrays["offset"][index].astype(np.float64)
            shares = mix[of_it, : len(index)].astype(np.float64)
            rows[of_it], sizes[of_it] = shares @ weights, shares @ np.abs(weights)
            offset[of_it], offsets[of_it] = shares @ constants, shares @ np.abs(constants)
        share = 2 * check.gamma(mix.shape[1]) + ROUNDED
        lost = share * ((sizes * reach).sum(axis=1) + offsets)
        return rows, offset, lost


def check_tree(options: argparse.Namespace) -> int:
    """Checks a tree and prints what is proved; returns the exit status."""
    claims, arrays = read_tree(options.file)
    sys.path.append(_FOLDER)
    onnx = options.onnx and __import__("check_onnx").read_onnx(options.onnx, check.append)
    nodes, network = onnx or check.read_weights(options.weights)
    check.require(claims["network"] == network, "it is about another network")
    if options.vnnlib:
        require_property(arrays, options.vnnlib)
    tree = Tree(claims, arrays, nodes)
    proved = tree.proved()
    for leaf in np.flatnonzero(~proved):
        conjunction, path = tree.leaves[leaf]
        print(f"leaf {leaf} of conjunction {conjunction}, {len(path)} splits deep: not proved")
    of = "float32 programs" if tree.unit else "real numbers"
    print(
        f"{'unsat' if proved.all() else 'open'}, for {of}: {proved.sum()} of {len(proved)} leaves "
        f"proved, for {len(arrays['box'])} conjunctions on {len(arrays['lower'])} boxes"
    )
    return 0 if proved.all() else 1


def require_property(arrays: Mapping[str, Array], path: str) -> None:
    """Checks that the tree is about the property of a VNN-LIB file, as boundjax reads it.

    Raises:
      ValueError: if it is not.
    """
    from boundjax import vnnlib

    cases = vnnlib.load(path).cases
    fits = len(cases) == len(arrays["lower"])
    conjunction = 0
    for number, case in enumerate(cases if fits else ()):
        fits = fits and (arrays["lower"][number] <= case.lower).all()
        fits = fits and (case.upper <= arrays["upper"][number]).all()
        for rows in case.conjunctions:
            index = np.flatnonzero(arrays["member"] == conjunction)
            fits = (
                fits and conjunction < len(arrays["box"]) and arrays["box"][conjunction] == number
            )
            fits = fits and np.array_equal(arrays["weights"][index], rows.weights)
            fits = fits and np.array_equal(arrays["offset"][index], rows.offset)
            conjunction += 1
    check.require(fits and conjunction == len(arrays["box"]), "it is about another property")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m boundjax.check_tree`; returns the exit status."""
    parser = argparse.ArgumentParser(
        "boundjax.check_tree", description="Proves a property again from a tree."
    )
    parser.add_argument("file", help="the tree")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--weights", help="the network, by boundjax.export_weights")
    network.add_argument("--onnx", help="the network, an ONNX file")
    parser.add_argument("--vnnlib", help="the property that the tree must be about")
    options = parser.parse_args(arguments)
    try:
        with np.errstate(all="ignore"):
            return check_tree(options)
    except Exception as error:  # whatever an untrusted file may provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        print(f"cannot check {options.file}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

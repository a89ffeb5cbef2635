"""Plots how branch and bound decides a property: the bound over time, and the tree of its proof.

    python -m experiments.plots.search --onnx NET.onnx --vnnlib PROP.vnnlib --out search.png

Left: the least lower bound of the open domains and how many there are, without compilation: the
property is decided twice. Right: the parts into which the box is split, a row for each level, in
the largest tree; leaves are proved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from boundjax import vnnlib
from boundjax.search import Leaf, Result, verify
from boundjax.verify.network import Network
from experiments.plots import figure
from experiments.settings.errors import ExperimentError


class Shape(NamedTuple):
    """Where the nodes of a tree are drawn.

    Attributes:
      lines: for every split, the places `(x, level)` of itself and of its two parts.
      leaves: the places of leaves.
    """

    lines: list[tuple[tuple[float, int], ...]]
    leaves: list[tuple[float, int]]


def shape_of(nodes: Sequence[Any]) -> Shape:
    """Places a tree in preorder, as `Recorder.walk` gives it; leaves are 1 apart."""
    shape = Shape([], [])
    position = iter(nodes)

    def place(level: int) -> tuple[float, int]:
        if isinstance(next(position), Leaf):
            shape.leaves.append((float(len(shape.leaves)), level))
            return shape.leaves[-1]
        parts = place(level + 1), place(level + 1)
        middle = (0.5 * (parts[0][0] + parts[1][0]), level)
        shape.lines.append((middle, *parts))
        return middle

    place(0)
    return shape


def plot_search(result: Result, path: Path) -> None:
    """Writes the figure.

    Raises:
      ExperimentError: if the property was not decided by splits of units, or not proved.
    """
    if not result.rounds or result.proof is None:
        raise ExperimentError(
            f"the answer is {result.verdict!r} after {len(result.rounds)} rounds; the figure needs "
            "a property that is proved by splits of units"
        )
    canvas, axes = figure.create(11, 3.6, 1, 2)
    left, right = axes[0]
    finite = [r for r in result.rounds if np.isfinite(r.least)]
    seconds = [r.seconds for r in finite]
    left.plot(seconds, [r.least for r in finite], "o-", markersize=3, color="C0")
    left.axhline(0.0, color="0.5", linestyle=":")
    left.set(xlabel="seconds", title=f"{result.rounds[-1].domains} domains")
    left.set_ylabel("least lower bound", color="C0")
    counts: Any = left.twinx()
    counts.step(
        [r.seconds for r in result.rounds],
        [r.still_open for r in result.rounds],
        where="post",
        color="C1",
    )
    counts.set_ylabel("open domains", color="C1")
    case = result.proof.cases[0]
    trees = [shape_of(list(case.recorder.walk(case.roots[c], c))) for c in case.roots]
    deepest = max(trees, key=lambda tree: len(tree.leaves))
    for split, *parts in deepest.lines:
        for part in parts:
            right.plot([split[0], part[0]], [split[1], part[1]], color="0.4", linewidth=0.6)
    right.plot(*np.array(deepest.leaves).T, ".", color="C2", markersize=3)
    right.invert_yaxis()
    right.set(xlabel=f"{len(deepest.leaves)} leaves", ylabel="splits", xticks=[])
    right.yaxis.get_major_locator().set_params(integer=True)
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--onnx", type=Path, required=True, help="the network")
        parser.add_argument("--vnnlib", type=Path, required=True, help="the property")
        parser.add_argument("--timeout", type=float, default=60.0, help="seconds (60)")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        try:
            network = Network(flags.onnx)
            property = vnnlib.load(flags.vnnlib)
            # The first run mostly compiles, so the second one is drawn.
            results = [
                verify(
                    network.model.single,
                    property,
                    method="complete",
                    timeout=flags.timeout,
                    evaluate=network.evaluate,
                    programs=network.programs,
                    with_proof=True,
                )
                for _ in range(2)
            ]
        except (OSError, ValueError) as error:
            raise ExperimentError(str(error)) from None
        plot_search(results[-1], out)

    figure.command("search", __doc__, arguments, draw, add_flags, of_runs=False)


if __name__ == "__main__":
    main()

"""Plots certified losses and errors along curves between two networks.

    python -m experiments.plots.connectivity runs/crown-ibp-interval --out curve.png

Each folder, which `experiments.connect` has finished, is a row of the figure (Lee et al. 2021,
"Loss Landscape Matters", Figures 11 to 13). Solid lines are the trained curve and dashed ones the
straight segment; the band is twice the spread of the loss over batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogFormatter

from experiments.plots import figure
from experiments.records.connection import LOSSES, PATHS, Connection, read
from experiments.settings.config import NORMS

_STYLES = dict(zip(PATHS, ("-", "--"), strict=True))
# Losses whose largest is more than this times the least have a log scale.
_WIDE = 4.0
_COLOURS = dict(zip(LOSSES, ("C0", "C3", "C2"), strict=True))


def plot_connectivity(connections: Sequence[Connection], path: Path) -> None:
    """Writes the figure: per curve a row with the losses, standard and verified error over t."""
    canvas, rows = figure.create(11, 0.4 + 2.9 * len(connections), len(connections), 3)
    for axes, connection in zip(rows, connections, strict=True):
        _draw(axes, connection)
    figure.legend(canvas, rows[0][0])
    canvas.savefig(path)


def _draw(axes: Any, connection: Connection) -> None:
    losses, standard, verified = axes
    for name in PATHS:
        points, style = connection.points[name], _STYLES[name]
        t = np.array([point["t"] for point in points])
        for loss in LOSSES:
            mean, spread = (
                np.array([point[loss][key] for point in points]) for key in ("loss", "spread")
            )
            colour = _COLOURS[loss]
            losses.plot(t, mean, style, color=colour, label=f"{loss}, {name}")
            if name == PATHS[0]:
                band = mean - 2 * spread, mean + 2 * spread
                losses.fill_between(t, *band, color=colour, alpha=0.2, linewidth=0)
            errors = [100 * point[loss]["verified_error"] for point in points]
            verified.plot(t, errors, style, color=colour)
        errors = [100 * point["standard_error"] for point in points]
        standard.plot(t, errors, style, color="k")
    result = connection.result
    radius = f"{NORMS[result['norm']].label} eps {result['eps']:.4g}"
    losses.set_title(_caption(result), fontsize=9, loc="left")
    losses.set(ylabel=f"certified loss at {radius}")
    every = [point for name in PATHS for point in connection.points[name]]
    values = [point[loss]["loss"] for point in every for loss in LOSSES]
    if min(values) > 0 and max(values) > _WIDE * min(values):
        losses.set_yscale("log")
        formatter = LogFormatter(minor_thresholds=(2, 0.5))
        losses.yaxis.set_major_formatter(formatter)
        losses.yaxis.set_minor_formatter(formatter)
    standard.set(ylabel="standard error [%]")
    verified.set(ylabel="verified error [%]")
    first, last = result["methods"]
    for each in axes:
        each.set(xlim=(0, 1), xlabel=f"t, from {first} to {last}")


def _caption(result: dict[str, Any]) -> str:
    trained_on = result["trained_on"]
    verdict = "barrier" if result["barriers"]["curve"][trained_on]["exists"] else "no barrier"
    return f"{result['data']}, {result['model']}, curve on the {trained_on} loss: {verdict}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_connectivity([read(folder) for folder in flags.runs], out)

    figure.command("connectivity", __doc__, arguments, draw)


if __name__ == "__main__":
    main()

"""Plots certified losses and errors along curves between two networks.

    python -m experiments.plots.connectivity --curve runs/crown-ibp-interval --out curve.png

`--curve` names one or more folders that `experiments.connect` has finished; each is a row of the
figure (Lee et al. 2021, "Loss Landscape Matters", Figures 11 to 13). Solid lines are the trained
curve and dashed ones the straight segment; the band is twice the spread of the loss over batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from experiments.records.connection import LOSSES, PATHS, Connection, read
from experiments.settings.config import NORMS
from experiments.settings.errors import ExperimentError, fail

_STYLES = dict(zip(PATHS, ("-", "--"), strict=True))
# Losses whose largest is more than this times the least have a log scale.
_WIDE = 4.0
_COLOURS = dict(zip(LOSSES, ("C0", "C3", "C2"), strict=True))


def plot_connectivity(connections: Sequence[Connection], path: Path) -> None:
    """Writes the figure: per curve a row with the losses, standard and verified error over t."""
    figure = Figure(figsize=(12, 0.4 + 3.2 * len(connections)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    rows = figure.subplots(len(connections), 3, squeeze=False)
    for axes, connection in zip(rows, connections, strict=True):
        _draw(axes, connection)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    figure.savefig(path)


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
        each.grid(alpha=0.3)


def _caption(result: dict[str, Any]) -> str:
    trained_on = result["trained_on"]
    verdict = "barrier" if result["barriers"]["curve"][trained_on]["exists"] else "no barrier"
    return f"{result['data']}, {result['model']}, curve on the {trained_on} loss: {verdict}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plots.connectivity",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--curve", nargs="+", type=Path, required=True, help="finished curves")
    parser.add_argument(
        "--out", type=Path, help="the PNG file (default: connectivity.png in the first folder)"
    )
    flags = parser.parse_args(arguments)
    try:
        out = flags.out or flags.curve[0] / "connectivity.png"
        if out.suffix != ".png" or not out.parent.is_dir():
            raise ExperimentError(f"--out={out}: must be a PNG file in an existing folder")
        plot_connectivity([read(folder) for folder in flags.curve], out)
    except ExperimentError as error:
        fail(error)
    print(f"figure: {out}")


if __name__ == "__main__":
    main()

"""Plots the states of the ReLUs of every layer of runs, or the slopes of the unstable ones.

    python -m experiments.plots.relus RUN RUN --out relus.png
    python -m experiments.plots.relus RUN RUN --kind=slopes --out slopes.png

`--kind=states` stacks active, unstable and dead ReLUs over epochs, one row per run and one column
per layer (Lee et al. 2021, "Loss Landscape Matters", Figures 14 and 15; Figures C.6 and C.7 of
Lee's thesis). `--kind=slopes` shows how `u / (u - l)` is distributed among unstable ReLUs, every
epoch by itself (Figure 16; C.8). The runs need the diagnostics `relus`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plots import figure, records

_STATES = (("active", "C2"), ("unstable", "C1"), ("dead", "C3"))


def plot_relus(runs: Sequence[records.RunRecords], path: Path, kind: str = "states") -> None:
    """Writes the figure; `kind` is `"states"` or `"slopes"`.

    Raises:
      ExperimentError: if a run lacks the records.
    """
    panel = KINDS[kind]
    labels = [list(records.need(run, "relus")[0]["relus"]["states"]) for run in runs]
    columns = max(map(len, labels))
    canvas, axes = figure.create(
        2.3 * columns + 1.6, 1.9 * len(runs) + 0.4, len(runs), columns, sharex=True, sharey=True
    )
    for index, (row, run, layers) in enumerate(zip(axes, runs, labels, strict=True)):
        for each, layer in zip(row, layers, strict=False):
            panel(each, run, layer)
            records.mark_ramp(each, [run])
            each.grid(visible=False)
            if index == 0:
                each.set_title(layer, fontsize=9)
        for each in row[len(layers) :]:
            each.set_axis_off()
        unit = "ReLUs [%]" if kind == "states" else "slope u / (u - l)"
        row[0].set_ylabel(f"{run.name}\n{unit}", fontsize=8)
    for each in axes[-1]:
        each.set_xlabel("epoch")
        each.xaxis.get_major_locator().set_params(integer=True)
    if kind == "states":
        figure.legend(canvas, axes[0, 0])
    else:
        canvas.colorbar(axes[0, 0].collections[0], ax=axes, label="relative frequency")
    canvas.savefig(path)


def _draw_states(axes: Any, run: records.RunRecords, layer: str) -> None:
    curves = [records.series(run, "relus", "states", layer, name) for name, _ in _STATES]
    names, colours = zip(*_STATES, strict=True)
    percent = 100 * np.array([values for _, values in curves])
    axes.stackplot(curves[0][0], percent, labels=names, colors=colours, alpha=0.8)
    axes.set(ylim=(0, 100), xlim=(curves[0][0][0], curves[0][0][-1]))


def _draw_slopes(axes: Any, run: records.RunRecords, layer: str) -> None:
    epochs, counts = records.series(run, "relus", "slopes", layer)
    heights = np.array(counts, dtype=float)  # [lines, bins]
    most = heights.max(axis=1, keepdims=True)
    shares = np.divide(heights, most, out=np.zeros_like(heights), where=most > 0)
    edges = np.linspace(0.0, 1.0, shares.shape[1] + 1)
    middles = 0.5 * (edges[1:] + edges[:-1])
    axes.pcolormesh(epochs, middles, shares.T, cmap="viridis", vmin=0, vmax=1, shading="nearest")
    axes.set(ylim=(0, 1))


KINDS: dict[str, Callable[[Any, records.RunRecords, str], None]] = {
    "states": _draw_states,
    "slopes": _draw_slopes,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--kind", choices=tuple(KINDS), default="states")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_relus([records.read(run) for run in flags.runs], out, flags.kind)

    figure.command("relus", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

"""Plots the loss of runs over epochs with its variation along the update as a band.

    python -m experiments.plots.learning_curve RUN RUN --out learning_curve.png
    python -m experiments.plots.learning_curve RUN RUN --radius=target --epochs 8 12

The line is the loss on the batch of a step; the band spans the losses from there up to five times
its update (Lee et al. 2021, "Loss Landscape Matters", Figures 1, 7 and 8; 9 with `--radius=target`;
Figures 3.6, 3.8, C.1, C.2 and C.12 of Lee's thesis). A narrow band is a smooth landscape. Dotted
lines mark where the radius begins and ends to grow. The runs need the diagnostics `landscape`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import figure, records
from experiments.settings.errors import ExperimentError


def plot_learning_curve(
    runs: Sequence[records.RunRecords],
    path: Path,
    radius: str = "scheduled",
    epochs: tuple[float, float] | None = None,
) -> None:
    """Writes the figure; the upper half has all lines together, the lower one a band per method.

    Args:
      runs: records with the group `landscape`.
      path: the PNG file.
      radius: a key of `records.RADII`.
      epochs: the first and the last epoch to show, or None for all.

    Raises:
      ExperimentError: if a run lacks the records, or has none in `epochs`.
    """
    group = records.RADII[radius]
    names = list(dict.fromkeys(run.name for run in runs))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    canvas, axes = figure.create(
        2.9 * columns + 1.4, 2.4 * rows, rows, columns, sharex=True, sharey=True
    )
    palette = figure.colours(names)
    for run in runs:
        each = axes.flat[names.index(run.name)]
        lines = [
            line
            for line in records.need(run, group)
            if epochs is None or epochs[0] <= line["step"] / run.steps_per_epoch <= epochs[1]
        ]
        lines = [line for line in lines if None not in line[group]["losses"]]
        if not lines:
            raise ExperimentError(f"{run.path} has recorded no finite loss in these epochs")
        at = [line["step"] / run.steps_per_epoch for line in lines]
        losses = [line[group]["losses"] for line in lines]
        least, most = [min(values) for values in losses], [max(values) for values in losses]
        colour = palette[run.name]
        each.fill_between(at, least, most, color=colour, alpha=0.25, linewidth=0)
        each.plot(at, [values[0] for values in losses], color=colour, linewidth=1)
        each.set_title(run.name, fontsize=9)
        records.mark_ramp(each, runs)
    for each in axes.flat[len(names) :]:
        each.set_axis_off()
    for each in axes[:, 0]:
        each.set_ylabel(f"loss, {radius} radius")
    for each in axes.flat[max(0, len(names) - columns) : len(names)]:  # nothing is drawn below
        each.set_xlabel("epoch")
        each.tick_params(labelbottom=True)
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        records.add_radius(parser)
        parser.add_argument("--epochs", nargs=2, type=float, help="the first and last epoch shown")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        runs = [records.read(run) for run in flags.runs]
        plot_learning_curve(runs, out, flags.radius, flags.epochs)

    figure.command("learning_curve", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

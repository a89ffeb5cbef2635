"""Plots the ReLUs and the two losses of short warm-up over epochs of runs, trained on them or not.

    python -m experiments.plots.warmup RUN RUN --out warmup.png

Panels: active and unstable ReLUs, `L_tightness` and `L_relu` (Shi et al. 2021, "Fast Certified
Robust Training with Short Warmup", Figures 2, 3 and 4). The runs need the diagnostics `relus`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import figure, records

_RATIOS = (("active_relus", "active ReLUs [%]"), ("unstable_relus", "unstable ReLUs [%]"))
_LOSSES = (("tightness", "$L_{tightness}$"), ("relu_balance", "$L_{relu}$"))


def plot_warmup(runs: Sequence[records.RunRecords], path: Path) -> None:
    """Writes the figure.

    Raises:
      ExperimentError: if a run lacks the records.
    """
    canvas, axes = figure.create(11, 5.0, 2, 2, sharex=True)
    for each, (key, label) in zip(axes[0], _RATIOS, strict=True):
        curves = [records.over_epochs(run, key) for run in runs]
        percent = [(epochs, [100 * value for value in values]) for epochs, values in curves]
        records.draw_series(each, runs, percent, marker=".")
        each.set(ylabel=label, ylim=(0, None))
    for each, (key, label) in zip(axes[1], _LOSSES, strict=True):
        records.draw_series(each, runs, [records.series(run, "relus", key) for run in runs])
        each.set(ylabel=label, xlabel="epoch", ylim=(0, None))
    for each in axes.flat:
        records.mark_ramp(each, runs)
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_warmup([records.read(run) for run in flags.runs], out)

    figure.command("warmup", __doc__, arguments, draw)


if __name__ == "__main__":
    main()

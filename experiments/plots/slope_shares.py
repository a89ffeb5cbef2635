"""Plots which slopes the lower lines of unstable ReLUs have in runs, over epochs.

    python -m experiments.plots.slope_shares RUN RUN --out slope_shares.png

The shares of the slopes 0, between 0 and 1, and 1 (Lee et al. 2021, "Loss Landscape Matters",
Figure 5; Figure 3.11 of Lee's thesis). The runs need the diagnostics `relaxation`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.plots import figure, records

_SHARES = (
    ("zero", "slope 0", "0.85"),
    ("between", "between", "tab:purple"),
    ("one", "slope 1", "gold"),
)


def plot_slope_shares(runs: Sequence[records.RunRecords], path: Path) -> None:
    """Writes the figure, with one panel per run.

    Raises:
      ExperimentError: if a run lacks the records.
    """
    canvas, axes = figure.create(2.6 * len(runs) + 1.2, 2.8, 1, len(runs), sharey=True)
    for each, run in zip(axes[0], runs, strict=True):
        curves = [records.series(run, "relaxation", "slopes", key) for key, _, _ in _SHARES]
        epochs = curves[0][0]
        shares = 100 * np.array([values for _, values in curves])
        labels, colours = [item[1] for item in _SHARES], [item[2] for item in _SHARES]
        each.stackplot(epochs, shares, labels=labels, colors=colours)
        each.set_title(run.name, fontsize=9)
        each.set(xlabel="epoch", ylim=(0, 100), xlim=(epochs[0], epochs[-1]))
        each.xaxis.get_major_locator().set_params(integer=True)
        each.grid(visible=False)
        records.mark_ramp(each, [run])
    axes[0, 0].set_ylabel("unstable ReLUs [%]")
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_slope_shares([records.read(run) for run in flags.runs], out)

    figure.command("slope_shares", __doc__, arguments, draw)


if __name__ == "__main__":
    main()

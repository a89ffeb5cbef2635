"""Plots how far the gradients of the draws of random networks point the same way, over epochs.

    python -m experiments.plots.diversity RUN RUN --out diversity.png

Panels: the mean resultant length rho and GradDiv's measures R_mean, R_DPP and R_kappa (GradDiv, Lee
et al. 2022; Figures 2.3, A.1, A.3 and A.4 of Lee's thesis). Lower is more diverse; bold lines are
running medians over 9 batches. The runs need the diagnostics `gradients`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import figure, records

_PANELS = (
    ("rho", r"$\rho$", "linear"),
    ("mean", "$R_{mean}$", "linear"),
    # -log det of the Gram matrix is 0 for orthogonal gradients.
    ("dpp", "$R_{DPP}$", "linear"),
    # Without a bound for gradients that are alike.
    ("kappa", r"$R_{\kappa}$", "log"),
)


def plot_diversity(runs: Sequence[records.RunRecords], path: Path) -> None:
    """Writes the figure.

    Raises:
      ExperimentError: if a run lacks the records.
    """
    canvas, axes = figure.create(11, 5.0, 2, 2, sharex=True)
    for each, (key, label, scale) in zip(axes.flat, _PANELS, strict=True):
        records.draw_noisy(each, runs, [records.series(run, "gradients", key) for run in runs])
        each.set(ylabel=label, yscale=scale)
        records.mark_ramp(each, runs)
    for each in axes[-1]:
        each.set_xlabel("epoch")
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_diversity([records.read(run) for run in flags.runs], out)

    figure.command("diversity", __doc__, arguments, draw)


if __name__ == "__main__":
    main()

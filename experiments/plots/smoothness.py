"""Plots how much the loss and its gradient change along the updates of runs, over epochs.

    python -m experiments.plots.smoothness RUN RUN --out smoothness.png
    python -m experiments.plots.smoothness RUN RUN --radius=target

Panels: the variation of the loss along the update, the l2 distance and the cosine distance of the
gradients before and after it, and the fraction of unstable ReLUs (Lee et al. 2021, "Loss Landscape
Matters", Figures 2, 3, 10, 18 and 19; Figures 3.7, 3.8, 3.9, C.10 and C.11 of Lee's thesis).
Lower is smoother; bold lines are running medians over 9 batches. The runs need the diagnostics
`landscape`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import figure, records

_PANELS = (
    ("variation", "loss variation"),
    ("gradient_difference", "gradient difference, $\\ell_2$"),
    ("cosine_distance", "gradients' cosine distance"),
)


def plot_smoothness(
    runs: Sequence[records.RunRecords], path: Path, radius: str = "scheduled"
) -> None:
    """Writes the figure; `radius` is a key of `records.RADII`.

    Raises:
      ExperimentError: if a run lacks the records.
    """
    canvas, axes = figure.create(11, 5.4, 2, 2, sharex=True)
    for each, (key, label) in zip(axes.flat, _PANELS, strict=False):
        group = records.RADII[radius]
        records.draw_noisy(each, runs, [records.series(run, group, key) for run in runs])
        each.set(ylabel=label, yscale="log")
    unstable = axes[1, 1]
    curves = [records.over_epochs(run, "unstable_relus") for run in runs]
    percent = [(epochs, [100 * value for value in values]) for epochs, values in curves]
    records.draw_series(unstable, runs, percent, marker=".")
    unstable.set(ylabel="unstable ReLUs [%]", ylim=(0, None))
    for each in axes.flat:
        records.mark_ramp(each, runs)
    for each in axes[-1]:
        each.set_xlabel("epoch")
    canvas.suptitle(f"along the update, at the {radius} radius", fontsize=10)
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_smoothness([records.read(run) for run in flags.runs], out, flags.radius)

    figure.command("smoothness", __doc__, arguments, draw, records.add_radius)


if __name__ == "__main__":
    main()

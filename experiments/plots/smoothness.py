"""Plots how much the loss and its gradient change along the updates of runs, over epochs.

    python -m experiments.plots.smoothness RUN RUN --out smoothness.png
    python -m experiments.plots.smoothness RUN RUN --radius=target

Panels: the variation of the loss along the update, the l2 distance and the cosine distance of the
gradients before and after it, and the fraction of unstable ReLUs (Lee et al. 2021, "Loss Landscape
Matters", Figures 2, 3, 10, 18 and 19; Figures 3.7, 3.8, 3.9, C.10 and C.11 of Lee's thesis).
Lower is smoother; bold lines are running medians over 9 batches. The command prints the means over
both halves of the ramp. The runs need the diagnostics `landscape`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import figure, records
from experiments.settings.errors import ExperimentError

_PANELS = (
    ("variation", "loss variation"),
    ("gradient_difference", "gradient difference, $\\ell_2$"),
    ("cosine_distance", "gradients' cosine distance"),
)


def ramp_means(
    run: records.RunRecords, radius: str = "scheduled", half: int = 2
) -> dict[str, float]:
    """Returns the means over the first or second half of the ramp, and the number of lines.

    With the diagnostics `relaxation`, `nonzero` is the mean share of the slopes of unstable ReLUs
    that are not 0.

    Raises:
      ExperimentError: if the run has no records there.
    """
    begin, end = run.ramp
    middle = 0.5 * (begin + end)
    first, last = (begin, middle) if half == 1 else (middle, end)

    def mean(group: str, *keys: str | int) -> tuple[int, float]:
        points = zip(*records.series(run, group, *keys), strict=True)
        values = [value for epoch, value in points if first <= epoch <= last]
        if not values:
            raise ExperimentError(f"{run.path} has recorded nothing in epochs {first} to {last}")
        return len(values), statistics.fmean(values)

    group = records.RADII[radius]
    count, loss = mean(group, "losses", 0)
    summary: dict[str, float] = {"lines": count, "loss": loss}
    summary |= {key: mean(group, key)[1] for key, _ in _PANELS}
    if any("relaxation" in line for line in run.landscape):
        summary["nonzero"] = 1.0 - mean("relaxation", "slopes", "zero")[1]
    return summary


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
        runs = [records.read(run) for run in flags.runs]
        plot_smoothness(runs, out, flags.radius)
        for half, run in itertools.product((1, 2), runs):
            means = ramp_means(run, flags.radius, half)
            text = ", ".join(f"{key} {value:.4g}" for key, value in means.items())
            print(f"half {half} of the ramp, {run.name}, seed {run.config.seed}: {text}")

    figure.command("smoothness", __doc__, arguments, draw, records.add_radius)


if __name__ == "__main__":
    main()

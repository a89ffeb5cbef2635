"""Plots robust accuracy over standard accuracy of runs, such as those of a sweep.

    python -m experiments.plots.trade_off RUN RUN RUN --out trade_off.png

Every finished run is a vertical line from its verified accuracy to its PGD accuracy (Figure B.4 of
Lee's thesis). Runs of one method have one colour; settings are not printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.evaluation import trained
from experiments.plots import figure, records
from experiments.records.folder import Records
from experiments.settings.errors import ExperimentError


class Accuracies(NamedTuple):
    """The accuracies of one run, in percent, and how it was tested."""

    name: str
    standard: float
    pgd: float
    verified: float
    tested: str


def read(run: Path) -> Accuracies:
    """Reads the accuracies of the reported network of a run.

    Raises:
      ExperimentError: if the run has not finished, or its summary is damaged.
    """
    config = trained.single_config(run)
    with Records(run, config) as folder:
        summary = folder.finished_summary()
    errors = next(iter(summary["results"].values()))
    keys = ("standard_error", "pgd_error", "verified_error")
    standard, pgd, verified = (100 * (1 - errors[key]) for key in keys)
    tested = f"{summary['data']}, {config.robust.norm_label} eps {summary['eps_test']:.4g}"
    return Accuracies(records.method_name(config), standard, pgd, verified, tested)


def plot_trade_off(runs: Sequence[Accuracies], path: Path) -> None:
    """Writes the figure.

    Raises:
      ExperimentError: if the runs were not tested on the same data at the same radius.
    """
    tests = sorted({run.tested for run in runs})
    if len(tests) > 1:
        raise ExperimentError(f"the runs must have one test, got {' and '.join(tests)}")
    canvas, axes = figure.create(6.4, 4.0)
    each = axes[0, 0]
    palette = figure.colours([run.name for run in runs])
    for run in runs:
        colour, x = palette[run.name], (run.standard, run.standard)
        each.plot(x, (run.verified, run.pgd), color=colour, linewidth=1.5)
        each.plot(x[:1], [run.verified], "o", color=colour, markersize=5, label=run.name)
        each.plot(x[:1], [run.pgd], "_", color=colour, markersize=8)
    each.set(xlabel="standard accuracy [%]", ylabel="verified (dot) to PGD accuracy [%]")
    each.set_title(tests[0], fontsize=9)
    figure.legend(canvas, each)
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_trade_off([read(run) for run in flags.runs], out)

    figure.command("trade_off", __doc__, arguments, draw)


if __name__ == "__main__":
    main()

"""Plots the spectral norms of the layers of l2 runs over epochs.

    python -m experiments.plots.norms RUN RUN --out norms.png

Panels: the logarithm of the product of all norms, its difference to the first run (the logarithm of
the ratio of Lipschitz constants), and the norms of each layer (Figures B.1 and B.2 of Lee's
thesis). The runs need the diagnostics `norms`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import figure, records

_PRODUCT = "log_product"


def plot_norms(runs: Sequence[records.RunRecords], path: Path) -> None:
    """Writes the figure.

    Raises:
      ExperimentError: if a run lacks the records.
    """
    canvas, axes = figure.create(4.0 * (2 + len(runs)), 3.4, 1, 2 + len(runs), sharex=True)
    product, ratio, *layers = axes[0]
    products = [records.series(run, "norms", _PRODUCT) for run in runs]
    records.draw_series(product, runs, products)
    product.set(ylabel="log product of norms", xlabel="epoch")
    first = dict(zip(*products[0], strict=True))
    ratios = []
    for epochs, values in products:
        both = [(at, v - first[at]) for at, v in zip(epochs, values, strict=True) if at in first]
        ratios.append(([at for at, _ in both], [value for _, value in both]))
    records.draw_series(ratio, runs, ratios)
    ratio.set(ylabel=f"log ratio to {runs[0].name}", xlabel="epoch")
    for each, run in zip(layers, runs, strict=True):
        labels = [label for label in records.need(run, "norms")[0]["norms"] if label != _PRODUCT]
        for index, label in enumerate(labels):
            each.plot(*records.series(run, "norms", label), label=label, color=f"C{index % 10}")
        each.set(title=run.name, ylabel="norm", xlabel="epoch", yscale="log")
    for each in axes.flat:
        records.mark_ramp(each, runs)
    figure.legend(canvas, product, *layers)
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_norms([records.read(run) for run in flags.runs], out)

    figure.command("norms", __doc__, arguments, draw)


if __name__ == "__main__":
    main()

"""Plots `curves.png`: errors, losses and schedules of one run over its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_ERRORS = (
    ("standard_error", "standard, training batches", "C0", "--"),
    ("verified_error", "verified at the current radius, training batches", "C3", "--"),
    ("validation_standard_error", "standard, validation", "C0", "-"),
    ("validation_verified_error", "verified at eps_test, validation", "C3", "-"),
)
_LOSSES = (
    ("natural_loss", "natural", "C0"),
    ("robust_loss", "robust", "C3"),
    ("loss", "trained", "k"),
)
_RELUS = (("active_relus", "active", "C2"), ("unstable_relus", "unstable", "C1"))
_RELUS += (("dead_relus", "dead", "C7"),)
_SCHEDULES = (("eps", "C2"), ("kappa", "C4"), ("beta", "C1"))


def plot_curves(records: Sequence[dict[str, Any]], title: str, path: Path, norm: str) -> None:
    """Writes the figure of the records of `metrics.jsonl`, one per epoch; radii are in `norm`."""
    figure = Figure(figsize=(14, 3.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    errors, losses, schedules, relus = figure.subplots(1, 4)
    figure.suptitle(title, fontsize=11)

    for key, label, colour, style in _ERRORS:
        _draw(errors, records, key, label, scale=100.0, color=colour, linestyle=style)
    errors.set(xlabel="epoch", ylabel="error [%]", ylim=(0, None))
    for key, label, colour in _LOSSES:
        _draw(losses, records, key, label, color=colour)
    losses.set(xlabel="epoch", ylabel="loss (mean over the epoch)", yscale="log")
    for key, colour in _SCHEDULES:
        _draw(schedules, records, key, key, color=colour)
    top = 1.05 * max([1.0, *(record["eps"] for record in records)])  # l2 radii exceed 1
    schedules.set(
        xlabel="epoch", ylabel=f"{norm} radius (pixels in [0, 1]); weights", ylim=(-0.05 * top, top)
    )
    for key, label, colour in _RELUS:
        _draw(relus, records, key, label, scale=100.0, color=colour)
    relus.set(xlabel="epoch", ylabel="ReLUs at the current radius [%]", ylim=(0, 100))
    relus.set_xlim(errors.get_xlim())
    if not relus.lines:
        text = "no interval bounds in training"
        relus.text(0.5, 0.5, text, ha="center", fontsize=8, transform=relus.transAxes)
    for axes in (errors, losses, schedules):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, handlelength=3, loc="best")
    relus.grid(alpha=0.3)
    if relus.lines:
        relus.legend(fontsize=7)
    figure.savefig(path)


def _draw(axes: Any, records: Sequence[dict[str, Any]], key: str, label: str, scale=1.0, **style):
    points = [(record["epoch"], scale * record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=".", markersize=4, **style)

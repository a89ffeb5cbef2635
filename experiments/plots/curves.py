"""Plots `curves.png`: errors, losses and schedules of one run over its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.plots import figure

_ERRORS = (
    ("standard_error", "standard, training", "C0", "--"),
    ("verified_error", "verified at eps, training", "C3", "--"),
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
_COEFFICIENTS = (("kappa", "C4"), ("beta", "C1"))


def plot_curves(records: Sequence[dict[str, Any]], title: str, path: Path, norm: str) -> None:
    """Writes the figure of the records of `metrics.jsonl`, one per epoch; radii are in `norm`."""
    canvas, axes = figure.create(14, 4.4, 1, 4)
    errors, losses, schedules, relus = axes[0]
    canvas.suptitle(title, fontsize=11)

    for key, label, colour, style in _ERRORS:
        _draw(errors, records, key, label, scale=100.0, color=colour, linestyle=style)
    errors.set(xlabel="epoch", ylabel="error [%]", ylim=(0, None))
    for key, label, colour in _LOSSES:
        _draw(losses, records, key, label, color=colour)
    losses.set(xlabel="epoch", ylabel="loss (mean over the epoch)", yscale="log")
    radius = _draw_schedules(schedules, records, norm)
    for key, label, colour in _RELUS:
        _draw(relus, records, key, label, scale=100.0, color=colour)
    relus.set(xlabel="epoch", ylabel="ReLUs at the current radius [%]", ylim=(0, 100))
    relus.set_xlim(errors.get_xlim())
    if not relus.lines:
        text = "no interval bounds in training"
        relus.text(0.5, 0.5, text, ha="center", fontsize=8, transform=relus.transAxes)
    for each in (errors, losses, relus):
        _legend(each, *each.get_legend_handles_labels())
    handles = [*radius.lines, *schedules.lines]
    _legend(schedules, handles, [handle.get_label() for handle in handles])
    canvas.savefig(path)


def _draw_schedules(axes: Any, records: Sequence[dict[str, Any]], norm: str) -> Any:
    """Draws the weights, and the radius on an axis of its own, which it returns."""
    for key, colour in _COEFFICIENTS:
        _draw(axes, records, key, key, color=colour)
    axes.set(xlabel="epoch", ylabel="kappa, beta", ylim=(-0.05, 1.05))
    radius = axes.twinx()
    _draw(radius, records, "eps", "eps", color="C2")
    top = 1.05 * max(record["eps"] for record in records) or 1.0
    radius.set_ylim(-0.05 * top, top)
    radius.set_ylabel(f"{norm} eps, pixels in [0, 1]", color="C2")
    radius.tick_params(axis="y", colors="C2")
    return radius


def _legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Puts the legend below the axes, where it hides no curve."""
    if handles:
        axes.legend(handles, labels, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw(axes: Any, records: Sequence[dict[str, Any]], key: str, label: str, scale=1.0, **style):
    points = [(record["epoch"], scale * record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=".", markersize=4, **style)

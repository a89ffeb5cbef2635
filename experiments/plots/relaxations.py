"""Draws the linear relaxations of a ReLU that the methods use.

    python -m experiments.plots.relaxations --out relaxations.png

Each panel shows the lines that `bj.linear` puts around a ReLU whose input lies in `[l, u]`: CAP,
CROWN-IBP, a slope between 0 and 1 as one step finds them, and IBP on an unstable and on an active
ReLU (Lee et al. 2021, "Loss Landscape Matters", Figure 6; Figure 3.5 of Lee's thesis; Figure 1 of
"Improved Training of Certifiably Robust Models" without its exact set).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from experiments.plots import figure


class Panel(NamedTuple):
    """One relaxation: bounds on the input, and the policy of the lower slope."""

    title: str
    lower: float
    upper: float
    slopes: Any


PANELS = (
    Panel("CAP: parallel", -1.0, 1.5, "parallel"),
    Panel("CROWN-IBP, u > -l", -1.0, 1.5, "adaptive"),
    Panel("CROWN-IBP, u < -l", -1.5, 1.0, "adaptive"),
    Panel("one step: slope 0.35", -1.0, 1.5, lambda lower, upper: jnp.full_like(lower, 0.35)),
    Panel("IBP, unstable", -1.0, 1.5, "constant"),
    Panel("IBP, active", 0.5, 2.0, "constant"),
)


def lines(panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Returns slope and intercept of the lower and of the upper line, as the library computes them.

    Returns:
      Two arrays `[2]`: the lower and the upper line `slope x + intercept`.
    """
    box = bj.Box(jnp.array([panel.lower]), jnp.array([panel.upper]))
    bounds = bj.linear(jax.nn.relu, slopes=panel.slopes, has_aux=True)
    arrays = [np.ravel(leaf) for leaf in jax.tree.leaves(bounds(box)[1].coefficients)]
    slope_below, below, slope_above, above = arrays
    return np.concatenate([slope_below, below]), np.concatenate([slope_above, above])


def plot_relaxations(path: Path) -> None:
    """Writes the figure."""
    canvas, axes = figure.create(9.6, 5.2, 2, 3, sharey=True)
    for each, panel in zip(axes.flat, PANELS, strict=True):
        lower, upper = lines(panel)
        inside = np.linspace(panel.lower, panel.upper, 101)
        around = np.linspace(-2.2, 2.4, 101)
        below, above = np.polyval(lower, inside), np.polyval(upper, inside)
        each.fill_between(inside, below, above, color="C0", alpha=0.2, linewidth=0)
        each.plot(inside, above, color="C3", label="upper line")
        each.plot(inside, below, color="C0", label="lower line")
        each.plot(around, np.maximum(around, 0.0), color="k", linewidth=1, label="ReLU")
        for x in (panel.lower, panel.upper):
            each.axvline(x, color="0.6", linestyle=":", linewidth=1)
        each.set_xticks([panel.lower, 0.0, panel.upper], ["l", "0", "u"])
        each.set_title(panel.title, fontsize=9)
        each.set_ylim(-1.2, 2.4)
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        plot_relaxations(out)

    figure.command("relaxations", __doc__, arguments, draw, of_runs=False)


if __name__ == "__main__":
    main()

"""Plots the verified error of trained networks over the radius.

    python -m experiments.plots.verified_error RUN RUN --count=1000 --out verified_error.png

The radius of every image is found by bisection with the bounds of its run's evaluation
(`bj.certified_radius`), the largest of them counts, so the error never falls with the radius
(Figures 3.4 and B.3 of Lee's thesis). Dotted lines are the radii of the tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import boundjax as bj
from experiments.evaluation import measure
from experiments.plots import figure, margins, records


class Radii(NamedTuple):
    """The certified radii `[N]` of a network's test images; 0 where nothing is certified.

    Attributes:
      name: of the network.
      radii: ascending.
      clean: the fraction of images that are misclassified.
      tested: the radius of the run's test.
    """

    name: str
    radii: np.ndarray
    clean: float
    tested: float


def radii_of(network: margins.Network, farthest: float = 1.5) -> Radii:
    """Certifies images up to `farthest` times the radius of their run's test.

    Raises:
      ExperimentError: for an unknown method in the run's evaluation.
    """
    evaluation, data, threat = network.config.evaluation, network.data, network.threat
    measure.check_methods(evaluation.methods)
    eps = float(np.asarray(threat.eps))
    best = np.zeros(len(data))
    for method in measure.cheapest_first(evaluation.methods):
        radii = bj.certified_radius(
            network.pure,
            data.images,
            labels=data.labels,
            norm=threat.norm,
            clip=threat.clip,
            method=measure.METHODS[method],
            rounding=None if evaluation.rounding == "auto" else evaluation.rounding,
            eps_max=farthest * eps,
        )
        best = np.maximum(best, radii)
    logits = network.pure.apply(network.pure.variables, jnp.asarray(data.images))
    wrong = float(np.mean(np.argmax(np.asarray(logits), axis=-1) != data.labels))
    return Radii(records.method_name(network.config), np.sort(best), wrong, eps)


def error_at(radii: Radii, eps: np.ndarray) -> np.ndarray:
    """Returns the verified error at radii `[K]`: the fraction of images certified up to less.

    At radius 0 it is the standard error.
    """
    below = np.searchsorted(radii.radii, eps, side="left") / len(radii.radii)
    # An image whose radius the bisection could not tell from 0 is certified at 0.
    return np.where(eps > 0, np.maximum(below, radii.clean), radii.clean)


def plot_verified_error(runs: Sequence[Radii], path: Path, norm: str, farthest: float) -> None:
    """Writes the figure; `norm` is the printed name of the norm."""
    canvas, axes = figure.create(6.4, 3.8)
    each = axes[0, 0]
    palette = figure.colours([run.name for run in runs])
    for run in runs:
        eps = np.linspace(0.0, farthest * run.tested, 201)
        errors = 100 * error_at(run, eps)
        each.plot(eps, errors, color=palette[run.name], label=run.name)
        each.axvline(run.tested, color="0.5", linestyle=":", linewidth=1)
    each.set(xlabel=f"{norm} eps, pixels in [0, 1]", ylabel="verified error [%]")
    each.set(xlim=(0, None), ylim=(0, 101))
    figure.legend(canvas, each)
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        figure.add_count(parser, default=1000)
        parser.add_argument(
            "--farthest", type=float, default=1.5, help="the largest radius, in radii of the test"
        )

    def draw(flags: argparse.Namespace, out: Path) -> None:
        networks = [margins.load(run, flags.count) for run in flags.runs]
        label = margins.common_norm(networks)
        runs = [radii_of(network, flags.farthest) for network in networks]
        plot_verified_error(runs, out, label, flags.farthest)

    figure.command("verified_error", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

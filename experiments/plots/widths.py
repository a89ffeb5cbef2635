"""Plots the mean width of interval bounds before every nonlinear op, at initialisation and trained.

    python -m experiments.plots.widths RUN RUN --out widths.png

One line per initialisation of the network of the first run, and one per trained network, on its
test images at its training radius (Shi et al. 2021, "Fast Certified Robust Training with Short
Warmup", Figure 1). Widths that grow from layer to layer make long warm-ups necessary.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from boundjax.diagnostics import mean_widths
from experiments import models
from experiments.data import Images
from experiments.plots import figure, margins, records
from experiments.settings.config import Init


class Widths(NamedTuple):
    """Mean widths before the nonlinear ops of a network, by their labels in order."""

    name: str
    widths: dict[str, float]


def widths_of(network: bj.PureModel, data: Images, threat: bj.Threat, name: str = "") -> Widths:
    """Computes the mean widths over images.

    Args:
      network: the network to bound.
      data: images with pixels in `[0, 1]`.
      threat: the set around every image.
      name: of the line.
    """
    order: list[str] = []

    def of_example(function, ball, label, key) -> dict[str, jax.Array]:
        bounds = bj.interval(function, has_aux=True)(ball)[1]
        order[:] = bounds  # `jit` sorts the entries of a dict
        return mean_widths(bounds)

    measured = margins.over_images(network, threat, of_example, margins.BATCH_SIZE)
    widths = measured(network.variables, data)
    return Widths(name, {label: float(np.mean(widths[label])) for label in order})


def initial(network: margins.Network, init: Init) -> bj.PureModel:
    """Returns the network of a run with new initial weights."""
    config = dataclasses.replace(network.config.model, init=init)
    model = models.from_config(config)
    key = jax.random.key(network.config.seed)
    return bj.PureModel.of((model, model.init(key, jnp.asarray(network.data.images[:1]))))


def plot_widths(lines: Sequence[Widths], path: Path) -> None:
    """Writes the figure."""
    canvas, axes = figure.create(6.4, 3.8)
    each = axes[0, 0]
    for index, line in enumerate(lines):
        style = "o--" if line.name.startswith("initial") else "o-"
        places = range(1, len(line.widths) + 1)
        each.plot(places, list(line.widths.values()), style, color=f"C{index}", label=line.name)
    each.set(xlabel="layer", ylabel="mean width of its bounds", yscale="log")
    each.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(canvas, each)
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def draw(flags: argparse.Namespace, out: Path) -> None:
        networks = [margins.load(run, flags.count) for run in flags.runs]
        first, lines = networks[0], []
        for init in get_args(Init):
            threat = first.threat.within(first.config.robust.eps_train)
            name = f"initial, {init}"
            lines.append(widths_of(initial(first, init), first.data, threat, name))
        for network in networks:
            threat = network.threat.within(network.config.robust.eps_train)
            name = f"trained, {records.method_name(network.config)}"
            lines.append(widths_of(network.pure, network.data, threat, name))
        plot_widths(lines, out)

    def add_flags(parser: argparse.ArgumentParser) -> None:
        figure.add_count(parser, default=100)

    figure.command("widths", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

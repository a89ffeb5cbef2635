"""Plots the gradients and the robustness of random networks, by chapter 2 of Lee's thesis.

    python -m experiments.plots.gradients RUN RUN --kind=plane --out gradients.png
    python -m experiments.plots.gradients RUN RUN --kind=accuracy --draws=20 --count=200

`--kind`, with the figures of the thesis (GradDiv, Lee et al. 2022):

    plane         gradients of draws on the plane of their means (2.1, 2.4)
    cosines       cosines between the gradients of draws, at the first image (2.9)
    concentration density of kappa over the images (2.6)
    increase      density of the loss increase under EOT-PGD (2.5)
    accuracy      accuracy under EOT-PGD over eps, with 5 and with --draws draws (2.7, A.2, A.5)
    transfer      accuracy of every draw on the attacks on every other (2.8)
    rotated       PGD with gradients that are rotated by an angle (2.2)

Radius, norm and clipping are those of the first run's test.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.plots import figure, margins, records
from experiments.plots import random_gradients as measured


class Network(NamedTuple):
    """A named sample, and the numbers of draws and of steps of attacks."""

    name: str
    sample: measured.Sample
    draws: int
    steps: int


Panels = Callable[[Sequence[Network], Path], None]


def of_run(run: Path, count: int, draws: int, steps: int) -> Network:
    """Loads the network of a run and its first `count` test images.

    Raises:
      ExperimentError: if the folder holds no network or its data is missing.
    """
    network = margins.load(run, count)
    sample = measured.Sample(
        functools.partial(network.pure.apply, network.pure.variables),
        jnp.asarray(network.data.images),
        jnp.asarray(network.data.labels),
        network.threat,
        jax.random.key(network.config.seed),
    )
    return Network(records.method_name(network.config), sample, draws, steps)


def _plane(networks: Sequence[Network], path: Path) -> None:
    canvas, axes = figure.create(5.6, 4.4)
    each = axes[0, 0]
    plane = measured.on_the_plane([n.sample for n in networks], networks[0].draws)
    circle = np.linspace(0, 2 * np.pi, 201)
    each.plot(np.cos(circle), np.sin(circle), color="0.7", linewidth=0.8)
    for index, network in enumerate(networks):
        colour, points, mean = f"C{index}", plane.points[index], plane.means[index]
        each.scatter(points[:, 0], points[:, 1], s=8, color=colour, alpha=0.5)
        label = f"{network.name}, rho {plane.rho[index]:.3f}"
        each.plot([0, mean[0]], [0, mean[1]], color=colour, linewidth=2, label=label)
    each.set(aspect="equal", xlabel="first mean", ylabel="orthogonal")
    figure.legend(canvas, each)
    canvas.savefig(path)


def _matrices(values: Sequence[np.ndarray], names: Sequence[str], label: str, path: Path) -> None:
    canvas, axes = figure.create(4.0 * len(values) + 0.8, 3.8, 1, len(values))
    lowest = min(0.0, *(float(np.min(value)) for value in values))
    for each, value, name in zip(axes[0], values, names, strict=True):
        image = each.imshow(value, vmin=lowest, vmax=1.0, cmap="viridis")
        off = value[~np.eye(len(value), dtype=bool)]
        each.set_title(f"{name}, mean off the diagonal {np.mean(off):.3f}", fontsize=8)
        each.grid(visible=False)
        each.set(xlabel="draw", ylabel="draw")
    canvas.colorbar(image, ax=axes, label=label)
    canvas.savefig(path)


def _cosines(networks: Sequence[Network], path: Path) -> None:
    firsts = [n.sample._replace(x=n.sample.x[:1], labels=n.sample.labels[:1]) for n in networks]
    values = [
        measured.cosines(sample, network.draws)[0]
        for sample, network in zip(firsts, networks, strict=True)
    ]
    _matrices(values, [n.name for n in networks], "cosine", path)


def _transfer(networks: Sequence[Network], path: Path) -> None:
    values = [measured.transfers(n.sample, n.draws, n.steps) for n in networks]
    _matrices(values, [n.name for n in networks], "accuracy", path)


def _density(
    values: Sequence[np.ndarray], networks: Sequence[Network], label: str, path: Path, scale: str
) -> None:
    canvas, axes = figure.create(6.4, 3.6)
    each, everything = axes[0, 0], np.concatenate(values)
    if scale == "log":
        bins = np.geomspace(max(everything.min(), 1e-6), max(everything.max(), 2e-6), 41)
    else:
        bins = np.linspace(everything.min(), everything.max() + 1e-6, 41)
    for index, (value, network) in enumerate(zip(values, networks, strict=True)):
        text = f"{network.name}, median {np.median(value):.3g}"
        each.hist(value, bins, histtype="stepfilled", alpha=0.4, color=f"C{index}", label=text)
    each.set(xlabel=label, ylabel="images", xscale=scale)
    figure.legend(canvas, each)
    canvas.savefig(path)


def _increase(networks: Sequence[Network], path: Path) -> None:
    values = [measured.loss_increases(n.sample, n.draws, n.steps) for n in networks]
    _density(values, networks, "loss increase under EOT-PGD", path, "linear")


def _concentration(networks: Sequence[Network], path: Path) -> None:
    values = [measured.concentrations(n.sample, n.draws) for n in networks]
    _density(values, networks, "kappa", path, "log")


def _accuracy(networks: Sequence[Network], path: Path) -> None:
    canvas, axes = figure.create(6.8, 3.8)
    each = axes[0, 0]
    farthest = 4 / 3 * float(np.asarray(networks[0].sample.threat.eps))
    radii = np.linspace(0.0, farthest, 7).tolist()
    for index, network in enumerate(networks):
        for draws, style in dict.fromkeys([(5, "--"), (network.draws, "-")]):
            values = measured.accuracies(network.sample, radii, draws, network.steps)
            label = f"{network.name}, n = {draws}"
            percent = [100 * value for value in values]
            each.plot(radii, percent, "o" + style, color=f"C{index}", markersize=3, label=label)
    each.set(xlabel="eps", ylabel="accuracy under EOT-PGD [%]", ylim=(0, 101))
    figure.legend(canvas, each)
    canvas.savefig(path)


def _rotated(networks: Sequence[Network], path: Path) -> None:
    canvas, axes = figure.create(4.4 * len(networks) + 0.6, 3.6, 1, len(networks))
    angles = np.linspace(0, 90, 10).tolist()
    for each, network in zip(axes[0], networks, strict=True):
        proxy = measured.proxy_attacks(network.sample, angles, network.draws, network.steps)
        each.plot(angles, proxy.increases, "o-", color="C3", markersize=3)
        first = proxy.increases[0]
        cosine = first * np.cos(np.deg2rad(angles))
        each.plot(angles, cosine, ":", color="C3", label="cosine")
        each.set(title=network.name, xlabel="angle [degrees]")
        each.set_ylabel("loss increase", color="C3")
        right: Any = each.twinx()
        right.plot(angles, [100 * value for value in proxy.accuracies], "s-", markersize=3)
        right.set_ylabel("accuracy [%]", color="C0")
        right.set_ylim(0, 101)
        each.legend(fontsize=8)
    canvas.savefig(path)


KINDS: dict[str, Panels] = {
    "plane": _plane,
    "cosines": _cosines,
    "concentration": _concentration,
    "increase": _increase,
    "accuracy": _accuracy,
    "transfer": _transfer,
    "rotated": _rotated,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        figure.add_count(parser, default=100)
        parser.add_argument("--kind", choices=tuple(KINDS), required=True)
        for flag, default, text in (
            ("--draws", 20, "of every network"),
            ("--steps", 20, "of the attacks"),
        ):
            read = figure.positive(flag)
            parser.add_argument(flag, type=read, default=default, help=f"{text} ({default})")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        networks = [of_run(run, flags.count, flags.draws, flags.steps) for run in flags.runs]
        KINDS[flags.kind](networks, out)

    figure.command("gradients", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

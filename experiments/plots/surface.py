"""Plots the certified loss around the weights of trained networks, over two random directions.

    python -m experiments.plots.surface RUN RUN --loss=crown-ibp --out surface.png

Each run is a surface: the mean robust cross-entropy of test images at the run's test radius, at
`weights + a d + b e`. The directions d and e are drawn at random with the norm of the weights, unit
by unit (Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets"), and are the same for all
networks of one shape. All surfaces have one scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import cm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import boundjax as bj
from boundjax.training import robust_cross_entropy
from experiments.data import Images
from experiments.plots import figure, margins


class Surface(NamedTuple):
    """The loss around one network: `losses[i, j]` at `weights + at[i] d + at[j] e`."""

    title: str
    at: np.ndarray  # [P]
    losses: np.ndarray  # [P, P]


def directions(params: Any, key: jax.Array) -> Any:
    """Draws a direction: every unit's weights have the norm that they have in `params`.

    Biases and the scales of batch normalisation stay as they are, as in Li et al. 2018.

    Args:
      params: a pytree of arrays; the last axis of a kernel is that of its units.
      key: the PRNG key.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def draw(leaf: jax.Array, key: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        noise = jax.random.normal(key, leaf.shape, leaf.dtype)
        axes = tuple(range(leaf.ndim - 1))
        norms = [jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (leaf, noise)]
        return noise * (norms[0] / norms[1])

    return jax.tree.unflatten(structure, list(map(draw, leaves, keys)))


def surface_of(
    network: bj.PureModel,
    data: Images,
    threat: bj.Threat,
    loss: str,
    *,
    points: int = 15,
    reach: float = 0.1,
    seed: int = 0,
    title: str = "",
) -> Surface:
    """Measures the loss on a grid of `points` times `points`.

    Args:
      network: the network; its variables have the collection `params`.
      data: images with pixels in `[0, 1]`, and their labels.
      threat: radius, norm and clipping.
      loss: a key of `margins.LOSSES`.
      points: positions along each direction, odd so that the weights are among them.
      reach: the largest multiple of a direction.
      seed: of the directions.
      title: of the network.
    """
    lower = margins.LOSSES[loss]

    def of_example(*arguments: Any) -> jax.Array:
        return robust_cross_entropy(lower(*arguments))

    losses = margins.over_images(network, threat, of_example, margins.BATCH_SIZE)
    params = network.variables["params"]
    first, second = (directions(params, key) for key in jax.random.split(jax.random.key(seed), 2))
    at = np.linspace(-reach, reach, points)
    grid = np.empty((points, points))
    for i, a in enumerate(at):
        for j, b in enumerate(at):
            moved = jax.tree.map(lambda p, d, e: p + a * d + b * e, params, first, second)  # noqa: B023
            variables = {**network.variables, "params": moved}
            grid[i, j] = np.mean(losses(variables, data))
    return Surface(title, at, grid)


def plot_surfaces(surfaces: Sequence[Surface], path: Path, loss: str) -> None:
    """Writes the figure, with one surface per network."""
    canvas = Figure(figsize=(4.2 * len(surfaces) + 1, 4.2), dpi=90, layout="constrained")
    FigureCanvasAgg(canvas)
    finite = np.concatenate([surface.losses[np.isfinite(surface.losses)] for surface in surfaces])
    # A surface that explodes at its corners would flatten all others.
    lowest, highest = float(finite.min()), float(np.quantile(finite, 0.95))
    scale = Normalize(lowest, highest)
    for index, surface in enumerate(surfaces):
        axes: Any = canvas.add_subplot(1, len(surfaces), index + 1, projection="3d")
        grid = np.meshgrid(surface.at, surface.at, indexing="ij")
        heights = np.clip(np.nan_to_num(surface.losses, nan=highest, posinf=highest), None, highest)
        axes.plot_surface(
            *grid, heights, cmap="viridis", norm=scale, rstride=1, cstride=1, linewidth=0.2
        )
        axes.set(zlim=(lowest, highest), xlabel="d", ylabel="e")
        axes.set_title(surface.title, fontsize=8)
        axes.tick_params(labelsize=7)
    colours = cm.ScalarMappable(norm=scale, cmap="viridis")
    canvas.colorbar(colours, ax=canvas.axes, shrink=0.6, label=f"{loss} loss, cut at 95 %")
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        figure.add_count(parser, default=200)
        parser.add_argument("--loss", choices=tuple(margins.LOSSES), default="interval")
        read = figure.positive("--points")
        parser.add_argument("--points", type=read, default=15, help="along each direction")
        parser.add_argument("--reach", type=float, default=0.1, help="in norms of the weights")
        parser.add_argument("--seed", type=int, default=0, help="of the directions")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        surfaces = []
        for run in flags.runs:
            network = margins.load(run, flags.count)
            options = {"points": flags.points, "reach": flags.reach, "seed": flags.seed}
            of_run = network.pure, network.data, network.threat, flags.loss
            surfaces.append(surface_of(*of_run, **options, title=network.title))
        plot_surfaces(surfaces, out, flags.loss)

    figure.command("surface", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

"""Draws the outer bounds of an l2 run on the plane of two logits.

    python -m experiments.plots.ellipse RUN --image=0 --out ellipse.png

The last ball before the last layer becomes an ellipse on the plane of the label's logit and of the
class that BCP finds hardest. The lines `z_y - z_m = const` are the least margins by LMT, which
touches the ellipse, and by BCP, which cuts it (Figures 3.2 and B.5 of Lee's thesis). Dots are the
logits of PGD on the cross-entropy and on the margin; a dot below a line would be a wrong bound.
Needs a network whose last layer is dense.
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
from boundjax.attacks import pgd
from experiments.plots import figure, margins, records
from experiments.settings.errors import ExperimentError

_ATTACKS = ("cross_entropy", "margin")


class Outline(NamedTuple):
    """The outer bounds of one image on the plane of the logits `z_y` and `z_m`.

    Attributes:
      name: of the network.
      classes: y and m.
      center: `[2]`, the logits of the image.
      ellipse: `[P, 2]`, points on the border of the ball's image.
      lmt, bcp: the least margins `z_y - z_m`.
      attacked: attack's loss -> `[2]`, the logits that it reaches.
    """

    name: str
    classes: tuple[int, int]
    center: np.ndarray
    ellipse: np.ndarray
    lmt: float
    bcp: float
    attacked: dict[str, np.ndarray]


def last_kernel(variables: dict[str, Any], classes: int) -> np.ndarray:
    """Returns the kernel `[n, classes]` of the last dense layer of a network.

    Raises:
      ExperimentError: if there is no dense layer with so many units.
    """
    dense = sorted(
        (int(name.removeprefix("Dense_")), layer)
        for name, layer in variables["params"].items()
        if name.startswith("Dense_")
    )
    if not dense or dense[-1][1]["kernel"].shape[-1] != classes:
        raise ExperimentError(f"the figure needs a dense last layer of {classes} units, got none")
    return np.asarray(dense[-1][1]["kernel"], np.float64)


def outline_of(network: margins.Network, image: int, points: int = 201) -> Outline:
    """Bounds and attacks one test image.

    Raises:
      ExperimentError: if the run is not in l2, or for a network without a dense last layer.
      RuntimeError: if an attack comes below a bound, which means that the bound is wrong.
    """
    if network.threat.norm != 2:
        raise ExperimentError(
            f"the figure needs a run in l2, got {network.config.robust.norm_label}"
        )
    pure, threat = network.pure, network.threat
    function = pure.of_one_example(pure.variables)
    x, label = network.data.images[image], int(network.data.labels[image])
    logits = np.asarray(jax.jit(function)(jnp.asarray(x)), np.float64)
    rows = bj.margin_specification(jnp.asarray(label), len(logits), rows="others")

    def least(box: bool) -> np.ndarray:
        bounds = bj.lipschitz(function, box=box)(threat(jnp.asarray(x)), rows)
        return np.asarray(bounds.lower, np.float64)

    lmt, bcp = least(box=False), least(box=True)
    hardest = int(np.argmin(bcp))
    other = int(np.argmin(np.asarray(rows[hardest])))
    pair = last_kernel(pure.variables, len(logits))[:, [label, other]]
    center = logits[[label, other]]
    # LMT's margin is that of the ball alone, so it tells the ball's radius before the last layer.
    slack = (center[0] - center[1]) - lmt[hardest]
    radius = slack / np.linalg.norm(pair[:, 0] - pair[:, 1])
    values, vectors = np.linalg.eigh(pair.T @ pair)
    angles = np.linspace(0, 2 * np.pi, points)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    attacked = {loss: _attacked(network, image, loss)[[label, other]] for loss in _ATTACKS}
    for loss, at in attacked.items():
        if at[0] - at[1] < bcp[hardest] - 1e-4 * (1 + abs(bcp[hardest])):
            raise RuntimeError(
                f"PGD on the {loss} reaches the margin {at[0] - at[1]:.6g} of image {image}, below "
                f"BCP's bound {bcp[hardest]:.6g}"
            )
    return Outline(
        records.method_name(network.config),
        (label, other),
        center,
        center + radius * circle @ root,
        float(lmt[hardest]),
        float(bcp[hardest]),
        attacked,
    )


def _attacked(network: margins.Network, image: int, loss: Any) -> np.ndarray:
    pure, threat, data = network.pure, network.threat, network.data
    x, labels = (jnp.asarray(array[image : image + 1]) for array in data)
    clip: Any = threat.clip

    @jax.jit
    def logits(variables: Any) -> jax.Array:
        def apply(x: jax.Array) -> jax.Array:
            return pure.apply(variables, x)

        key = jax.random.key(0)
        point = pgd(apply, x, labels, threat.eps, key=key, norm=2, clip=clip, loss=loss)
        return apply(point)[0]

    return np.asarray(logits(pure.variables), np.float64)


def plot_outlines(outlines: Sequence[Outline], path: Path) -> None:
    """Writes the figure, with one panel per network."""
    canvas, axes = figure.create(4.2 * len(outlines) + 1.4, 4.0, 1, len(outlines))
    for each, outline in zip(axes[0], outlines, strict=True):
        label, other = outline.classes
        each.fill(*outline.ellipse.T, color="C0", alpha=0.2, label="ball")
        each.plot(*outline.center, "k+", label="image")
        for (loss, at), marker in zip(outline.attacked.items(), "ox", strict=True):
            text = f"PGD, {loss.replace('_', ' ')}"
            each.plot(*at, marker, color="C1", markersize=6, label=text)
        span = np.array([outline.ellipse[:, 0].min(), outline.ellipse[:, 0].max()])
        for least, colour, text in ((outline.lmt, "C0", "LMT"), (outline.bcp, "C3", "BCP")):
            each.plot(span, span - least, color=colour, label=f"{text}: $z_y - z_m$ least")
        each.plot(span, span, "k:", linewidth=1, label="decision boundary")
        each.set_title(f"{outline.name}: y = {label}, m = {other}", fontsize=9)
        each.set(xlabel="$z_y$", ylabel="$z_m$")
        each.set_aspect("equal", adjustable="datalim")
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and writes the figure."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--image", type=int, default=0, help="number of the test image (0)")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        outlines = []
        for run in flags.runs:
            network = margins.load(run, None)
            if not 0 <= flags.image < len(network.data):
                raise ExperimentError(
                    f"--image must be in [0, {len(network.data) - 1}], got {flags.image}"
                )
            outlines.append(outline_of(network, flags.image))
        plot_outlines(outlines, out)

    figure.command("ellipse", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

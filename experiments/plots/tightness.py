"""Plots how tight several bounds are on the test images of trained networks, as violins.

    python -m experiments.plots.tightness runs/mnist_bcp-cpu --out tightness.png
    python -m experiments.plots.tightness runs/mnist_crown-cpu --count=1000 --loss

For a run in l2 it plots `tau(x) = sum_{i != j} t(x; i, j) / (C (C - 1))` by LMT and by BCP, where
`t(x; i, j)` bounds the growth of `z_i - z_j` over the ball of the run's test radius (Lee, Lee &
Park 2020; Figure 3.3 of Lee's thesis). For a run in l-infinity it plots `T(x) = sum_m s_m`, where
`s_m` bounds `z_m - z_y` from above, by interval bounds and by linear relaxations on interval
pre-activations with several lower slopes (Lee et al. 2021, "Loss Landscape Matters"). `--loss` adds
the robust cross-entropy of the same bounds with their verified errors (Figures 4 and 17; 3.10 and
C.9 of the thesis). Smaller is tighter.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from boundjax.diagnostics import mean_translation
from boundjax.training import robust_cross_entropy
from experiments.data import Images
from experiments.plots import figure, margins
from experiments.settings.errors import ExperimentError

# Name of a bound -> its value for every image, [N].
Values = Mapping[str, np.ndarray]


class Measured(NamedTuple):
    """The bounds on the images of one run.

    Attributes:
      title: of the run.
      values: `tau` or `T`.
      losses: robust cross-entropies; empty in l2.
      errors: the fraction of the images that a bound does not verify; empty in l2.
    """

    title: str
    values: Values
    losses: Values = MappingProxyType({})
    errors: Mapping[str, float] = MappingProxyType({})


def _translation(box: bool) -> margins.Measure:
    return lambda function, ball, label, key: mean_translation(function, ball, box=box)


L2: Mapping[str, margins.Measure] = {
    "LMT": _translation(box=False),
    "BCP": _translation(box=True),
}


def measure(
    network: bj.PureModel,
    data: Images,
    threat: bj.Threat,
    title: str = "",
    batch_size: int = margins.BATCH_SIZE,
) -> Measured:
    """Computes `tau` (l2), or `T` and the loss (l-infinity), of every image by every bound.

    Args:
      network: the network to bound.
      data: images with pixels in `[0, 1]`, and their labels.
      threat: the radius, the norm, and the pixel range if the ball is clipped to it.
      title: of the run.
      batch_size: images in one compiled call.
    """

    def over(one: margins.Measure) -> Any:
        return margins.over_images(network, threat, one, batch_size)(network.variables, data)

    def summary(of: margins.Measure) -> margins.Measure:
        def one(*arguments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            lower = of(*arguments)
            return -jnp.sum(lower), robust_cross_entropy(lower), jnp.all(lower > 0)

        return one

    if threat.norm == 2:
        return Measured(title, {name: over(one) for name, one in L2.items()})
    measured = {name: over(summary(of)) for name, of in margins.MARGINS.items()}
    return Measured(
        title,
        {name: total for name, (total, _, _) in measured.items()},
        {name: loss for name, (_, loss, _) in measured.items()},
        {name: 1.0 - float(np.mean(ok)) for name, (_, _, ok) in measured.items()},
    )


def reduction(values: Values) -> float:
    """Computes the mean fraction by which BCP reduces the LMT value; 0 where that is 0."""
    lmt, bcp = values["LMT"], values["BCP"]
    return float(np.mean(1.0 - np.divide(bcp, lmt, out=np.ones_like(bcp), where=lmt > 0)))


def plot_tightness(runs: Sequence[Measured], path: Path, with_loss: bool = False) -> None:
    """Writes the figure: per run the distribution of every bound's values, and of its losses.

    Raises:
      ExperimentError: if a value is not finite, the runs are in two norms, or losses are asked for
        in l2.
    """
    if len({tuple(run.values) for run in runs}) > 1:
        raise ExperimentError("the runs of a figure must be in one norm, got both l2 and l-inf")
    if with_loss and not runs[0].losses:
        raise ExperimentError("--loss needs runs in l-inf, got l2; leave it out")
    names = list(runs[0].values)
    columns = 2 if with_loss else 1
    width = columns * (1.2 + (0.4 + 0.6 * len(names)) * len(runs))
    canvas, axes = figure.create(max(5.0, width), 3.8, 1, columns)
    _violins(axes[0, -1], [run.values for run in runs], [run.title for run in runs])
    axes[0, -1].set_xticks(range(len(runs)), map(_caption, runs), fontsize=8)
    if runs[0].losses:
        axes[0, -1].set_ylabel("T(x): sum of upper bounds on $z_m - z_y$")
    else:
        axes[0, -1].set_ylabel("tau(x): mean growth of a margin")
    if with_loss:
        losses = axes[0, 0]
        _violins(losses, [run.losses for run in runs], [run.title for run in runs])
        for place, run in enumerate(runs):
            for index, name in enumerate(names):
                text = f"{100 * run.errors[name]:.1f} %"
                at = (_position(place, index, len(names)), float(np.max(run.losses[name])))
                losses.annotate(text, at, ha="center", va="bottom", fontsize=6)
        losses.set_xticks(range(len(runs)), [run.title for run in runs], fontsize=8)
        losses.set_ylabel("robust cross-entropy; above: verified error")
    figure.legend(canvas, axes[0, 0])
    canvas.savefig(path)


def _position(place: int, index: int, count: int) -> float:
    return place + (index - (count - 1) / 2) * 0.8 / count


def _violins(axes: Any, runs: Sequence[Values], titles: Sequence[str]) -> None:
    for place, (values, title) in enumerate(zip(runs, titles, strict=True)):
        for index, (name, value) in enumerate(values.items()):
            if not np.isfinite(value).all():
                raise ExperimentError(
                    f"{' '.join(title.split())}: values by {name} must be finite, got "
                    f"{value[~np.isfinite(value)][0]}; did the training diverge?"
                )
            parts: dict[str, Any] = axes.violinplot(
                value.astype(np.float64),
                [_position(place, index, len(values))],
                widths=0.72 / len(values),
                showmedians=True,
                showextrema=False,
            )
            for part in (*parts["bodies"], parts["cmedians"]):
                part.set_color(f"C{index}")
            if place == 0:  # violins take no label
                axes.plot([], [], color=f"C{index}", linewidth=6, alpha=0.3, label=name)
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.grid(visible=False, axis="x")


def _caption(run: Measured) -> str:
    if run.losses:
        return run.title
    return f"{run.title}\nBCP {100 * reduction(run.values):.1f} % below LMT"


def of_run(run: Path, count: int | None) -> Measured:
    """Measures the first `count` test images of a run (None: all).

    Raises:
      ExperimentError: if the folder holds no network or its data is missing.
    """
    network = margins.load(run, count)
    return measure(network.pure, network.data, network.threat, network.title)


def _print(run: Measured) -> None:
    means = ", ".join(f"{np.mean(value):.4g} ({name})" for name, value in run.values.items())
    count = len(next(iter(run.values.values())))
    text = f"{' '.join(run.title.split())}: {count:,} test images, mean "
    text += f"{'T' if run.losses else 'tau'} {means}"
    if run.losses:
        losses = ", ".join(
            f"{np.mean(value):.4g} / {100 * run.errors[name]:.1f} % ({name})"
            for name, value in run.losses.items()
        )
        text += f"; mean loss / verified error {losses}"
    else:
        text += f", mean reduction {100 * reduction(run.values):.1f} %"
    print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, writes the figure and prints the means."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        figure.add_count(parser)
        parser.add_argument("--loss", action="store_true", help="also show the losses")

    def draw(flags: argparse.Namespace, out: Path) -> None:
        runs = [of_run(run, flags.count) for run in flags.runs]
        plot_tightness(runs, out, flags.loss)
        for run in runs:
            _print(run)

    figure.command("tightness", __doc__, arguments, draw, add_flags)


if __name__ == "__main__":
    main()

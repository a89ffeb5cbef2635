"""How much tighter BCP bounds trained networks than their Lipschitz constant alone (LMT) does.

    python -m experiments.plots.tightness --workdir runs/mnist_bcp-cpu --out tightness.png

For every test image x, `tau(x) = sum_{i != j} t(x; i, j) / (C (C - 1))`, where `t(x; i, j)` bounds
by how much `z_i - z_j` can grow over the ball of the run's test radius (Lee, Lee & Park 2020). One
pair of violins per run: its network, bounded by LMT and by BCP. `--count 1000` takes the first
images only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from boundjax.diagnostics import mean_translation
from experiments import trained
from experiments.errors import ExperimentError
from experiments.methods import Setting, Threat

BATCH_SIZE = 100
_COLOURS = {"LMT": "C0", "BCP": "C3"}


class Taus(NamedTuple):
    """The mean translation of every image under the two bounds, each `[N]`, in units of logits."""

    lmt: np.ndarray
    bcp: np.ndarray

    @property
    def reduction(self) -> float:
        """Mean over the images of the part of the LMT value that BCP takes away; 0 of nothing."""
        share = np.divide(self.bcp, self.lmt, out=np.ones_like(self.bcp), where=self.lmt > 0)
        return float(np.mean(1.0 - share))


def taus(
    model, variables, images: np.ndarray, eps: float, threat: Threat, batch_size: int = BATCH_SIZE
) -> Taus:
    """`tau` of every image `[N, H, W, channels]`, by LMT and by BCP.

    Args:
      model, variables: a Linen module and its variables.
      images: pixels in `[0, 1]`.
      eps: the radius.
      threat: the norm, and the pixel range if the ball is cut to it.
      batch_size: images in one compiled call.
    """

    def measured(box: bool) -> np.ndarray:
        # The variables are arguments: XLA would fold constants for minutes.
        @jax.jit
        def of_batch(variables, batch):
            def function(image):
                return model.apply(variables, image[None])[0]

            def tau(image):
                return mean_translation(function, threat.ball(image, eps), box=box)

            return jax.vmap(tau)(batch)

        size = min(batch_size, len(images))
        found = [
            # The last batch starts again from the first image, so that all have one shape.
            np.asarray(of_batch(variables, images[np.arange(start, start + size) % len(images)]))
            for start in range(0, len(images), size)
        ]
        return np.concatenate(found)[: len(images)]

    return Taus(lmt=measured(box=False), bcp=measured(box=True))


def plot_tightness(found: Sequence[tuple[str, Taus]], path: Path) -> None:
    """Writes the figure: per title the distributions of `tau` by LMT and by BCP.

    Raises:
      ExperimentError: if a `tau` is not finite.
    """
    for title, values in found:
        for name, tau in values._asdict().items():
            if not np.isfinite(tau).all():
                raise ExperimentError(
                    f"{' '.join(title.split())}: tau ({name}) must be finite, got "
                    f"{tau[~np.isfinite(tau)][0]}; did the training diverge?"
                )
    figure = Figure(figsize=(1.6 + 2.4 * len(found), 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.subplots()
    for place, (_, values) in enumerate(found):
        for name, offset, tau in (("LMT", -0.2, values.lmt), ("BCP", 0.2, values.bcp)):
            parts = axes.violinplot(
                tau.astype(np.float64),
                [place + offset],
                widths=0.36,
                showmedians=True,
                showextrema=False,
            )
            for part in (*parts["bodies"], parts["cmedians"]):
                part.set_color(_COLOURS[name])
            if place == 0:  # violins take no label
                axes.plot([], [], color=_COLOURS[name], linewidth=6, alpha=0.3, label=name)
    labels = [f"{title}\nBCP {100 * values.reduction:.1f} % below LMT" for title, values in found]
    axes.set_xticks(range(len(found)), labels, fontsize=8)
    axes.set(ylabel="tau(x): mean growth of a margin", xlim=(-0.6, len(found) - 0.4))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7)
    figure.savefig(path)


def of_run(workdir: Path, count: int | None) -> tuple[str, Taus]:
    """The title of a run, and `tau` of its first `count` test images (None: all).

    Raises:
      ExperimentError: if the folder holds no network or its data is not there.
    """
    run = trained.load(workdir)
    robust = run.config.robust
    threat = Setting(run.model, run.config).threat
    images = run.test.images[:count]
    title = f"{run.title}, {run.config.model.name},\n{robust.method}, {robust.norm_label} "
    title += f"eps {robust.eps_test:.4g}"
    return title, taus(run.model, run.variables, images, robust.eps_test, threat)


def main() -> None:
    """Reads the flags, writes the figure, prints the mean reductions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", nargs="+", type=Path, required=True, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="the PNG file")
    parser.add_argument("--count", type=int, help="test images of each run (default: all)")
    flags = parser.parse_args()
    if flags.count is not None and flags.count < 1:
        parser.error(f"--count must be >= 1, got {flags.count}")
    try:
        found = [of_run(workdir, flags.count) for workdir in flags.workdir]
        plot_tightness(found, flags.out)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for title, values in found:
        print(
            f"{' '.join(title.split())}: {len(values.bcp):,} test images, mean tau "
            f"{np.mean(values.lmt):.4g} (LMT), {np.mean(values.bcp):.4g} (BCP), "
            f"mean reduction {100 * values.reduction:.1f} %"
        )
    print(f"figure: {flags.out}")


if __name__ == "__main__":
    main()

"""Plots the tightness of several bounds on the test images of trained networks, as violins.

    python -m experiments.plots.tightness --workdir runs/mnist_bcp-cpu --out tightness.png

For a run in l2 it plots `tau(x) = sum_{i != j} t(x; i, j) / (C (C - 1))` by LMT and by BCP, where
`t(x; i, j)` bounds the growth of `z_i - z_j` over the ball of the run's test radius (Lee, Lee &
Park 2020). For a run in l-infinity it plots `T(x) = sum_m s_m`, where `s_m` bounds `z_m - z_y` from
above, by interval bounds and by linear relaxations on interval pre-activations with several lower
slopes (Lee et al. 2021). Smaller is tighter. `--count 1000` takes the first images only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import boundjax as bj
from boundjax.diagnostics import mean_translation
from boundjax.training import robust_cross_entropy
from experiments.data import Images
from experiments.evaluation import trained
from experiments.methods import Setting
from experiments.settings.errors import ExperimentError, fail

BATCH_SIZE = 100
# Name of a bound -> its value for every image, [N].
Values = Mapping[str, np.ndarray]
# (function of one image, its ball, its label, a PRNG key) -> a scalar.
Measure = Callable[[Callable, bj.InputSet, jax.Array, jax.Array], jax.Array]


def _translation(box: bool) -> Measure:
    return lambda function, ball, label, key: mean_translation(function, ball, box=box)


def _interval(function, ball, label, key) -> jax.Array:
    rows = bj.margin_specification(label, len(function(ball.center)), rows="others")
    return -jnp.sum(bj.interval(function)(ball, rows).lower)


def _linear(slopes_of: Callable[[jax.Array], Any]) -> Measure:
    def measure(function, ball, label, key) -> jax.Array:
        rows = bj.margin_specification(label, len(function(ball.center)), rows="others")
        bounds = bj.linear(function, slopes=slopes_of(key), sides="lower", has_aux=True)
        # Take the relaxation's own bounds: intersected with intervals, all would look alike.
        return -jnp.sum(bounds(ball, rows)[1].linear.lower)

    return measure


L2: Mapping[str, Measure] = {"LMT": _translation(box=False), "BCP": _translation(box=True)}
LINF: Mapping[str, Measure] = {
    "IBP": _interval,
    "random slopes": _linear(bj.slopes.uniform),
    "CAP-IBP": _linear(lambda key: "parallel"),
    "CROWN-IBP": _linear(lambda key: "adaptive"),
    "one step": _linear(
        lambda key: bj.optimized(start=bj.slopes.uniform(key), objective=robust_cross_entropy)
    ),
}


def values_of(
    network: bj.PureModel, data: Images, threat: bj.Threat, batch_size: int = BATCH_SIZE
) -> Values:
    """Computes `tau` (l2) or `T` (l-infinity) of every image, by every bound of that norm.

    Args:
      network: the network to bound.
      data: images with pixels in `[0, 1]`, and their labels.
      threat: the radius, the norm, and the pixel range if the ball is clipped to it.
      batch_size: images in one compiled call.
    """

    def measured(measure: Measure) -> np.ndarray:
        # Pass the variables as arguments: XLA would fold constants for minutes.
        @jax.jit
        def of_batch(variables, images, labels, keys):
            function = network.of_one_example(variables)

            return jax.vmap(lambda image, label, key: measure(function, threat(image), label, key))(
                images, labels, keys
            )

        size = min(batch_size, len(data))
        keys = jax.random.split(jax.random.key(0), len(data))
        values = []
        for start in range(0, len(data), size):
            # Fill the last batch from the first image on, so that all have one shape.
            rows = np.arange(start, start + size) % len(data)
            values.append(np.asarray(of_batch(network.variables, *data.take(rows), keys[rows])))
        return np.concatenate(values)[: len(data)]

    measures = L2 if threat.norm == 2 else LINF
    return {name: measured(measure) for name, measure in measures.items()}


def reduction(values: Values) -> float:
    """Computes the mean fraction by which BCP reduces the LMT value; 0 where that is 0."""
    lmt, bcp = values["LMT"], values["BCP"]
    return float(np.mean(1.0 - np.divide(bcp, lmt, out=np.ones_like(bcp), where=lmt > 0)))


def plot_tightness(runs: Sequence[tuple[str, Values]], path: Path) -> None:
    """Writes the figure: per title, the distribution of every bound's values.

    Raises:
      ExperimentError: if a value is not finite, or the runs are in two norms.
    """
    if len({tuple(values) for _, values in runs}) > 1:
        raise ExperimentError("the runs of a figure must be in one norm, got both l2 and l-inf")
    for title, values in runs:
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ExperimentError(
                    f"{' '.join(title.split())}: values by {name} must be finite, got "
                    f"{value[~np.isfinite(value)][0]}; did the training diverge?"
                )
    names = list(runs[0][1])
    step = 0.8 / len(names)
    width = 1.6 + (0.4 + 0.7 * len(names)) * len(runs)
    figure = Figure(figsize=(max(5.0, width), 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.subplots()
    for place, (_, values) in enumerate(runs):
        for index, name in enumerate(names):
            parts: dict[str, Any] = axes.violinplot(
                values[name].astype(np.float64),
                [place + (index - (len(names) - 1) / 2) * step],
                widths=0.9 * step,
                showmedians=True,
                showextrema=False,
            )
            for part in (*parts["bodies"], parts["cmedians"]):
                part.set_color(f"C{index}")
            if place == 0:  # violins take no label
                axes.plot([], [], color=f"C{index}", linewidth=6, alpha=0.3, label=name)
    axes.set_xticks(range(len(runs)), [_caption(*item) for item in runs], fontsize=8)
    if "LMT" in names:
        axes.set_ylabel("tau(x): mean growth of a margin")
    else:
        axes.set_ylabel("T(x): sum of upper bounds on $z_m - z_y$")
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(fontsize=7, loc="outside right center")
    figure.savefig(path)


def _caption(title: str, values: Values) -> str:
    if "LMT" not in values:
        return title
    return f"{title}\nBCP {100 * reduction(values):.1f} % below LMT"


def of_run(workdir: Path, count: int | None) -> tuple[str, Values]:
    """Returns the title of a run and the values of its first `count` test images (None: all).

    Raises:
      ExperimentError: if the folder holds no network or its data is missing.
    """
    run = trained.load(workdir)
    robust = run.config.robust
    data = run.test.take(slice(count))
    title = f"{run.title}, {run.config.model.name},\n{robust.method}, {robust.norm_label} "
    title += f"eps {robust.eps_test:.4g}"
    threat = Setting(run.model, run.config).threat
    return title, values_of(run.pure, data, threat)


def main() -> None:
    """Reads the flags, writes the figure and prints the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", nargs="+", type=Path, required=True, help="run folders")
    parser.add_argument(
        "--out", type=Path, help="the PNG file (default: tightness.png in the first run folder)"
    )
    parser.add_argument("--count", type=int, help="test images of each run (default: all)")
    flags = parser.parse_args()
    if flags.count is not None and flags.count < 1:
        parser.error(f"--count must be >= 1, got {flags.count}")
    try:
        out = flags.out or flags.workdir[0] / "tightness.png"
        if out.suffix != ".png" or not out.parent.is_dir():
            raise ExperimentError(f"--out={out}: must be a PNG file in an existing folder")
        runs = [of_run(workdir, flags.count) for workdir in flags.workdir]
        plot_tightness(runs, out)
    except ExperimentError as error:
        fail(error)
    for title, values in runs:
        means = ", ".join(f"{np.mean(value):.4g} ({name})" for name, value in values.items())
        quantity = "tau" if "LMT" in values else "T"
        text = f"{' '.join(title.split())}: {len(next(iter(values.values()))):,} test images, "
        text += f"mean {quantity} {means}"
        if "LMT" in values:
            text += f", mean reduction {100 * reduction(values):.1f} %"
        print(text)
    print(f"figure: {out}")


if __name__ == "__main__":
    main()

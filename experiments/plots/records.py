"""Reads what runs have recorded while they were trained, for figures over epochs."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.evaluation import trained
from experiments.plots import figure
from experiments.records.folder import Records
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError

_NAMES = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "one-step": "one step",
    "cap-ibp": "CAP-IBP",
    "random-slopes": "random slopes",
    "cap": "CAP",
    "bcp": "BCP",
    "lmt": "LMT",
    "rse": "RSE",
    "adv-bnn": "Adv-BNN",
    "adv-train": "Adv.train",
}


class RunRecords(NamedTuple):
    """What one run has recorded.

    Attributes:
      path: the run folder.
      config: its configuration.
      name: its method, as in the papers: `CROWN-IBP`, `(0, 1)` for fixed slopes.
      metrics: the lines of `metrics.jsonl`, one per epoch.
      landscape: the lines of `landscape.jsonl`, at step 0 and every `diagnostics_every` steps.
    """

    path: Path
    config: Config
    name: str
    metrics: list[dict[str, Any]]
    landscape: list[dict[str, Any]]

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch."""
        last = self.metrics[-1]
        return last["step"] // last["epoch"]

    @property
    def ramp(self) -> tuple[float, float]:
        """The epochs at which the radius begins and ends to grow."""
        robust = self.config.robust
        return robust.warmup_epochs, robust.warmup_epochs + robust.ramp_epochs


# Epochs and, for each of them, a value.
Series = tuple[list[float], list[float]]


def read(path: Path) -> RunRecords:
    """Reads the records of a run.

    Raises:
      ExperimentError: if the folder holds no run of one seed, a file is damaged, or the run has not
        finished an epoch.
    """
    config = trained.single_config(path)
    with Records(path, config) as records:
        metrics, landscape = records.metrics(), records.landscape()
    if not metrics:
        raise ExperimentError(f"{path} has not finished an epoch yet; let its run train for longer")
    return RunRecords(path, config, method_name(config), metrics, landscape)


def method_name(config: Config) -> str:
    """Names a training method as in the papers, with the settings that tell runs apart."""
    method, relaxation = config.robust.method, config.relaxation
    if method == "pq-slopes":
        return f"({relaxation.p:g}, {relaxation.q:g})"
    name = _NAMES.get(method, method)
    if config.regularizers.relu_stability:
        name += f", RS {config.regularizers.relu_stability:g}"
    if config.diversity.weight:
        name += f", GradDiv-{config.diversity.measure}"
    return name


def need(run: RunRecords, group: str) -> list[dict[str, Any]]:
    """Returns the lines of `landscape.jsonl` that have a group of measures.

    Raises:
      ExperimentError: if none has it.
    """
    lines = [line for line in run.landscape if group in line]
    if not lines:
        name = "landscape" if group == "target" else group
        raise ExperimentError(
            f"{run.path} has recorded no {group!r}; train with "
            f"--config.train.diagnostics=\"('{name}',)\" in a new run folder"
        )
    return lines


def series(run: RunRecords, group: str, *keys: str | int) -> Series:
    """Returns a measure over epochs, without the lines in which it is not finite."""
    epochs, values = [], []
    for line in need(run, group):
        value = line[group]
        for key in keys:
            value = value[key]
        if value is not None:
            epochs.append(line["step"] / run.steps_per_epoch)
            values.append(value)
    return epochs, values


def over_epochs(run: RunRecords, key: str) -> Series:
    """Returns a mean of `metrics.jsonl` over epochs, drawn at the end of each."""
    lines = [line for line in run.metrics if key in line]
    return [line["epoch"] for line in lines], [line[key] for line in lines]


def draw_series(
    axes: Any, runs: Sequence[RunRecords], series_of_runs: Sequence[Series], **style: Any
) -> None:
    """Draws one line per run in the colour of its method."""
    palette = figure.colours([run.name for run in runs])
    for run, (epochs, values) in zip(runs, series_of_runs, strict=True):
        label = None if "alpha" in style else run.name
        axes.plot(epochs, values, color=palette[run.name], label=label, linewidth=1.2, **style)


def draw_noisy(
    axes: Any, runs: Sequence[RunRecords], series_of_runs: Sequence[Series], window: int = 9
) -> None:
    """Draws the values of single batches pale, and on top of them their running median."""
    draw_series(axes, runs, series_of_runs, alpha=0.2)
    medians = [(at, running_median(values, window)) for at, values in series_of_runs]
    draw_series(axes, runs, medians)


def running_median(values: Sequence[float], window: int) -> list[float]:
    """Returns the median of up to `window` values around each; fewer at both ends."""
    half = window // 2
    return [
        statistics.median(values[max(0, index - half) : index + half + 1])
        for index in range(len(values))
    ]


def mark_ramp(axes: Any, runs: Sequence[RunRecords]) -> None:
    """Marks where the radius begins and ends to grow, if that is the same in all runs."""
    if len({run.ramp for run in runs}) == 1:
        for epoch in runs[0].ramp:
            axes.axvline(epoch, color="0.5", linestyle=":", linewidth=1)


def add_radius(parser: argparse.ArgumentParser) -> None:
    """Adds `--radius`, which selects the group of `landscape.jsonl`."""
    parser.add_argument(
        "--radius",
        choices=tuple(RADII),
        default="scheduled",
        help="measured at the radius of the step, or at the final one along the same update",
    )


RADII = {"scheduled": "landscape", "target": "target"}

"""The two networks that a curve connects."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluation import trained
from experiments.evaluation.trained import Trained
from experiments.settings.errors import ExperimentError


class Ends(NamedTuple):
    """Two networks of one architecture, trained on one data set: at `t = 0` and at `t = 1`."""

    start: Trained
    end: Trained


def load(run_a: Path, run_b: Path, data_dir: str | None) -> Ends:
    """Loads the last epoch of two runs.

    Args:
      run_a: the run folder of the network at `t = 0`.
      run_b: that of the network at `t = 1`.
      data_dir: where the data set lies now, if it has moved since the runs.

    Raises:
      ExperimentError: if a run has not ended, or the two do not have one network, data set and
        threat model.
    """
    if run_a.resolve() == run_b.resolve():
        raise ExperimentError(f"a curve needs two runs, got {run_a} twice; name another one")
    runs = [trained.load(folder, data_dir=data_dir) for folder in (run_a, run_b)]
    for folder, run in zip((run_a, run_b), runs, strict=True):
        if not run.finished:
            raise ExperimentError(
                f"{folder} has no final checkpoint, only {run.label}; finish its training first"
            )
        if run.config.random.draws:
            raise ExperimentError(
                f"{folder} has a random network, which has no certified loss; name a run of a "
                "deterministic one"
            )
    ends = Ends(*runs)
    first, second = (_facts(run) for run in ends)
    for key, advice in (
        ("model.name", "train both with one network"),
        ("model.mean", "train both with one normalisation"),
        ("model.std", "train both with one normalisation"),
        ("data.name", "train both on one data set"),
        ("robust.norm", "train both in one norm"),
        ("robust.clip", "train both on the same balls"),
    ):
        if first[key] != second[key]:
            raise ExperimentError(
                f"the runs of a curve must agree in {key}, got {first[key]!r} in {run_a} and "
                f"{second[key]!r} in {run_b}; {advice}"
            )
    if not all(map(np.array_equal, ends.start.test, ends.end.test)):
        raise ExperimentError(
            f"the runs of a curve must have the same test images of {ends.start.title}, but those "
            f"of {run_a} and {run_b} differ; train both on one data set"
        )
    return ends


def _facts(run: Trained) -> dict[str, Any]:
    config = run.config
    return {
        "model.name": config.model.name,
        "model.mean": config.model.mean,
        "model.std": config.model.std,
        "data.name": config.data.name,
        "robust.norm": config.robust.norm,
        "robust.clip": config.robust.clip,
    }

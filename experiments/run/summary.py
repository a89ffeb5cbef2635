"""The end of a run: the closing table, and the summary of several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records.printing import print_table, table_rows
from experiments.settings.config import NORMS, Config

# What the summary of several seeds takes from the first one's.
_COMMON = (
    "eps_test",
    "eps_train",
    "norm",
    "clip",
    "bounds",
    "attack",
    "method",
    "model",
    "data",
    "test_images",
    "selection",
    "device",
    "versions",
)


def print_summary(summary: dict[str, Any], workdir: Path) -> None:
    """Prints the errors on the test images, how they were measured, and the run folder."""
    header, rows = table_rows(summary["results"])
    print_table(_title(summary), header, rows)
    print(f"selection: {summary['selection']}")
    print(
        f"trained in {summary['train_seconds']} s, evaluated in {summary['evaluation_seconds']} s; "
        f"parameters sha256 {summary['parameters_sha256'][:16]}"
    )
    print(f"run folder: {workdir}", flush=True)


def print_seeds(summary: dict[str, Any], workdir: Path) -> None:
    """Prints the errors of every seed, and their mean and standard deviation."""
    keys = ("standard_error", "pgd_error", "verified_error")
    rows = [
        [f"seed {seed}", *(f"{100 * summary['errors'][key][index]:.2f} %" for key in keys)]
        for index, seed in enumerate(summary["seeds"])
    ]
    both = [f"{100 * summary['mean'][k]:.2f} +- {100 * summary['std'][k]:.2f} %" for k in keys]
    title = f"{_title(summary)}; {len(rows)} seeds"
    rows.append(["mean +- standard deviation", *both])
    print_table(title, ["run", "standard", "PGD", "verified"], rows)
    print(
        f"verified by {' or '.join(summary['bounds'])}; selection: {summary['selection']}; "
        f"trained in {summary['train_seconds']:.1f} s"
    )
    print(f"run folder: {workdir}", flush=True)


def _title(summary: dict[str, Any]) -> str:
    clipped = "clipped to [0, 1]" if summary["clip"] else "not clipped"
    data = f" of {summary['data']}" if "data" in summary else ""  # older runs do not say
    return (
        f"{summary['experiment']}: error on {summary['test_images']:,} test images{data}, "
        f"{NORMS[summary['norm']].label} eps {summary['eps_test']:.6g}, {clipped}; "
        f"{summary['attack']}"
    )


def of_seeds(summaries: Sequence[dict[str, Any]], config: Config, name: str) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, of the model that each run reports first."""
    first = [next(iter(summary["results"].values())) for summary in summaries]
    errors = {
        key: [result[key] for result in first]
        for key in ("standard_error", "pgd_error", "verified_error")
    }
    return {
        "experiment": name,
        "seeds": [summary["seed"] for summary in summaries],
        "mean": {key: float(np.mean(values)) for key, values in errors.items()},
        # Of a sample, not of all seeds that there are.
        "std": {key: float(np.std(values, ddof=1)) for key, values in errors.items()},
        "errors": errors,
        "parameters_sha256": [summary["parameters_sha256"] for summary in summaries],
        "train_seconds": sum(summary["train_seconds"] for summary in summaries),
        **{key: summaries[0][key] for key in _COMMON},
        "finished": summaries[-1]["finished"],
    }

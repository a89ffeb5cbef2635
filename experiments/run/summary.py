"""The summary of a run or of several seeds, and the closing tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluation.random_evaluate import WARNING, table_of
from experiments.records.printing import print_table, table_rows
from experiments.records.versions import versions
from experiments.settings.config import NORMS, Config
from experiments.train.loop import Member
from experiments.train.prepare import Prepared

# Keys that the summary of several seeds copies from that of the first.
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


class Measured(NamedTuple):
    """What the evaluation at the end of a run measured.

    Attributes:
      results: errors on the test images by the label of the network; the first is the reported one.
      methods: bounds whose union is the verified error; none of a random network.
      attack: what attacked the network, in words.
      parameters_sha256: of the reported network.
      seconds: duration of the evaluation.
    """

    results: dict[str, dict[str, Any]]
    methods: Sequence[str]
    attack: str
    parameters_sha256: str
    seconds: float


def describe_attack(attack: dict[str, Any]) -> str:
    """Describes the attack of an evaluation by its settings."""
    return (
        f"PGD-{attack['steps']}, {attack['restarts']} start(s), "
        f"{' and '.join(attack['losses'])} loss, best iterate"
    )


def describe_random_attacks(settings: dict[str, Any]) -> str:
    """Describes the attacks on a random network by the settings of their file."""
    return (
        f"EOT-FGSM and EOT-PGD-{settings['pgd_steps']}, mean softmax of "
        f"{settings['prediction_draws']} draws, {WARNING}"
    )


def print_summary(summary: dict[str, Any], workdir: Path) -> None:
    """Prints the errors on the test images, how they were measured and the run folder."""
    if summary["bounds"]:
        print_table(_title(summary), *table_rows(summary["results"]))
    else:
        errors = next(iter(summary["results"].values()))
        print_table(_title(summary), *table_of(errors))
    print(f"selection: {summary['selection']}")
    print(
        f"trained in {summary['train_seconds']} s, evaluated in {summary['evaluation_seconds']} s; "
        f"parameters sha256 {summary['parameters_sha256'][:16]}"
    )
    print(f"run folder: {workdir}", flush=True)


def print_seeds(summary: dict[str, Any], workdir: Path) -> None:
    """Prints the errors of every seed with their mean and standard deviation."""
    keys = ("standard_error", "pgd_error", "verified_error")
    rows = [
        [f"seed {seed}", *(f"{100 * summary['errors'][key][index]:.2f} %" for key in keys)]
        for index, seed in enumerate(summary["seeds"])
    ]
    means = [f"{100 * summary['mean'][k]:.2f} +- {100 * summary['std'][k]:.2f} %" for k in keys]
    title = f"{_title(summary)}; {len(rows)} seeds"
    rows.append(["mean +- standard deviation", *means])
    print_table(title, ["run", "standard", "PGD", "verified"], rows)
    verified = f"verified by {' or '.join(summary['bounds'])}" if summary["bounds"] else WARNING
    print(
        f"{verified}; selection: {summary['selection']}; "
        f"trained in {summary['train_seconds']:.1f} s"
    )
    print(f"run folder: {workdir}", flush=True)


def _title(summary: dict[str, Any]) -> str:
    clipped = "clipped to [0, 1]" if summary["clip"] else "not clipped"
    data = f" of {summary['data']}" if "data" in summary else ""  # the oldest runs have no data
    return (
        f"{summary['experiment']}: error on {summary['test_images']:,} test images{data}, "
        f"{NORMS[summary['norm']].label} eps {summary['eps_test']:.6g}, {clipped}; "
        f"{summary['attack']}"
    )


def of_run(
    prepared: Prepared,
    member: Member,
    name: str,
    measured: Measured,
) -> dict[str, Any]:
    """Makes the content of `summary.json` for one run.

    Args:
      prepared: the training.
      member: the trained run.
      name: name of the experiment.
      measured: its evaluation.
    """
    config, splits, threat = member.records.config, prepared.splits, prepared.threat
    return {
        "experiment": name,
        "results": measured.results,
        "selection": (
            f"smallest verified error ({config.evaluation.selection_method}) on the last "
            f"{len(splits.validation)} training images, which were not trained on"
            if len(splits.validation)
            else "none: trained on all training images, the last epoch is reported"
        ),
        "eps_test": config.robust.eps_test,
        "eps_train": config.robust.eps_train,
        "norm": config.robust.norm,
        "clip": list(threat.clip) if threat.clip else None,
        "bounds": list(measured.methods),
        "attack": measured.attack,
        "method": config.robust.method,
        "model": config.model.name,
        "parameters": prepared.parameters,
        "parameters_sha256": measured.parameters_sha256,
        "data": splits.title,
        "train_images": len(splits.train),
        "validation_images": len(splits.validation),
        "test_images": len(splits.test.take(slice(config.evaluation.images or None))),
        "epochs": config.train.epochs,
        "steps": prepared.total_steps,
        "seed": member.seed,
        "train_seconds": round(member.seconds, 1),
        "evaluation_seconds": round(measured.seconds, 1),
        "device": prepared.devices,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def of_seeds(summaries: Sequence[dict[str, Any]], config: Config, name: str) -> dict[str, Any]:
    """Makes the summary of several seeds from the network that each of them reports first."""
    reported = [next(iter(summary["results"].values())) for summary in summaries]
    errors = {
        key: [result[key] for result in reported]
        for key in ("standard_error", "pgd_error", "verified_error")
    }
    return {
        "experiment": name,
        "seeds": [summary["seed"] for summary in summaries],
        "mean": {key: float(np.mean(values)) for key, values in errors.items()},
        # The seeds are a sample of all possible ones.
        "std": {key: float(np.std(values, ddof=1)) for key, values in errors.items()},
        "errors": errors,
        "parameters_sha256": [summary["parameters_sha256"] for summary in summaries],
        "train_seconds": sum(summary["train_seconds"] for summary in summaries),
        **{key: summaries[0][key] for key in _COMMON},
        "finished": summaries[-1]["finished"],
    }

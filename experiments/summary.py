"""The end of a run: what it was run on, and the closing table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from experiments.config import NORMS
from experiments.report import print_table, table_rows


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


def device_name(devices: list[Any]) -> str:
    """Number and kind of the devices, and what is known of the machine on CPU."""
    name = f"{len(devices)} x {devices[0].device_kind}"
    return (
        f"{name} ({platform.machine()}, {os.cpu_count()} cores)" if name.endswith("cpu") else name
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "boundjax")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed, run from a checkout"
    return found

"""What numbers depend on beside the configuration: devices, Python and packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any


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

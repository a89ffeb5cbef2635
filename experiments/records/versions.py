"""What numbers depend on beside the configuration and the devices: Python and packages."""

from __future__ import annotations

import importlib.metadata
import platform


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

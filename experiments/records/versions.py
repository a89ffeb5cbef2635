"""The software that results depend on: Python and packages."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "boundjax")
    by_name = {"python": platform.python_version()}
    for package in packages:
        try:
            by_name[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_name[package] = "not installed, run from a checkout"
    return by_name

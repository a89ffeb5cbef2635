"""Compares stored configurations: which keys differ, and the defaults of keys that are newer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.settings.config import Config


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, the keys that are newer than it at their defaults.

    The default of a new key is what the code did before there was the key. Nothing else is changed:
    unknown keys and bad values stay as they are.
    """
    return _filled(stored, Config().to_dict())


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys on which two nested dictionaries differ, sorted."""
    names = []
    for key in sorted(set(one) | set(other)):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key}")
    return names


def _filled(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **stored}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled

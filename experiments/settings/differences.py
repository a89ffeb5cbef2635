"""Compares stored configurations, after filling in keys that are newer than they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.settings.config import Config


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored configuration with the defaults of keys that it is too old to have.

    The default of a new key is what the code did before the key existed. Nothing else changes:
    unknown keys and bad values are kept.
    """
    return _filled(stored, Config().to_dict())


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the sorted dotted names of the keys at which two nested dictionaries differ."""
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

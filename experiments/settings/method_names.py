"""Names of training methods have hyphens; the underscores that they had in 0.1 are read until 0.3.

What a user writes (`robust.method`, an argument like `method=mtl-ibp` of a config file) is told of
by `notice`. What earlier runs have stored is read silently, and does not end with 0.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_RENAMED = (
    "crown-ibp",
    "one-step",
    "cap-ibp",
    "random-slopes",
    "pq-slopes",
    "mtl-ibp",
    "exp-ibp",
    "cc-ibp",
)
_CURRENT = {name.replace("-", "_"): name for name in _RENAMED}


def current(name: str) -> str:
    """The name as it is spelled now; anything but an old spelling stays as it is."""
    return _CURRENT.get(name, name)


def updated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A nested configuration with `robust.method` as it is spelled now, and nothing else changed.

    Values of the wrong type stay as they are.
    """
    robust = config.get("robust")
    if not isinstance(robust, Mapping) or not isinstance(robust.get("method"), str):
        return dict(config)
    return {**config, "robust": {**robust, "method": current(robust["method"])}}


def notice(names: Iterable[str]) -> str:
    """The line that tells of the old spellings among `names`, empty if there are none."""
    old = [name for name in dict.fromkeys(names) if name in _CURRENT]
    if not old:
        return ""
    read = ", ".join(f"{name!r} is read as {current(name)!r}" for name in old)
    return f"method names have hyphens now: {read}; the old spelling will end with 0.3"

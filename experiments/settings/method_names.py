"""Names of training methods have hyphens; the underscores of 0.1 are accepted until 0.3.

`notice` reports old spellings in what a user writes: `robust.method`, or an argument of a config
file like `method=mtl-ibp`. Old spellings that earlier runs have stored are read silently, also
after 0.3.
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
    """Returns the current spelling of a name; any other text is returned unchanged."""
    return _CURRENT.get(name, name)


def updated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested configuration with the current spelling of `robust.method`.

    Nothing else changes; values of the wrong type are kept.
    """
    robust = config.get("robust")
    if not isinstance(robust, Mapping) or not isinstance(robust.get("method"), str):
        return dict(config)
    return {**config, "robust": {**robust, "method": current(robust["method"])}}


def notice(names: Iterable[str]) -> str:
    """Returns one line that reports the old spellings among `names`, or an empty text."""
    old = [name for name in dict.fromkeys(names) if name in _CURRENT]
    if not old:
        return ""
    read = ", ".join(f"{name!r} is read as {current(name)!r}" for name in old)
    return f"method names have hyphens now: {read}; 0.3 will reject the old spelling"

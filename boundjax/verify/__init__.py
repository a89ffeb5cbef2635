"""Decides VNN-LIB properties: `verify` for a JAX function, `python -m boundjax.verify` for files.

`boundjax.search` decides. The command is two processes: one keeps time and the results
(`supervisor`, `benchmark`), a `worker` decides.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boundjax.search import LADDER as LADDER
    from boundjax.search import Counterexample as Counterexample
    from boundjax.search import Programs as Programs
    from boundjax.search import Result as Result
    from boundjax.search import verify as verify

# Imported on first use: `--help` answers without JAX.
__all__ = ["LADDER", "Counterexample", "Programs", "Result", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("boundjax.search"), name)


def __dir__() -> list[str]:
    return __all__

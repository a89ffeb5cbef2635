"""What ends a command with one line on standard error, without a traceback."""

from __future__ import annotations

import sys
from typing import NoReturn


class ExperimentError(ValueError):
    """Bad configuration, data or run folder: what was expected, what came and what to do."""


class ContradictionError(ExperimentError, RuntimeError):
    """A bound and an attack contradict each other: nothing that a user can correct."""


def one_line(error: object) -> str:
    """What an error says, on one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(error: object) -> NoReturn:
    """Ends a command after a mistake: one line on standard error, exit status 2."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)

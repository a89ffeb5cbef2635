"""Errors that end a command with one line on standard error instead of a traceback."""

from __future__ import annotations

import sys
from typing import NoReturn


class ExperimentError(ValueError):
    """A bad configuration, data set or run folder: what was expected, what came, what to do."""


class ContradictionError(ExperimentError, RuntimeError):
    """A bound and an attack contradict each other, which no user can correct."""


def one_line(error: object) -> str:
    """Returns the text of an error on one line, or the name of its type if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(error: object) -> NoReturn:
    """Ends a command after a mistake, with one line on standard error and exit status 2."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)

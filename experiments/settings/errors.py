"""What ends a command with one line on standard error, without a traceback."""

from __future__ import annotations


class ExperimentError(ValueError):
    """Bad configuration, data or run folder: what was expected, what came and what to do."""


class ContradictionError(ExperimentError, RuntimeError):
    """A bound and an attack contradict each other: nothing that a user can correct."""

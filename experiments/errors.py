"""The one exception for mistakes a user can correct: printed as one line, without a traceback."""

from __future__ import annotations


class ExperimentError(ValueError):
    """Bad configuration, data or run folder: what was expected, what came and what to do."""

"""How far a long call of `certify` has come."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Protocol

import numpy as np


class Progress(Protocol):
    """What `certify` tells about its progress, between compiled calls and never inside of them."""

    def __call__(self, done: int, total: int, undecided: int, /) -> object:
        """Called after every batch, and after every search of `"complete"`.

        Args:
          done: steps so far: one for each example that a method has bounded or a search decided.
          total: all steps that are known now. It grows with `"complete"`, whose dearer methods see
            only the examples that are still open.
          undecided: examples that are neither verified nor falsified so far.
        """
        ...


@contextlib.contextmanager
def told(progress: Progress | bool) -> Generator[Progress | None]:
    """Whom a call tells about its progress.

    Args:
      progress: a callback; or True for a bar on stderr while that is a terminal, False for nothing.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    # Only now, as it takes longer to import than most batches take.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[undecided]} open"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, undecided="all")

        def update(done: int, total: int, undecided: int) -> None:
            bar.update(task, completed=done, total=total, undecided=undecided)

        yield update


class Steps:
    """Counts steps and open examples for one call."""

    def __init__(self, progress: Progress | None, total: int, examples: int) -> None:
        """Starts at no step of `total`, with all `examples` open."""
        self._progress, self._done, self._total = progress, 0, total
        self._open = np.ones(examples, bool)
        self._rows = np.arange(examples)

    def add(self, count: int) -> None:
        """Adds steps that have become known."""
        self._total += count

    def of(self, rows: np.ndarray) -> Steps:
        """Counts further for some of the examples; what they are padded with does not count."""
        self._rows = rows
        return self

    def close(self, rows: np.ndarray) -> None:
        """Some examples are decided already."""
        self._open[rows] = False

    def again(self) -> None:
        """All examples are open again: another radius is tried."""
        self._open[:] = True

    def bounded(self, rows: np.ndarray, verified: np.ndarray) -> None:
        """Counts examples that have been bounded.

        Args:
          rows: their indices.
          verified: bool `[n, ...]`, at all positions of an example.
        """
        rows = rows[rows < len(self._rows)]
        closed = verified[: len(rows)].reshape(len(rows), -1).all(axis=1)
        self._open[self._rows[rows[closed]]] = False
        self._tell(len(rows))

    def searched(self, row: int, closed: bool) -> None:
        """Counts an example that has been searched."""
        self._open[row] &= not closed
        self._tell(1)

    def _tell(self, steps: int) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, self._total, int(self._open.sum()))

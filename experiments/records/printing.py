"""Output of a run: a live bar and a framed table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Report:
    """A context manager that shows progress over `total` steps and lines of text."""

    def __init__(self, total: int):
        """Shows nothing until the context is entered."""
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("training", total=total)

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int) -> None:
        """Shows the number of steps done; called after each step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, the first column flush left and all other columns flush right."""
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    print(title)
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip(), flush=True)


def table_rows(results: dict[str, dict[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """Returns the header and the rows, in percent, of the closing table: one per result."""
    methods = list(next(iter(results.values()))["verified_error_by"])
    header = ["model", "standard", "PGD", "verified", *(f"by {name}" for name in methods)]
    rows = []
    for name, errors in results.items():
        values = [errors["standard_error"], errors["pgd_error"], errors["verified_error"]]
        values += [errors["verified_error_by"][method] for method in methods]
        rows.append([name, *("-" if v is None else f"{100 * v:.2f} %" for v in values)])
    return header, rows

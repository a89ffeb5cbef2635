"""A line on stderr that says what the command is doing, if stderr is a terminal."""

from __future__ import annotations

import shutil
import sys

_ERASE = "\x1b[K"  # from the cursor to the end of the line


class Progress:
    """One line that is written again and again."""

    def __init__(self) -> None:
        """Shows nothing unless stderr is a terminal."""
        self._visible = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Replaces the line."""
        if self._visible:
            # A line that wraps could not be replaced.
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}{_ERASE}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line, before something else is printed."""
        self.show("")

"""Replaces files atomically: neither a reader nor a kill ever leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def temporary_name(name: str) -> str:
    """Returns the name of a file while it is being written."""
    return f".{name}.new"


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces or creates the file at `path`; `write` gets a stream for the new content.

    Raises:
      OSError: if the file cannot be written.
    """
    temporary = path.with_name(temporary_name(path.name))
    with temporary.open("wb") as stream:
        write(stream)
    os.replace(temporary, path)


def replace_text(path: Path, text: str) -> None:
    """Replaces or creates the file at `path` with `text` in UTF-8.

    Raises:
      OSError: if the file cannot be written.
    """
    replace(path, lambda stream: stream.write(text.encode()))

"""Replaces files atomically, so that a kill never leaves half of one; reads and writes JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from experiments.records.formats import FormatError, parse_object
from experiments.settings.errors import ExperimentError


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


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object of a JSON file.

    Raises:
      ExperimentError: if the file cannot be read, or holds something else.
    """
    try:
        return parse_object(path.read_text())
    except (OSError, FormatError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExperimentError(
            f"{path} cannot be read ({reason}); delete it, or use another run folder"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces or creates the JSON file at `path`.

    Raises:
      OSError: if the file cannot be written.
    """
    replace_text(path, json.dumps(content, indent=2) + "\n")

"""Files with one JSON object per line, to which a run adds lines while it is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.records.files import replace_text
from experiments.records.formats import FormatError, parse_object
from experiments.settings.errors import ExperimentError


class JsonLines:
    """A file of records, one per line; `drop_after` needs their `step`."""

    def __init__(self, path: Path, check: Callable[[dict[str, Any]], None]):
        """Opens nothing yet; `check` raises a `FormatError` for an object that is no record."""
        self._path, self._check = path, check

    def exists(self) -> bool:
        """Whether the file has been written."""
        return self._path.exists()

    def read(self) -> list[dict[str, Any]]:
        """Returns the records, without a last one that a kill cut short.

        Raises:
          ExperimentError: if another line is not a record, or the file cannot be read.
        """
        if not self._path.exists():
            return []
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise ExperimentError(
                f"{self._path} cannot be read ({error.strerror}); delete it, or use "
                "another run folder"
            ) from error
        lines = content.split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not _is_json(line):
                break  # the text after the last line break: empty, or cut short
            try:
                record = parse_object(line.decode())
                self._check(record)
            except (FormatError, UnicodeDecodeError) as error:
                raise ExperimentError(
                    f"{self._path}, line {number}: {error}; delete that line"
                ) from error
            records.append(record)
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record."""
        with self._path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def drop_after(self, step: int) -> None:
        """Deletes the records of later steps."""
        self.replace([record for record in self.read() if record["step"] <= step])

    def replace(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes the file again, with these records only."""
        replace_text(self._path, "".join(json.dumps(record) + "\n" for record in records))


def _is_json(line: bytes) -> bool:
    try:
        parse_object(line.decode())
    except (FormatError, UnicodeDecodeError):
        return False
    return True

"""The files of a run folder: `config.json`, `metrics.jsonl`, `summary.json`, `curves.png`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from experiments import distributed
from experiments.checkpoints import check_same_config
from experiments.config import Config
from experiments.errors import ExperimentError
from experiments.formats import NUMBER, FormatError, check_group, integer, parse_object
from experiments.summary import check_summary


class RunFolder:
    """One run's folder. Files are replaced whole, so a kill never leaves half of one.

    Of several processes, process 0 writes.
    """

    def __init__(self, path: Path, config: Config):
        """Looks at the folder of an earlier, perhaps interrupted, run; writes nothing yet.

        Raises:
          ExperimentError: if the folder holds a run of another config.
        """
        self.path = path
        self.curves = path / "curves.png"
        self.config = config
        self._stored = path / "config.json"
        self._metrics = path / "metrics.jsonl"
        self._summary = path / "summary.json"
        if self._stored.exists():
            check_same_config(_read_json(self._stored), config, path)

    def create(self) -> None:
        """Creates the folder and writes the config, from then on it belongs to this run.

        Raises:
          ExperimentError: if the folder cannot be created, or is not shared by all processes.
        """
        distributed.require_shared(self.path)
        if not distributed.is_main():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"--workdir={self.path}: cannot create it ({error.strerror})"
            ) from error
        _write_json(self._stored, self.config.to_dict())

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None: what process 0 sees; all must call this.

        Raises:
          ExperimentError: if it is damaged.
        """
        return distributed.from_main(self._read_summary)

    def _read_summary(self) -> dict[str, Any] | None:
        if not self._summary.exists():
            return None
        summary = _read_json(self._summary)
        try:
            check_summary(summary, several=self.config.seeds > 1)
        except FormatError as error:
            raise ExperimentError(
                f"{self._summary}: {error}; delete it to evaluate the run again"
            ) from error
        return summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished."""
        if distributed.is_main():
            _write_json(self._summary, summary)

    def records(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`; a last line that a kill cut short is left out.

        Raises:
          ExperimentError: if another line is no record, or the file cannot be read.
        """
        if not self._metrics.exists():
            return []
        try:
            content = self._metrics.read_bytes()
        except OSError as error:
            raise ExperimentError(f"{self._metrics} cannot be read ({error.strerror})") from error
        lines = content.split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not _is_json(line):
                break  # after the last end of a line
            try:
                record = parse_object(line.decode())
                numbers = {"step": integer(0), "epoch": integer(0), "eps": NUMBER}
                check_group("", record, dict.fromkeys(record, NUMBER) | numbers)
            except (FormatError, UnicodeDecodeError) as error:
                raise ExperimentError(
                    f"{self._metrics}, line {number}: {error}; delete that line"
                ) from error
            records.append(record)
        return records

    def drop_records_after(self, step: int) -> None:
        """Forgets what was recorded after the checkpoint that the run resumes from."""
        if not distributed.is_main():
            return
        kept = [record for record in self.records() if record["step"] <= step]
        _replace(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def append_record(self, record: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        if not distributed.is_main():
            return
        with self._metrics.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def read_config(workdir: Path) -> dict[str, Any]:
    """The stored configuration of the run in a folder.

    Raises:
      ExperimentError: if there is none.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ExperimentError(f"{workdir} holds no run: expected {path.name} in it")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_text())
    except (OSError, FormatError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExperimentError(
            f"{path} cannot be read ({reason}); delete it, or use another --workdir"
        ) from error


def _is_json(line: bytes) -> bool:
    try:
        parse_object(line.decode())
    except (FormatError, UnicodeDecodeError):
        return False
    return True


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)

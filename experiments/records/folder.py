"""The files of a run folder: `config.json`, `metrics.jsonl`, `summary.json`, `curves.png`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.cluster import distributed
from experiments.records.files import replace_text
from experiments.records.same_config import check_same_config
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError


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
        """The summary of a finished run, or None: what process 0 sees; all must call this."""
        return distributed.from_main(
            lambda: _read_json(self._summary) if self._summary.exists() else None
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished."""
        if distributed.is_main():
            _write_json(self._summary, summary)

    def records(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`; a last line that a kill cut short is left out."""
        if not self._metrics.exists():
            return []
        records = []
        for line in self._metrics.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def drop_records_after(self, step: int) -> None:
        """Forgets what was recorded after the checkpoint that the run resumes from."""
        if not distributed.is_main():
            return
        kept = [record for record in self.records() if record["step"] <= step]
        replace_text(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))

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
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"{path} cannot be read ({error}); delete it, or use another --workdir"
        ) from error
    if not isinstance(content, dict):
        raise ExperimentError(
            f"{path}: expected a JSON object; delete it, or use another --workdir"
        )
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n")

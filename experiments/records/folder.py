"""The records of a run: every file of its folder, and the one place that knows who writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.cluster import distributed
from experiments.records.checkpoints import Checkpoints
from experiments.records.files import replace_text
from experiments.records.formats import NUMBER, FormatError, check_group, integer, parse_object
from experiments.records.same_config import check_same_config
from experiments.records.summary_checks import check_summary
from experiments.settings import method_names
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError


class Records:
    """What one run leaves in its folder, opened once per run.

    `config.json` makes the folder this run's; `metrics.jsonl` has a line per epoch, `curves.png`
    shows them; `checkpoints` holds the states to go on from; `summary.json` marks the run as
    finished. Files are replaced whole, so a kill never leaves half of one.

    Of several processes all call every method, in the same order, and process 0 writes; only
    checkpoints are written by all together.
    """

    def __init__(self, path: Path, config: Config):
        """Looks at the folder of an earlier, perhaps interrupted, run; writes nothing yet.

        Raises:
          ExperimentError: if the folder holds a run of another config.
        """
        self.path = path
        self.config = config
        self._stored = path / "config.json"
        self._metrics = path / "metrics.jsonl"
        self._summary = path / "summary.json"
        self._opened: Checkpoints | None = None
        if self._stored.exists():
            check_same_config(_read_json(self._stored), config, path)

    @property
    def _writes(self) -> bool:
        return distributed.is_main()

    def create(self) -> None:
        """Creates the folder and writes the config, from then on it belongs to this run.

        Raises:
          ExperimentError: if the folder cannot be created, or is not shared by all processes.
        """
        distributed.require_shared(self.path)
        if not self._writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"--workdir={self.path}: cannot create it ({error.strerror})"
            ) from error
        _write_json(self._stored, self.config.to_dict())

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None: what process 0 sees.

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
        return summary | {"method": method_names.current(summary["method"])}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished."""
        if self._writes:
            _write_json(self._summary, summary)

    # ----------------------------------------------------------------------- metrics

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last one that a kill cut short is left out.

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
        metrics = []
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
            metrics.append(record)
        return metrics

    def drop_metrics_after(self, step: int) -> None:
        """Forgets what was recorded after the checkpoint that the run resumes from."""
        if self._writes:
            kept = [line for line in self.metrics() if line["step"] <= step]
            replace_text(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        if self._writes:
            with self._metrics.open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def draw_curves(self, draw: Callable[[list[dict[str, Any]], Path], None]) -> None:
        """Writes `curves.png` by `draw(metrics, path)`."""
        if self._writes:
            draw(self.metrics(), self.path / "curves.png")

    # ----------------------------------------------------------------------- checkpoints

    def restore(self, state: Any, selected: Any) -> tuple[Any, Any, float] | None:
        """The latest (state, selected, seconds), laid out like the arguments; None without one.

        Raises:
          ExperimentError: if the checkpoint is of another configuration, or cannot be read.
        """
        return self._checkpoints().restore(state, selected)

    def resume(self, state: Any, selected: Any) -> tuple[Any, Any, float]:
        """What the run goes on from: the latest checkpoint, or else the arguments as its first.

        Even a first step that diverges then leaves a checkpoint. Metrics of later steps are
        dropped.

        Raises:
          ExperimentError: as `restore` and `metrics`.
        """
        restored = self.restore(state, selected)
        if restored is None:
            restored = state, selected, 0.0
            self.save(0, *restored)
            self.wait()
        self.drop_metrics_after(self._checkpoints().step)
        return restored

    def save(self, step: int, state: Any, selected: Any, seconds: float) -> None:
        """Starts writing a checkpoint; training goes on meanwhile."""
        self._checkpoints().save(step, state, selected, seconds)

    def wait(self) -> None:
        """Waits until every checkpoint is on disk."""
        if self._opened is not None:
            self._opened.wait()

    def close(self) -> None:
        """Waits until every checkpoint is on disk, and lets go of them."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def has_checkpoints(self) -> bool:
        """Whether a run has begun to write checkpoints: opening them would create their folder."""
        return (self.path / "checkpoints").is_dir()

    def _checkpoints(self) -> Checkpoints:
        if self._opened is None:
            self._opened = Checkpoints(self.path, self.config)
        return self._opened

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


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
    replace_text(path, json.dumps(content, indent=2) + "\n")

"""The records of a run: all files of its folder, and the only place that knows who writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.cluster import distributed
from experiments.records.checkpoints import Checkpoints
from experiments.records.files import read_json, write_json
from experiments.records.formats import (
    NUMBER,
    OBJECT,
    FormatError,
    check_group,
    integer,
)
from experiments.records.json_lines import JsonLines
from experiments.records.same_config import check_same_config
from experiments.records.summary_checks import check_summary
from experiments.settings import method_names
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError


class Records:
    """The files of one run folder, opened once per run.

    `config.json` ties the folder to this run; `metrics.jsonl` has a line per epoch, which
    `curves.png` shows; `landscape.jsonl` has the measures of `train.diagnostics`; `checkpoints`
    holds the states to resume from; `summary.json` marks the run as finished. Files are replaced
    atomically, so a kill never leaves half of one.

    All processes must call every method in the same order. Process 0 writes, except that all
    processes write checkpoints together.
    """

    def __init__(self, path: Path, config: Config):
        """Compares `config` with that of an earlier run in the folder; writes nothing yet.

        Raises:
          ExperimentError: if the folder holds a run of another config.
        """
        self.path = path
        self.config = config
        self._config_file = path / "config.json"
        self._metrics = JsonLines(path / "metrics.jsonl", _check_metrics)
        self._landscape = JsonLines(path / "landscape.jsonl", _check_landscape)
        self._summary_file = path / "summary.json"
        self._checkpoints: Checkpoints | None = None
        if self._config_file.exists():
            check_same_config(read_json(self._config_file), config, path)

    @property
    def _writes(self) -> bool:
        return distributed.is_main()

    def create(self) -> None:
        """Creates the folder and writes the config, which ties the folder to this run.

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
                f"{self.path}: cannot create it ({error.strerror}); choose another run folder"
            ) from error
        write_json(self._config_file, self.config.to_dict())

    def summary(self) -> dict[str, Any] | None:
        """Returns the summary if the run has finished, as process 0 reads it, or None.

        Raises:
          ExperimentError: if the summary is damaged.
        """
        return distributed.from_main(self._read_summary)

    def finished_summary(self) -> dict[str, Any]:
        """Returns the summary of a run that has finished.

        Raises:
          ExperimentError: if the summary is damaged, or was deleted in the meantime.
        """
        summary = self.summary()
        if summary is None:
            raise ExperimentError(
                f"expected the summary of a finished run in {self._summary_file}, got no file; "
                "run the same command again"
            )
        return summary

    def _read_summary(self) -> dict[str, Any] | None:
        if not self._summary_file.exists():
            return None
        summary = read_json(self._summary_file)
        try:
            check_summary(summary, several=self.config.seeds > 1)
        except FormatError as error:
            raise ExperimentError(
                f"{self._summary_file}: {error}; delete it to evaluate the run again"
            ) from error
        return summary | {"method": method_names.current(summary["method"])}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished."""
        if self._writes:
            write_json(self._summary_file, summary)

    # ----------------------------------------------------------------------- metrics

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`, without a last one that a kill cut short.

        Raises:
          ExperimentError: if another line is not a record, or the file cannot be read.
        """
        return self._metrics.read()

    def drop_metrics_after(self, step: int) -> None:
        """Deletes the lines after `step`, the checkpoint that the run resumes from."""
        if self._writes:
            self._metrics.drop_after(step)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        if self._writes:
            self._metrics.append(line)

    def landscape(self) -> list[dict[str, Any]]:
        """Returns the lines of `landscape.jsonl`, without a last one that a kill cut short.

        Raises:
          ExperimentError: if another line is not a record, or the file cannot be read.
        """
        return self._landscape.read()

    def append_landscape(self, line: dict[str, Any]) -> None:
        """Adds one line to `landscape.jsonl`."""
        if self._writes:
            self._landscape.append(line)

    def drop_landscape_from(self, step: int) -> None:
        """Deletes what was measured at `step`, the first that is trained again, and later."""
        if self._writes and self._landscape.exists():
            self._landscape.drop_after(step - 1)

    def draw_curves(self, draw: Callable[[list[dict[str, Any]], Path], None]) -> None:
        """Lets `draw(metrics, path)` write `curves.png`."""
        if self._writes:
            draw(self.metrics(), self.path / "curves.png")

    # ----------------------------------------------------------------------- checkpoints

    def restore(self, state: Any, selected: Any) -> tuple[Any, Any, float] | None:
        """Returns the latest (state, selected, seconds), laid out like the arguments, or None.

        Raises:
          ExperimentError: if the checkpoint is of another configuration, or cannot be read.
        """
        return self._open_checkpoints().restore(state, selected)

    def resume(self, state: Any, selected: Any) -> tuple[Any, Any, float]:
        """Restores the latest checkpoint; without one, saves the arguments as the first.

        So a run whose first step diverges has a checkpoint as well. Metrics of later steps,
        and what was measured at them, are dropped.

        Raises:
          ExperimentError: for the reasons of `restore`, `metrics` and `landscape`.
        """
        restored = self.restore(state, selected)
        if restored is None:
            restored = state, selected, 0.0
            self.save(0, *restored)
            self.wait()
        step = self._open_checkpoints().step
        self.drop_metrics_after(step)
        self.drop_landscape_from(step)
        return restored

    def save(self, step: int, state: Any, selected: Any, seconds: float) -> None:
        """Starts writing a checkpoint in the background."""
        self._open_checkpoints().save(step, state, selected, seconds)

    def wait(self) -> None:
        """Waits until every checkpoint is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def close(self) -> None:
        """Waits until every checkpoint is on disk, and closes them."""
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run has begun to write checkpoints; does not create their folder."""
        return (self.path / "checkpoints").is_dir()

    def _open_checkpoints(self) -> Checkpoints:
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.path, self.config)
        return self._checkpoints

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the stored configuration of the run in a folder.

    Raises:
      ExperimentError: if there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ExperimentError(f"{workdir} holds no run: expected {path.name} in it")
    return read_json(path)


def _check_metrics(record: dict[str, Any]) -> None:
    numbers = {"step": integer(0), "epoch": integer(0), "eps": NUMBER}
    check_group("", record, dict.fromkeys(record, NUMBER) | numbers)


def _check_landscape(record: dict[str, Any]) -> None:
    common = {"step": integer(0), "epoch": integer(0), "rate": NUMBER}
    check_group("", record, dict.fromkeys(record, OBJECT) | common)

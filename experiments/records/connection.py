"""The records of a curve between two networks: its training, its losses, its barriers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from experiments.records.files import read_json, write_json
from experiments.records.folder import Records
from experiments.records.formats import (
    NOT_NEGATIVE,
    OBJECT,
    FormatError,
    Rule,
    check_group,
    is_number,
    one_of,
)
from experiments.records.json_lines import JsonLines
from experiments.settings.config import Config
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ExperimentError

# The certified losses that are measured along a path, by the bound on the margins.
LOSSES = ("interval", "crown-ibp", "one-step")
# The trained curve, and the straight segment between the same ends.
PATHS = ("curve", "segment")
_RESULT, _POINTS = "connectivity.json", "connectivity.jsonl"


class Connection(NamedTuple):
    """What was measured: `result` of `connectivity.json`, and the points of every path by `t`."""

    result: dict[str, Any]
    points: dict[str, list[dict[str, Any]]]


class ConnectionRecords:
    """The files of one curve, in a folder of their own.

    `training` has the files of a run: its configuration, a line per epoch, checkpoints.
    `connectivity.jsonl` has a line per measured point of a path, `connectivity.json` the settings
    that tie the folder to two networks and, at the end, the barriers.
    """

    def __init__(self, path: Path, config: Config, settings: dict[str, Any]):
        """Compares the arguments with those of an earlier curve in the folder; writes nothing yet.

        Args:
          path: the folder.
          config: configuration of the training of the curve.
          settings: what else decides the results: the networks, the images.

        Raises:
          ExperimentError: if the folder holds another curve or a run, or a file is damaged.
        """
        self.path, self._settings = path, settings
        self._result = path / _RESULT
        if (path / "config.json").exists() and not self._result.exists():
            raise ExperimentError(f"{path} holds a run that is no curve; choose another --out")
        self.training = Records(path, config)
        self._points = JsonLines(path / _POINTS, _check_point)
        if self._result.exists():
            keys = differing_keys(_settings(self._result), settings)
            if keys:
                raise ExperimentError(
                    f"{path} holds another curve, which differs in {', '.join(keys)}; choose "
                    "another --out, or repeat that curve's settings"
                )

    def create(self) -> None:
        """Creates the folder, or repairs what a kill left of the lines of points.

        Raises:
          ExperimentError: if the folder cannot be created, or a file is damaged.
        """
        if self._points.exists():
            self._points.replace(self._points.read())
        if not self._result.exists():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ExperimentError(
                    f"--out={self.path}: cannot create it ({error.strerror}); choose another folder"
                ) from error
            write_json(self._result, {"settings": self._settings})
        self.training.create()

    def points(self, path: str) -> dict[float, dict[str, Any]]:
        """Returns what has been measured of `"curve"` or `"segment"`, by `t`."""
        return {point["t"]: point for point in self._points.read() if point["path"] == path}

    def append_point(self, point: dict[str, Any]) -> None:
        """Adds a measured point."""
        self._points.append(point)

    def write_result(self, result: dict[str, Any]) -> None:
        """Marks the curve as finished."""
        write_json(self._result, {"settings": self._settings, **result})


def read(path: Path) -> Connection:
    """Reads a finished curve.

    Raises:
      ExperimentError: if the folder holds none, or a file is damaged.
    """
    file = path / _RESULT
    if not file.exists():
        raise ExperimentError(f"{path} holds no curve: expected {_RESULT} in it")
    result = read_json(file)
    try:
        check_group("", result, _FINISHED, allow_unknown=True)
    except FormatError as error:
        raise ExperimentError(f"{file}: {error}; run experiments.connect again") from error
    measured = JsonLines(path / _POINTS, _check_point).read()
    points = {}
    for name in PATHS:
        by_position = {point["t"]: point for point in measured if point["path"] == name}
        if not by_position.keys() >= set(result["t"]):
            raise ExperimentError(
                f"{path / _POINTS} lacks points of the {name}; run experiments.connect again"
            )
        points[name] = [by_position[t] for t in result["t"]]
    return Connection(result, points)


def _settings(file: Path) -> dict[str, Any]:
    result = read_json(file)
    try:
        check_group("", result, {"settings": OBJECT}, allow_unknown=True)
    except FormatError as error:
        raise ExperimentError(f"{file}: {error}; delete the folder") from error
    return result["settings"]


_POSITIONS = Rule(
    "two positions or more, in ascending order from 0 to 1",
    lambda value: (
        isinstance(value, list)
        and len(value) > 1
        and all(map(is_number, value))
        and value == sorted(set(value))
        and (value[0], value[-1]) == (0, 1)
    ),
)
_FRACTION = Rule("a fraction in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
_FINISHED = {"settings": OBJECT, "trained_on": one_of(LOSSES), "t": _POSITIONS, "barriers": OBJECT}
_POINT = {"path": one_of(PATHS), "t": _FRACTION, "standard_error": _FRACTION}
_POINT |= {"verified_error": _FRACTION, **dict.fromkeys(LOSSES, OBJECT)}
_MEASURED = {"loss": NOT_NEGATIVE, "spread": NOT_NEGATIVE, "verified_error": _FRACTION}


def _check_point(point: dict[str, Any]) -> None:
    check_group("", point, _POINT)
    for name in LOSSES:
        check_group(f"{name}.", point[name], _MEASURED)

"""The instances of a benchmark, from its csv file."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

from boundjax.verify.errors import VerifyError, one_line
from boundjax.verify.messages import SOLVED

DEFAULT_TIMEOUT = 60.0


@dataclasses.dataclass(frozen=True)
class Instance:
    """A row of a benchmark.

    Attributes:
      onnx, vnnlib: the files.
      timeout: in seconds.
      known_result: `"sat"` or `"unsat"` if the row states it, else None.
    """

    onnx: Path
    vnnlib: Path
    timeout: float
    known_result: str | None = None


def read_instances(path: Path, timeout: float | None) -> list[Instance]:
    """Reads a benchmark's csv file, with a header or, like VNN-COMP's, without.

    Args:
      path: a file with columns `onnx, vnnlib, timeout` and perhaps `known_result`; paths in it are
        relative to its folder.
      timeout: in seconds, replaces the timeouts in the file.

    Returns:
      Its rows.

    Raises:
      OSError: if the file cannot be opened.
      VerifyError: if a row is too short or a timeout is not a positive number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise VerifyError(f"{path.name}: expected a csv file, got {one_line(error)}") from None
    names = ["onnx", "vnnlib", "timeout"]
    first = 1
    if rows and rows[0][0] == "onnx":
        names, rows, first = rows[0], rows[1:], 2
    instances = []
    for number, row in enumerate(rows, start=first):
        cells = dict(zip(names, row, strict=False))
        if not cells.get("onnx") or not cells.get("vnnlib"):
            raise VerifyError(f"{path.name}:{number}: expected onnx,vnnlib,timeout, got {row!r}")
        listed = cells.get("timeout") or DEFAULT_TIMEOUT
        seconds = positive_seconds(
            listed if timeout is None else timeout, f"{path.name}:{number}: timeout"
        )
        known_result = cells.get("known_result")
        instances.append(
            Instance(
                path.parent / cells["onnx"],
                _compressed_or_not(path.parent / cells["vnnlib"]),
                seconds,
                known_result if known_result in SOLVED else None,
            )
        )
    if not instances:
        raise VerifyError(f"{path.name}: expected rows onnx,vnnlib,timeout, got none")
    return instances


def _compressed_or_not(path: Path) -> Path:
    """Finds a file whose name VNN-COMP lists plainly although it is stored compressed."""
    compressed = path.with_name(path.name + ".gz")
    return compressed if not path.exists() and compressed.exists() else path


def positive_bytes(value: Any, name: str) -> int:
    """Reads a limit of memory; `name` says where it comes from, for the message."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise VerifyError(f"{name}: expected a positive number of bytes, got {value!r}")
    return number


def positive_seconds(value: Any, name: str) -> float:
    """Reads a time limit; `name` says where it comes from, for the message."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise VerifyError(f"{name}: expected a positive number of seconds, got {value!r}")
    return number

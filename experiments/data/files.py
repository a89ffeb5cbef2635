"""Reads files that may be missing or damaged; every failure is one line with the file's name."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.settings.errors import ExperimentError, one_line


def reason(error: BaseException) -> str:
    """Shortens an exception's message to a part of one line."""
    return one_line(error)[:160]


def read_bytes(path: Path, whole: str) -> bytes:
    """Reads the file at `path`, one of the files that `whole` describes.

    Raises:
      ExperimentError: if it is missing or cannot be read.
    """
    if not path.is_file():
        raise ExperimentError(
            f"{path.parent}: {path.name} is not there; --config.data.dir must name a folder with "
            f"{whole}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExperimentError(
            f"{path}: cannot be read ({reason(error)}); fetch it again"
        ) from error


def need_size(path: Path, content: bytes, records: int, record: int) -> None:
    """Raises an ExperimentError if a file is not `records` records of `record` bytes long."""
    if len(content) != records * record:
        raise ExperimentError(
            f"{path}: expected {records * record} bytes ({records} records of {record}), "
            f"got {len(content)}; the file is truncated or damaged, fetch it again"
        )


def read_npz(path: Path, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads the arrays `keys` of the archive at `path`; refuses objects, which would run code.

    Raises:
      ExperimentError: if the file cannot be read or lacks one of the arrays.
    """
    keys = tuple(keys)
    try:
        # Open the file here: numpy leaves it open if the archive is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array, without names")
            with archive:
                return {key: archive[key] for key in keys}
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        NotImplementedError,  # from zipfile, if a damaged byte names an unknown compression
        MemoryError,  # a damaged header may declare any size
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ExperimentError(
            f"{path}: cannot be read ({reason(error)}); it must hold {', '.join(keys)}; "
            "fetch or write it again"
        ) from error

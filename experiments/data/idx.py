"""Reads the IDX format, plain or gzip, of the original files of MNIST and Fashion-MNIST.

Format (Y. LeCun): two zero bytes, a type code (8 = unsigned byte), the number of dimensions, each
dimension as a big-endian uint32, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import reason
from experiments.settings.errors import ExperimentError

_PREFIXES = ("train", "t10k")  # file names of the training and test parts
_FILES = "the four IDX files (train-images-idx3-ubyte.gz ...)"
_UNSIGNED_BYTE = 8
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads the uint8 array of `dimensions` dimensions in the file at `path`.

    Raises:
      ExperimentError: if the file cannot be read, is truncated, has trailing bytes, or is not an
        IDX file of unsigned bytes with that many dimensions.
    """
    try:
        content = path.read_bytes()
        if content[:2] == _GZIP_MAGIC:
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(
            f"{path}: cannot be read ({reason(error)}); the file is truncated or damaged, "
            "fetch it again"
        ) from error
    header_size = 4 + 4 * dimensions
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != expected:
        raise ExperimentError(
            f"{path}: expected an IDX file of unsigned bytes with {dimensions} dimensions "
            f"(first bytes {expected.hex()}), got {content[:4].hex() or 'an empty file'}; "
            "is it the right file?"
        )
    if len(content) < header_size:
        raise ExperimentError(
            f"{path}: truncated inside its header ({len(content)} of {header_size} bytes); "
            "fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header_size])
    values = len(content) - header_size
    if values != math.prod(shape):
        raise ExperimentError(
            f"{path}: its header promises {math.prod(shape)} values of shape {list(shape)}, "
            f"but {values} follow; the file is truncated or damaged, fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    """Finds the file `name` in `folder`, with or without `.gz`."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ExperimentError(
        f"{folder}: neither {name} nor {name}.gz is there; "
        f"--config.data.dir must name a folder with {_FILES}"
    )


def _read(folder: Path, dataset: DataSet) -> Parts:
    del dataset  # a file's header states the number and size of its images
    train, test = (
        Raw(
            read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)[..., None],
            read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1),
            f"{folder} ({prefix})",
        )
        for prefix in _PREFIXES
    )
    return train, test


READER = Reader(
    names=tuple(
        f"{prefix}-{content}-ubyte{suffix}"
        for prefix in _PREFIXES
        for content in ("images-idx3", "labels-idx1")
        for suffix in ("", ".gz")
    ),
    read=_read,
    files=_FILES,
)

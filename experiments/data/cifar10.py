"""The official files of CIFAR-10: the binary version, and the python version of pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.data import restricted_pickle
from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import need_size, read_bytes, reason
from experiments.settings.errors import ExperimentError

_PIXELS = 3 * 32 * 32  # the red, the green and the blue plane
_TRAIN = tuple(f"data_batch_{index}" for index in range(1, 6))
_TEST = ("test_batch",)
_BINARY_FILES = "the binary version (data_batch_1.bin ... test_batch.bin)"
_PYTHON_FILES = "the python version (data_batch_1 ... test_batch)"

# Planes uint8 `[count, 3072]` and labels `[count]` of the file (path, count).
_Batch = Callable[[Path, int], tuple[np.ndarray, np.ndarray]]


def _binary_batch(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads records of one label and then the planes."""
    content = read_bytes(path, _BINARY_FILES)
    need_size(path, content, count, 1 + _PIXELS)
    records = np.frombuffer(content, np.uint8).reshape(count, 1 + _PIXELS)
    return records[:, 1:], records[:, 0]


def _python_batch(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a pickled dictionary: the planes as `b"data"`, a list of labels as `b"labels"`."""
    try:
        batch = restricted_pickle.load(read_bytes(path, _PYTHON_FILES))
    except pickle.UnpicklingError as error:
        raise ExperimentError(
            f"{path}: is not a batch of CIFAR-10 ({reason(error)}); fetch it again"
        ) from error
    planes, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(planes, np.ndarray) or planes.shape != (count, _PIXELS):
        got = list(planes.shape) if isinstance(planes, np.ndarray) else type(planes).__name__
        raise ExperimentError(
            f"{path}: expected b'data' as uint8 [{count}, {_PIXELS}], got {got}; fetch it again"
        )
    # Labels below 256 fit into the array; `from_raw` checks their range, as for every data set.
    if (
        not isinstance(labels, list)
        or len(labels) != count
        or not all(type(label) is int and 0 <= label < 256 for label in labels)
    ):
        got = f"{len(labels)} items" if isinstance(labels, list) else type(labels).__name__
        raise ExperimentError(
            f"{path}: expected b'labels' as a list of {count} class numbers, got {got}; "
            "fetch it again"
        )
    return planes, np.asarray(labels, np.uint8)


def _reader(suffix: str, batch: _Batch, files: str, folder: str) -> Reader:
    def read(folder: Path, dataset: DataSet) -> Parts:
        def part(names: tuple[str, ...], count: int) -> Raw:
            batches = [batch(folder / f"{name}{suffix}", count // len(names)) for name in names]
            planes, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return Raw(images, labels, f"{folder} ({names[0]}{suffix} ... {names[-1]}{suffix})")

        return part(_TRAIN, dataset.train), part(_TEST, dataset.test)

    names = tuple(f"{name}{suffix}" for name in (*_TRAIN, *_TEST))
    return Reader(names, read, files=files, folder=folder)


BINARY = _reader(".bin", _binary_batch, _BINARY_FILES, "cifar-10-batches-bin")
PYTHON = _reader("", _python_batch, _PYTHON_FILES, "cifar-10-batches-py")

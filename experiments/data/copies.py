"""CIFAR-10 as JPEG copies of its images, in one `.npz` file.

JPEG loses detail, so results on the copies are not results on CIFAR-10; their title says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import read_npz
from experiments.data.jpeg import decode, need_pillow
from experiments.settings.errors import ExperimentError

_NAME = "cifar10_jpeg.npz"
_ARRAYS = ("jpeg", "offsets", "labels")


def _read(folder: Path, dataset: DataSet) -> Parts:
    need_pillow(_NAME)
    path = folder / _NAME
    arrays = read_npz(path, [f"{part}_{name}" for part in ("train", "test") for name in _ARRAYS])

    def part(name: str) -> Raw:
        jpeg, offsets, labels = (arrays[f"{name}_{array}"] for array in _ARRAYS)
        return _decoded(jpeg, offsets, labels, dataset, f"{path} ({name})")

    return part("train"), part("test")


def _decoded(
    jpeg: np.ndarray, offsets: np.ndarray, labels: np.ndarray, dataset: DataSet, source: str
) -> Raw:
    """Decodes the images: file i is `jpeg[offsets[i]:offsets[i + 1]]`, bytes; `labels` `[N]`."""
    if jpeg.ndim != 1 or jpeg.dtype != np.uint8:
        raise ExperimentError(
            f"{source}: expected jpeg as uint8 [bytes], got {jpeg.dtype} {list(jpeg.shape)}"
        )
    if offsets.ndim != 1 or labels.ndim != 1 or len(offsets) != len(labels) + 1:
        raise ExperimentError(
            f"{source}: expected one more offset than labels, got shapes {list(offsets.shape)} "
            f"and {list(labels.shape)}; fetch the file again"
        )
    if not np.issubdtype(offsets.dtype, np.integer):
        raise ExperimentError(f"{source}: expected integer offsets, got {offsets.dtype}")
    ends = offsets.astype(np.int64)
    if ends[0] != 0 or ends[-1] != len(jpeg) or np.any(np.diff(ends) <= 0):
        raise ExperimentError(
            f"{source}: offsets must rise from 0 to the {len(jpeg)} bytes of jpeg, "
            f"got {ends[0]} to {ends[-1]}; fetch the file again"
        )
    images = np.empty((len(labels), *dataset.shape), np.uint8)
    for index in range(len(labels)):
        content = jpeg[ends[index] : ends[index + 1]].tobytes()
        images[index] = decode(content, dataset.shape[0], f"{source}: image {index}")
    return Raw(images, labels, source)


READER = Reader((_NAME,), _read, files=f"{_NAME} (JPEG copies)", remark="JPEG copies")

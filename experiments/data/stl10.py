"""Reads the official binary files of STL-10: 96x96 colour images, 500 + 800 of every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import need_size, read_bytes
from experiments.data.images import need_labels

_FILES = "the binary files train_X.bin, train_y.bin, test_X.bin and test_y.bin"


def _read(folder: Path, dataset: DataSet) -> Parts:
    """Reads images as red, green and blue planes, each column by column; labels are 1 to 10."""
    height, width, channels = dataset.shape

    def part(name: str, count: int) -> Raw:
        contents = []
        for path, record in (
            (folder / f"{name}_X.bin", height * width * channels),
            (folder / f"{name}_y.bin", 1),
        ):
            content = read_bytes(path, _FILES)
            need_size(path, content, count, record)
            contents.append(np.frombuffer(content, np.uint8))
        planes, labels = contents
        need_labels(labels, 1, dataset.classes, f"{folder / name}_y.bin")
        images = planes.reshape(-1, channels, width, height).transpose(0, 3, 2, 1)
        return Raw(images, labels - np.uint8(1), f"{folder} ({name}_X.bin and {name}_y.bin)")

    return part("train", dataset.train), part("test", dataset.test)


READER = Reader(
    names=tuple(f"{part}_{array}.bin" for part in ("train", "test") for array in "Xy"),
    read=_read,
    files=_FILES,
    folder="stl10_binary",
)

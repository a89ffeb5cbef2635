"""Reads any data set as four arrays in one `.npz` file, for data in other formats."""

from __future__ import annotations

from pathlib import Path

from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import read_npz

_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def reader(name: str) -> Reader:
    """Creates a reader of the file `name`, which may hold a part of the data set only."""

    def read(folder: Path, dataset: DataSet) -> Parts:
        del dataset  # the caller checks its facts
        arrays = read_npz(folder / name, _KEYS)
        train, test = (
            Raw(
                # Grey images may lack the axis of their one channel.
                images[..., None] if images.ndim == 3 else images,
                arrays[f"{part}_labels"],
                f"{folder / name} ({part})",
            )
            for part in ("train", "test")
            for images in (arrays[f"{part}_images"],)
        )
        return train, test

    return Reader((name,), read, remark="npz file", complete=False)


def contents(dataset: DataSet) -> str:
    """Describes, for messages, what an `.npz` file of the data set must hold."""
    return f"train_images and test_images uint8 {dataset.layout}, train_labels and test_labels [N]"

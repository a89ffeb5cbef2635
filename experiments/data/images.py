"""Labelled images in memory, and what every reader checks about them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.errors import ExperimentError


class Images(NamedTuple):
    """Labelled images: `images` float32 `[N, H, W, channels]` in `[0, 1]`, `labels` int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | slice) -> Images:
        """The examples at `indices`, in that order."""
        return Images(self.images[indices], self.labels[indices])


class Splits(NamedTuple):
    """What an experiment reads; `validation` may be empty, `title` names the data in results."""

    train: Images
    validation: Images
    test: Images
    title: str


class Loaded(NamedTuple):
    """What a reader of a data set returns: its two parts, and what results on them must say."""

    train: Images
    test: Images
    title: str


def from_bytes(images: np.ndarray, labels: np.ndarray, num_classes: int, source: str) -> Images:
    """Checks and scales uint8 images `[N, H, W, channels]` and labels `[N]` read from `source`.

    Raises:
      ExperimentError: if the counts differ, nothing is there, or a label is out of range.
    """
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ExperimentError(
            f"{source}: expected uint8 images [N, H, W, channels], "
            f"got {images.dtype} {images.shape}"
        )
    if labels.ndim != 1 or len(images) != len(labels):
        raise ExperimentError(
            f"{source}: {len(images)} images but labels of shape {labels.shape}; "
            "the two files do not belong together, fetch both again"
        )
    if len(images) == 0:
        raise ExperimentError(f"{source}: no images in it; fetch the files again")
    labels = labels.astype(np.int32)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ExperimentError(
            f"{source}: labels must lie in [0, {num_classes}), "
            f"got {labels[wrong[0]]} at index {wrong[0]}; fetch the file again"
        )
    return Images(images.astype(np.float32) / np.float32(255.0), labels)


def hold_out(train: Images, count: int) -> tuple[Images, Images]:
    """Splits off the last `count` images: (images to train on, validation images).

    Raises:
      ExperimentError: if no image would be left to train on.
    """
    if not 0 <= count < len(train):
        raise ExperimentError(
            f"config.data.validation must lie in [0, {len(train)}), below the number of training "
            f"images, got {count}"
        )
    kept = len(train) - count
    return train.take(slice(None, kept)), train.take(slice(kept, None))

"""Labelled images in memory, and the checks that apply to every format."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.data.dataset import DataSet, Raw
from experiments.settings.errors import ExperimentError


class Images(NamedTuple):
    """Labelled images: `images` float32 `[N, H, W, channels]` in `[0, 1]`, `labels` int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | slice) -> Images:
        """Returns the examples at `indices`, in that order."""
        return Images(self.images[indices], self.labels[indices])


class Splits(NamedTuple):
    """An experiment's data; `validation` may be empty, `title` names the data in results."""

    train: Images
    validation: Images
    test: Images
    title: str
    classes: int  # labels lie in [0, classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.train.images.shape[1:]


def from_raw(raw: Raw, dataset: DataSet, count: int, complete: bool) -> Images:
    """Checks raw images against the facts of their data set, and scales them to `[0, 1]`.

    Args:
      raw: images and labels of one part.
      dataset: the facts.
      count: the number of images in this part of the data set.
      complete: whether all of them are required, or at most that many.

    Raises:
      ExperimentError: for images of the wrong type, shape or number, labels that do not match
        them, and labels or pixels out of range.
    """
    images, labels, source = raw
    if images.dtype != np.uint8 or images.shape[1:] != dataset.shape:
        raise ExperimentError(
            f"{source}: expected uint8 images {dataset.layout} of {dataset.title}, "
            f"got {images.dtype} {list(images.shape)}"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ExperimentError(
            f"{source}: expected integer labels [N], got {labels.dtype} {list(labels.shape)}"
        )
    if len(images) != len(labels):
        raise ExperimentError(
            f"{source}: {len(images)} images but {len(labels)} labels; "
            "they do not belong together, fetch both again"
        )
    if complete and len(images) != count:
        raise ExperimentError(
            f"{source}: expected the {count} images of {dataset.title}, got {len(images)}; "
            "fetch them again, or give a part of them as an .npz file"
        )
    if not 0 < len(images) <= count:
        raise ExperimentError(
            f"{source}: expected 1 to {count} images of {dataset.title}, got {len(images)}"
        )
    need_labels(labels, 0, dataset.classes - 1, source)
    if images.max() > dataset.white:
        raise ExperimentError(
            f"{source}: pixels of {dataset.title} lie in [0, {dataset.white}], got {images.max()}"
        )
    # Scale in one step, without temporary copies: a data set in float32 is large.
    scaled = np.divide(images, np.float32(dataset.white), dtype=np.float32, order="C")
    return Images(scaled, labels.astype(np.int32))


def need_labels(labels: np.ndarray, first: int, last: int, source: str) -> None:
    """Raises an ExperimentError if one of the labels `[N]` does not lie in `first` to `last`."""
    wrong = np.flatnonzero((labels < first) | (labels > last))
    if wrong.size:
        raise ExperimentError(
            f"{source}: labels must be {first} to {last}, "
            f"got {labels[wrong[0]]} at index {wrong[0]}; fetch the data again"
        )


def first(train: Images, count: int) -> Images:
    """Keeps the first `count` training images; 0 keeps all.

    Raises:
      ExperimentError: for more than there are.
    """
    if not 0 <= count <= len(train):
        raise ExperimentError(
            f"config.data.train must lie in [0, {len(train)}], the number of training images, "
            f"got {count}"
        )
    return train.take(slice(count or None))


def hold_out(train: Images, count: int) -> tuple[Images, Images]:
    """Splits off the last `count` images: returns (training images, validation images).

    Raises:
      ExperimentError: if no training image would remain, or if the images are sorted by class, so
        that the last ones would cover the last classes only.
    """
    if not 0 <= count < len(train):
        raise ExperimentError(
            f"config.data.validation must lie in [0, {len(train)}), below the number of training "
            f"images, got {count}"
        )
    steps = np.diff(train.labels)
    if count and np.any(steps) and (np.all(steps >= 0) or np.all(steps <= 0)):
        raise ExperimentError(
            "config.data.validation takes the last training images, and these are sorted by class; "
            "shuffle them in the file, or set config.data.validation to 0"
        )
    remaining = len(train) - count
    return train.take(slice(None, remaining)), train.take(slice(remaining, None))

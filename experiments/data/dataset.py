"""The facts of a data set, and the interface of its readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Raw(NamedTuple):
    """A reader's result: images uint8 `[N, H, W, channels]` and labels `[N]`, not yet checked.

    `source` names the file or folder in messages.
    """

    images: np.ndarray
    labels: np.ndarray
    source: str


Parts = tuple[Raw, Raw]  # training, test


@dataclass(frozen=True)
class Reader:
    """One format of a data set.

    `names` are its files or folders; any of them in a folder identifies the format. `folder` is
    the folder that the official archive unpacks to; it may lie inside the folder of `data.dir`.
    """

    names: tuple[str, ...]
    read: Callable[[Path, DataSet], Parts]
    files: str = ""  # the names in messages; empty if messages name them in another way
    folder: str = ""
    remark: str = ""  # added to the title of results on this format
    complete: bool = True  # whether the format always holds all images


@dataclass(frozen=True)
class DataSet:
    """The facts of a data set; the first of `readers` that applies is used."""

    title: str
    shape: tuple[int, int, int]  # height, width, channels
    classes: int
    train: int  # images
    test: int
    readers: tuple[Reader, ...]
    tfds: str = ""  # the name in TensorFlow Datasets, if it has one
    bundled: Callable[[], Parts] | None = None  # reads it from a Python package
    white: int = 255  # the pixel value that becomes 1.0

    @property
    def layout(self) -> str:
        """The shape of its images for messages: `[N, H, W, channels]`."""
        return f"[N, {', '.join(map(str, self.shape))}]"

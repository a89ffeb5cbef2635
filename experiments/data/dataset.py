"""What is known of a data set before it is read, and the form of its readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Raw(NamedTuple):
    """What a reader found: images uint8 `[N, H, W, channels]` and labels `[N]`, not yet checked.

    `source` is the file or folder, for messages.
    """

    images: np.ndarray
    labels: np.ndarray
    source: str


Parts = tuple[Raw, Raw]  # to train on, to test on


@dataclass(frozen=True)
class Reader:
    """One format that a data set comes in.

    `names` are its files or folders: one of them in a folder means that the format is there.
    `folder` is what the official archive unpacks to; it may lie inside the given folder.
    """

    names: tuple[str, ...]
    read: Callable[[Path, DataSet], Parts]
    files: str = ""  # the names for messages; empty if another way names them
    folder: str = ""
    remark: str = ""  # what results on this format must say
    complete: bool = True  # whether the format always holds all images


@dataclass(frozen=True)
class DataSet:
    """The facts of a data set; `readers` in order of preference, the first that applies is used."""

    title: str
    shape: tuple[int, int, int]  # height, width, channels
    classes: int
    train: int  # images
    test: int
    readers: tuple[Reader, ...]
    tfds: str = ""  # the name in TensorFlow Datasets; empty if it is not there
    bundled: Callable[[], Parts] | None = None  # from a Python package
    white: int = 255  # the value of a pixel that becomes 1.0

    @property
    def layout(self) -> str:
        """The shape of its images as messages have it: `[N, H, W, channels]`."""
        return f"[N, {', '.join(map(str, self.shape))}]"

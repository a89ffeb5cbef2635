"""MNIST, 60 000 + 10 000 grey images of 28x28 pixels, from IDX files or TensorFlow Datasets."""

from __future__ import annotations

from pathlib import Path

from experiments.config import DataConfig
from experiments.data.idx import find_idx, read_idx
from experiments.data.images import Images, Loaded, from_bytes
from experiments.data.tfds import read_tfds
from experiments.errors import ExperimentError

_CLASSES = 10
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_TITLE = "MNIST"
_FILES = "the four IDX files (train-images-idx3-ubyte.gz ...)"


def load(config: DataConfig) -> Loaded:
    """Training and test images: from the IDX files in `config.dir` if it is set, else from TFDS.

    Raises:
      ExperimentError: if the data is missing or damaged; the message names both ways to provide it.
    """
    if config.dir:
        folder = Path(config.dir).expanduser()
        if not folder.is_dir():
            raise ExperimentError(
                f"--config.data.dir={config.dir}: no such folder; "
                "it must hold the four IDX files of MNIST"
            )
        train, test = (_from_idx(folder, split) for split in ("train", "test"))
    else:
        train, test = (
            from_bytes(
                *read_tfds("mnist", split, config, title=_TITLE, files=_FILES),
                _CLASSES,
                f"tfds mnist ({split})",
            )
            for split in ("train", "test")
        )
    return Loaded(train, test, _TITLE)


def _from_idx(folder: Path, split: str) -> Images:
    prefix = _IDX_PREFIX[split]
    images = read_idx(find_idx(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(find_idx(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
    return from_bytes(images[..., None], labels, _CLASSES, f"{folder} ({split})")

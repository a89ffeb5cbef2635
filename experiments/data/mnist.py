"""MNIST, 60 000 + 10 000 grey images of 28x28 pixels, from IDX files or TensorFlow Datasets."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from experiments.config import DataConfig
from experiments.data.idx import find_idx, read_idx
from experiments.data.images import Images, from_bytes
from experiments.errors import ExperimentError

_CLASSES = 10
_IDX_PREFIX = {"train": "train", "test": "t10k"}


def load(config: DataConfig) -> tuple[Images, Images]:
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
        return _from_idx(folder, "train"), _from_idx(folder, "test")
    return _from_tfds(config, "train"), _from_tfds(config, "test")


def _from_idx(folder: Path, split: str) -> Images:
    prefix = _IDX_PREFIX[split]
    images = read_idx(find_idx(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(find_idx(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
    return from_bytes(images[..., None], labels, _CLASSES, f"{folder} ({split})")


def _from_tfds(config: DataConfig, split: str) -> Images:
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # warns at length about data that is not there
    try:
        # Never downloads: preparing MNIST needs TensorFlow, reading it does not.
        source = tfds.data_source(
            "mnist", split=split, data_dir=config.tfds_dir or None, download=False
        )
    except Exception as error:  # TFDS raises many types for data that is not there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExperimentError(
            f"MNIST is not there ({reason[:160]}). Either pass --config.data.dir=FOLDER with the "
            "four IDX files (train-images-idx3-ubyte.gz ...), or prepare it for TFDS "
            "with: pip install tensorflow && tfds build mnist --file_format=array_record"
        ) from error
    records = [source[index] for index in range(len(source))]
    images = np.stack([np.asarray(record["image"], np.uint8) for record in records])
    labels = np.asarray([record["label"] for record in records])
    return from_bytes(images, labels, _CLASSES, f"tfds mnist ({split})")

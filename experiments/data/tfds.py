"""Images of a data set that TensorFlow Datasets has prepared."""

from __future__ import annotations

import logging

import numpy as np

from experiments.config import DataConfig
from experiments.errors import ExperimentError


def read_tfds(
    name: str, split: str, config: DataConfig, *, title: str, files: str
) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 `[N, H, W, channels]` and labels `[N]` of one split.

    Args:
      name: what TFDS calls the data set.
      split: `"train"` or `"test"`.
      config: of the run, with the folder of TFDS.
      title: what people call the data set.
      files: what `config.data.dir` may hold instead, for the message.

    Raises:
      ExperimentError: if the data is not there; the message names both ways to provide it.
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # warns at length about data that is not there
    try:
        # Never downloads: preparing a data set needs TensorFlow, reading it does not.
        source = tfds.data_source(
            name, split=split, data_dir=config.tfds_dir or None, download=False
        )
    except Exception as error:  # TFDS raises many types for data that is not there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExperimentError(
            f"{title} is not there ({reason[:160]}). Either pass --config.data.dir=FOLDER with "
            f"{files}, or prepare it for TFDS "
            f"with: pip install tensorflow && tfds build {name} --file_format=array_record"
        ) from error
    records = [source[index] for index in range(len(source))]
    images = np.stack([np.asarray(record["image"], np.uint8) for record in records])
    return images, np.asarray([record["label"] for record in records])

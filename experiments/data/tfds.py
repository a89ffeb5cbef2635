"""Reads data sets that TensorFlow Datasets has prepared, without TensorFlow itself."""

from __future__ import annotations

import logging

import numpy as np

from experiments.data.dataset import DataSet, Parts, Raw
from experiments.data.files import reason
from experiments.settings.errors import ExperimentError


def read_tfds(dataset: DataSet, folder: str) -> Parts:
    """Reads all images and labels of `dataset` from TFDS's `folder` (empty: its default).

    Raises:
      FileNotFoundError: with the reason, if the data set is missing, or cannot be read without
        TensorFlow.
      ExperimentError: if it is damaged.
    """
    try:
        import tensorflow_datasets as tfds  # slow to import, and only needed here
    except ImportError as error:
        raise FileNotFoundError(f"TFDS cannot be used ({reason(error)})") from error
    # Silence its long warnings about missing data.
    logging.getLogger("absl").setLevel(logging.ERROR)
    sources = []
    for split in ("train", "test"):
        try:
            # Never downloads: preparing a data set needs TensorFlow, reading it does not.
            source = tfds.data_source(
                dataset.tfds, split=split, data_dir=folder or None, download=False
            )
        except Exception as error:  # TFDS raises many types for missing data
            raise FileNotFoundError(f"TFDS has no {dataset.tfds} ({reason(error)})") from error
        sources.append((source, f"TFDS {dataset.tfds} ({split})"))
    train, test = (_read(source, dataset, name) for source, name in sources)
    return train, test


def _read(records, dataset: DataSet, source: str) -> Raw:
    images = np.empty((len(records), *dataset.shape), np.uint8)
    labels = np.empty(len(records), np.int64)
    for index in range(len(records)):
        try:
            image, labels[index] = records[index]["image"], records[index]["label"]
        except Exception as error:  # and many types for damaged records
            raise ExperimentError(
                f"{source}: record {index} cannot be read ({reason(error)}); prepare it again"
            ) from error
        if image.dtype != np.uint8 or image.shape != dataset.shape:
            raise ExperimentError(
                f"{source}: expected images uint8 {list(dataset.shape)}, got {image.dtype} "
                f"{list(image.shape)} in record {index}; prepare it again"
            )
        images[index] = image
    return Raw(images, labels, source)

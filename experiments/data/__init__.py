"""Data sets by name, all in one random-access in-memory form."""

from __future__ import annotations

from experiments.config import DataConfig
from experiments.data import cifar10, digits, mnist
from experiments.data.images import Images as Images
from experiments.data.images import Splits as Splits
from experiments.data.images import hold_out
from experiments.errors import ExperimentError

DATASETS = {"digits": digits.load, "mnist": mnist.load, "cifar10": cifar10.load}


def load(config: DataConfig) -> Splits:
    """The training, validation and test images that `config` names.

    The validation images are the last `config.validation` training images and are not trained on;
    with 0 there are none and every training image is trained on.

    Raises:
      ExperimentError: for an unknown name, unreadable data, or a validation split that leaves
        nothing.
    """
    if config.name not in DATASETS:
        raise ExperimentError(
            f"unknown data.name {config.name!r}: use one of {', '.join(sorted(DATASETS))}"
        )
    loaded = DATASETS[config.name](config)
    train, validation = hold_out(loaded.train, config.validation)
    return Splits(train=train, validation=validation, test=loaded.test, title=loaded.title)

"""Data sets as the papers prepare them: held-out images, augmentation, normalisation.

Radii are always in pixels of `[0, 1]`, because normalisation is the model's first layer.
"""

from __future__ import annotations

from typing import NamedTuple

from experiments.configs import common


class Preparation(NamedTuple):
    """The preparation of one data set in one paper.

    `validation` is our own choice, a tenth of the images or 5 000 (MNIST): the papers hold nothing
    out and select on the test images.
    """

    name: str
    validation: int
    flip: bool = False
    crop: int = 0
    border: str = "zeros"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


_CIFAR10 = Preparation("cifar10", 5000, flip=True, crop=4)
_CIFAR10_NORMALISED = _CIFAR10._replace(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_TINY_IMAGENET = Preparation("tiny_imagenet", 10_000, flip=True, crop=4)

PREPARATIONS = {
    "mnist": Preparation("mnist", 5000),
    # LLM, BCP
    "cifar10": _CIFAR10,
    "cifar10_crown_ibp": _CIFAR10_NORMALISED,
    # GradDiv: as LLM on CIFAR-10, and the same on STL-10
    "cifar10_plain": _CIFAR10,
    "stl10": Preparation("stl10", 500, flip=True, crop=4),
    # FAST, CTBench
    "cifar10_fast": _CIFAR10_NORMALISED._replace(crop=2, border="edge"),
    # CAP, REG: one deviation for all channels, so that a ball remains a ball
    "cifar10_cap": _CIFAR10._replace(mean=(0.485, 0.456, 0.406), std=(0.225, 0.225, 0.225)),
    # LLM
    "svhn": Preparation(
        "svhn", 7325, crop=4, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)
    ),
    # BCP
    "tiny_imagenet": _TINY_IMAGENET,
    # FAST, CTBench
    "tiny_imagenet_fast": _TINY_IMAGENET._replace(
        border="edge", mean=(0.4802, 0.4481, 0.3975), std=(0.2302, 0.2265, 0.2262)
    ),
}


def prepare(config: common.ConfigDict, name: str, *, selects: bool = True) -> None:
    """Applies `name` of `PREPARATIONS`; without `selects` no images are held out."""
    preparation = PREPARATIONS[name]
    config.data.name = preparation.name
    config.data.validation = preparation.validation if selects else 0
    config.augment.flip, config.augment.crop = preparation.flip, preparation.crop
    config.augment.border = preparation.border
    config.model.mean, config.model.std = preparation.mean, preparation.std

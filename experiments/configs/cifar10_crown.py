"""CROWN-IBP (Zhang et al. 2020) on CIFAR-10, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_crown.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_crown.py:eps=8,beta=0

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, CROWN-IBP, Medium: standard / PGD-100 / verified error in %, by
the test radius `eps` in 255ths

            beta=1                  beta=0
    2    32.48 / 42.77 / 50.15   36.30 / 47.13 / 52.70
    4    45.56 / 58.24 / 64.47   45.92 / 57.58 / 62.07
    6    54.72 / 65.28 / 71.04   53.54 / 64.14 / 67.35
    8    61.37 / 70.66 / 75.37   55.09 / 66.68 / 69.97
    16   76.65 / 81.90 / 84.42   66.62 / 76.13 / 77.88

`beta` is the final weight of the linear bounds against interval bounds. `kappa` is the weight of
the natural loss at radius 0 (the paper has 1 and 0); it falls to 0 at the end. `eps_train=1.1x`
trains at 1.1 times eps. `epochs=200` is the recipe of the paper's figures, and `epochs=100`
compresses that of 400 for a first look.

Two differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the epoch is selected on held-out training images (the paper
selects on the test set).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration."""
    options = common.arguments(variant, **landscape.CIFAR10, **landscape.LINEAR)
    config = common.base()
    landscape.cifar10(config, "crown-ibp", options)
    return config

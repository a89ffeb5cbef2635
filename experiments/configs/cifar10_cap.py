"""CAP (Wong & Kolter 2018) on CIFAR-10, l-inf, by 50 random projections.

    python -m experiments.main --config=experiments/configs/cifar10_cap.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_cap.py:eps=2

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, CAP, Medium: standard / PGD-100 / verified error in %, by the
test radius `eps` in 255ths

    2    28.80 / 38.95 / 48.50
    4    40.78 / 52.62 / 61.88
    6    49.20 / 60.85 / 69.03
    8    56.77 / 66.78 / 73.02
    16   75.11 / 80.67 / 82.07

`eps_train=1.1x` trains at 1.1 times eps. `epochs=200` is the recipe of the paper's figures, and
`epochs=100` compresses that of 400 for a first look.

Two differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the last epoch of training on all images counts (the paper
selects on the test set).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration."""
    options = common.arguments(variant, **landscape.CIFAR10)
    config = common.base()
    landscape.cifar10(config, "cap", options)
    return config

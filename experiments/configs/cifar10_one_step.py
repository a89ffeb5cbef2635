"""One-step optimised slopes (Lee et al. 2021) on CIFAR-10, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_one_step.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_one_step.py:eps=2,kappa=0,steps=7

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, OURS, Medium: standard / PGD-100 / verified error in %, by the
test radius `eps` in 255ths

            beta=1                  beta=0
    2    31.49 / 42.73 / 49.42   37.77 / 48.30 / 54.43  (kappa=0: 32.04 / 43.13 / 49.62,
                                                         with steps=7: 31.40 / 42.30 / 49.20,
                                                         with eps_train=1.1x:
                                                         33.04 / 43.70 / 48.60)
    4    42.53 / 55.55 / 61.52
    6    50.19 / 61.88 / 66.90
    8    56.01 / 66.17 / 69.70   58.87 / 67.76 / 71.50  (kappa=0: 56.35 / 67.06 / 70.56,
                                                         with steps=7: 54.44 / 66.29 / 71.53)
    16   65.93 / 75.39 / 77.87   66.24 / 74.69 / 78.66

The rows in brackets have kappa=0 and beta=1. OURS of Table C.1, 57.14 / 66.88 / 71.45 % at 8/255,
is `epochs=200,kappa=0` (`cifar10_slopes.py` has the rest of that table). `beta` is the final weight
of the linear bounds against interval bounds. `kappa` is the weight of the natural loss at radius 0
(the paper has 1 and 0); it falls to 0 at the end. `eps_train=1.1x` trains at 1.1 times eps.
`epochs=200` is the recipe of the paper's figures, and `epochs=100` compresses that of 400 for a
first look.

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
    choices = {**landscape.CIFAR10, **landscape.LINEAR, "steps": ("1", "7")}
    options = common.arguments(variant, **choices)
    config = common.base()
    landscape.cifar10(config, "one-step", options)
    landscape.one_step(config, options)
    return config

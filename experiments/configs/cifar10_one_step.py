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

What is in brackets has kappa=0 and beta=1. OURS of Table C.1, 57.14 / 66.88 / 71.45 % at 8/255, is
`epochs=200,kappa=0` (`cifar10_slopes.py` has the rest of that table). `beta` is the weight of the
linear bounds at the end, against that of interval bounds. `kappa` is the weight of the natural loss
at radius 0 (the paper has 1 and 0); at the end it is 0. `eps_train=1.1x` trains at 1.1 times eps.
`epochs=200` is the recipe of the paper's figures, `epochs=100` the one of 400 compressed, for a
first look.

It differs from the paper in two things: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the last training images that are held out select the epoch (the
paper selects on the test set).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size."""
    known = {**landscape.CIFAR10, **landscape.LINEAR, "steps": ("1", "7")}
    given = common.arguments(variant, **known)
    config = common.base()
    landscape.cifar10(config, "one-step", given)
    landscape.one_step(config, given)
    return config

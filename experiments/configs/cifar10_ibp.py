"""IBP (Gowal et al. 2018) on CIFAR-10, l-inf.

    python -m experiments.main --config=experiments/configs/cifar10_ibp.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_ibp.py:eps=2,kappa=0

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, IBP, Medium: standard / PGD-100 / verified error in %, by the
test radius `eps` in 255ths

    2    37.98 / 49.40 / 55.39  (kappa=0: 43.60 / 52.62 / 56.58)
    4    46.42 / 57.42 / 62.80
    6    52.84 / 63.92 / 68.79
    8    55.71 / 66.79 / 70.95  (kappa=0: 64.11 / 70.68 / 72.99)
    16   67.10 / 75.12 / 78.26

`kappa` is the weight of the natural loss at radius 0 (the paper has 1 and 0); it falls to 0 at the
end. `eps_train=1.1x` trains at 1.1 times eps. `epochs=200` is the recipe of the paper's figures,
and `epochs=100` compresses that of 400 for a first look.

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
    options = common.arguments(variant, **landscape.CIFAR10, **landscape.KAPPA)
    config = common.base()
    landscape.cifar10(config, "ibp", options)
    return config

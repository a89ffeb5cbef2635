"""CAP (Wong & Kolter 2018) on MNIST, l-inf, by 50 random projections.

    python -m experiments.main --config=experiments/configs/mnist_cap.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_cap.py:eps=0.2

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, CAP, Large*: standard / PGD-100 / verified error in %, by the
test radius `eps`

    0.1    0.80 /  1.73 /  3.19
    0.2    3.22 /  6.72 / 11.06
    0.3   19.19 / 35.84 / 47.85

`eps_train=more` (the default) trains at eps + 0.1, `eps_train=same` at eps.

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
    choices = {**landscape.MNIST, "eps": ("0.1", "0.2", "0.3")}
    options = common.arguments(variant, **choices)
    config = common.base()
    landscape.mnist(config, "cap", options)
    return config

"""CROWN-IBP (Zhang et al. 2020) on SVHN at l-inf radius 0.01.

    python -m experiments.main --config=experiments/configs/svhn_crown.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/svhn_crown.py:beta=0

FOLDER holds SVHN's cropped digits; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, CROWN-IBP (beta = 1), Large: 17.25 / 30.84 / 39.88 % (standard
/ PGD-100 / verified error). `kappa` is the weight of the natural loss at radius 0 (the paper has 1
and 0); it falls to 0 at the end. `beta` is the final weight of the linear bounds against interval
bounds (1 in the row above; with 0 the method ends as IBP).

Two differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the epoch is selected on held-out training images (the paper
selects on the test set).

Needs a GPU; not run yet. The paper's text also has the radius 0.001; its table and settings have
0.01.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration."""
    options = common.arguments(variant, **landscape.LINEAR)
    config = common.base()
    landscape.svhn(config, "crown-ibp", options)
    return config

"""CAP (Wong & Kolter 2018) on SVHN at l-inf radius 0.01.

    python -m experiments.main --config=experiments/configs/svhn_cap.py --config.data.dir=FOLDER

FOLDER holds SVHN's cropped digits; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, CAP, Small*: 16.88 / 30.16 / 37.09 % (standard / PGD-100 /
verified error). It has no arguments.

Two differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the last epoch of training on all images counts (the paper
selects on the test set).

Needs a GPU; not run yet. The paper's text also has the radius 0.001; its table and settings have
0.01.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration."""
    options = common.arguments(variant)
    config = common.base()
    landscape.svhn(config, "cap", options)
    return config

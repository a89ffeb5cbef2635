"""One-step optimised slopes (Lee et al. 2021) on SVHN at l-inf radius 0.01.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/svhn_one_step.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/svhn_one_step.py:steps=7

FOLDER holds SVHN's cropped digits; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, OURS, Large: 16.41 / 30.43 / 39.44 % (standard / PGD-100 /
verified error). `kappa` is the weight of the natural loss at radius 0 (the paper has 1 and 0); it
falls to 0 at the end. `beta` is the final weight of the linear bounds against interval bounds (1 in
the row above; with 0 the method ends as IBP). `steps=7` optimises the slopes in seven short steps.

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
    options = common.arguments(variant, **landscape.LINEAR, steps=("1", "7"))
    config = common.base()
    landscape.svhn(config, "one-step", options)
    landscape.one_step(config, options)
    return config

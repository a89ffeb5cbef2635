"""IBP (Gowal et al. 2018) on SVHN at l-inf radius 0.01.

    python -m experiments.main --config=experiments/configs/svhn_ibp.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/svhn_ibp.py:kappa=0

FOLDER holds SVHN's cropped digits; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, IBP, Large: 19.91 / 34.12 / 43.83 % (standard / PGD-100 /
verified error). `kappa` is the weight of the natural loss at radius 0 (the paper has 1 and 0); it
falls to 0 at the end.

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
    options = common.arguments(variant, **landscape.KAPPA)
    config = common.base()
    landscape.svhn(config, "ibp", options)
    return config

"""One-step optimised slopes (Lee et al. 2021) on MNIST, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_one_step.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_one_step.py:eps=0.3,beta=0

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, OURS, Large: standard / PGD-100 / verified error in %, by the
test radius `eps`

            beta=1                beta=0
    0.1   1.09 / 1.77 /  2.36   1.29 / 2.29 /  3.58
    0.2   1.70 / 3.44 /  4.34   1.61 / 3.09 /  5.71
    0.3   3.49 / 5.59 /  9.79   2.42 / 4.37 /  7.84  (kappa=0: 3.39 / 4.85 / 9.12,
                                                   kappa=0,eps_train=same: 1.70 / 4.82 / 9.20)
    0.4   3.49 / 6.77 / 15.42   2.42 / 5.68 / 13.72

`eps_train=more` (the default) trains at `min(0.4, eps + 0.1)`, `eps_train=same` at eps. The rows at
0.3 and 0.4 are of the same network. `kappa` is the weight of the natural loss at radius 0 (the
paper has 1 and 0); it falls to 0 at the end. `beta` is the final weight of the linear bounds
against interval bounds. `steps=7` optimises the slopes in seven short steps. The rows in brackets
have beta=1.

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
    choices = {**landscape.MNIST, **landscape.LINEAR, "steps": ("1", "7")}
    options = common.arguments(variant, **choices)
    config = common.base()
    landscape.mnist(config, "one-step", options)
    landscape.one_step(config, options)
    return config

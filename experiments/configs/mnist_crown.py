"""CROWN-IBP (Zhang et al. 2020) on MNIST, l-inf.

    python -m experiments.main --config=experiments/configs/mnist_crown.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_crown.py:eps=0.3,beta=0
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_crown.py:cpu

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, CROWN-IBP (beta = 1), Large: standard / PGD-100 / verified
error in %, by the test radius `eps`

    0.1   1.07 /  1.69 /  2.10
    0.2   2.99 /  5.50 /  7.97
    0.3   5.73 / 10.76 / 16.28  (beta=0,kappa=0: 2.37 / 3.63 / 7.22,
                                  beta=0,kappa=0,eps_train=same: 1.48 / 3.52 / 9.40)
    0.4   5.73 / 14.63 / 23.80

`eps_train=more` (the default) trains at `min(0.4, eps + 0.1)`, `eps_train=same` at eps. The rows at
0.3 and 0.4 are of the same network. `kappa` is the weight of the natural loss at radius 0 (the
paper has 1 and 0); it falls to 0 at the end. `beta` is the final weight of the linear bounds
against interval bounds (1 in all the rows above; with 0 the method ends as IBP).

Two differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the epoch is selected on held-out training images (the paper
selects on the test set).

Needs a GPU; not run yet.

`:cpu`: Small* on all 60 000 images, 16 epochs: 1 natural, 2 with CROWN-IBP, 13 with IBP; 10 to 20
minutes on 2 CPU cores.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration, or `:cpu`."""
    options = common.arguments(variant, cpu=False, **landscape.MNIST, **landscape.LINEAR)
    common.exclude(options, "cpu", "beta", "kappa", "eps_train")
    config = common.base()
    if options.cpu:
        # An epoch with linear bounds takes ten times as long as the rest.
        landscape.mnist_two_cores(
            config, "crown-ibp", options.eps, epochs=16, ramp=2.0, falls=(11.0, 14.0)
        )
    else:
        landscape.mnist(config, "crown-ibp", options)
    return config

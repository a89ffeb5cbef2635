"""IBP (Gowal et al. 2018) on MNIST, l-inf.

    python -m experiments.main --config=experiments/configs/mnist_ibp.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_ibp.py:eps=0.3,kappa=0
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_ibp.py:cpu
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_ibp.py:cpu60,eps=0.2

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Loss Landscape Matters", Table 3.4, IBP, Large: standard / PGD-100 / verified error in %, by the
test radius `eps`

    0.1   1.18 / 2.16 /  3.52
    0.2   2.00 / 3.29 /  6.31
    0.3   3.50 / 5.85 / 10.45  (kappa=0: 3.67 / 5.55 / 9.74,
                                 kappa=0,eps_train=same: 1.95 / 3.31 / 12.90)
    0.4   3.50 / 7.30 / 17.96

`eps_train=more` (the default) trains at `min(0.4, eps + 0.1)`, `eps_train=same` at eps. The rows at
0.3 and 0.4 are of the same network. `kappa` is the weight of the natural loss at radius 0 (the
paper has 1 and 0); it falls to 0 at the end.

Two differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the epoch is selected on held-out training images (the paper
selects on the test set).

Needs a GPU; not run yet.

`:cpu` is Small* on all 60 000 images, 25 epochs at eps + 0.05: 6 to 12 minutes on 2 CPU cores at
0.1. `:cpu60` has 60 epochs at eps + 0.1 (about 15 minutes; 2.01 / 4.28 at 0.1), to compare with the
rows above.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration, or one for 2 CPU cores."""
    options = common.arguments(
        variant, cpu=False, cpu60=False, **landscape.MNIST, **landscape.KAPPA
    )
    common.exclude(options, "cpu", "cpu60", "kappa", "eps_train")
    common.exclude(options, "cpu60", "kappa", "eps_train")
    config = common.base()
    if options.cpu:
        landscape.mnist_two_cores(
            config, "ibp", options.eps, epochs=25, ramp=6.0, falls=(18.0, 22.0)
        )
    elif options.cpu60:
        landscape.mnist_two_cores(
            config, "ibp", options.eps, epochs=60, ramp=20.0, falls=(42.0, 54.0), more=0.1
        )
    else:
        landscape.mnist(config, "ibp", options)
    return config

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

`eps_train=more` (the default) trains at `min(0.4, eps + 0.1)`, `eps_train=same` at eps. At 0.3 and
0.4 the rows are of one network. `kappa` is the weight of the natural loss at radius 0 (the paper
has 1 and 0); at the end it is 0.

It differs from the paper in two things: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), and the last training images that are held out select the epoch (the
paper selects on the test set).

Needs a GPU; not run yet.

`:cpu` is Small* on all 60 000 images at 2 CPU cores, 25 epochs at eps + 0.05: at 0.1, 6 to 12
minutes. `:cpu60` has 60 epochs at eps + 0.1 (about 15 minutes; 2.01 / 4.28 at 0.1): compare with
the rows above for what training at a larger radius does.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size, or one for 2 CPU cores."""
    given = common.arguments(variant, cpu=False, cpu60=False, **landscape.MNIST, **landscape.KAPPA)
    common.exclude(given, "cpu", "cpu60", "kappa", "eps_train")
    common.exclude(given, "cpu60", "kappa", "eps_train")
    config = common.base()
    if given.cpu:
        landscape.mnist_two_cores(config, "ibp", given.eps, epochs=25, ramp=6.0, falls=(18.0, 22.0))
    elif given.cpu60:
        landscape.mnist_two_cores(
            config, "ibp", given.eps, epochs=60, ramp=20.0, falls=(42.0, 54.0), more=0.1
        )
    else:
        landscape.mnist(config, "ibp", given)
    return config

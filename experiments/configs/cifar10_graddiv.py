"""GradDiv on CIFAR-10, l-inf (Lee et al. 2022): random networks and their baselines on VGG-16.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_graddiv.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_graddiv.py:defence=rse,graddiv=kappa

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy. `defence` is `adv-bnn`, `rse`,
`adv-train` or `none`; the last two are deterministic. `graddiv` is the measure of the regularizer.

Accuracy in % under EOT-PGD with 20 draws per gradient (Tables 2.1 and A.5 of the thesis), by radius

                           0      0.01    0.03    0.05    0.07
    adv-bnn              75.97   67.17   44.49   21.50    6.29
    adv-bnn, dpp         76.45   66.39   44.88   22.95    8.60
    rse                  84.06   65.48   21.65    3.18    0.30
    rse, kappa           84.88   67.07   25.43    5.20    1.46
    adv-train            78.83   66.75   39.49   18.26    7.23

These defences are empirical: no number here is certified. Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import graddiv


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns a defence."""
    options = common.arguments(variant, **graddiv.choices("cifar10"))
    config = common.base()
    graddiv.train(config, "cifar10", options)
    return config

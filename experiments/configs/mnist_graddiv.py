"""GradDiv on MNIST, l-inf (Lee et al. 2022): random networks and their baselines.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_graddiv.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_graddiv.py:graddiv=none
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_graddiv.py:cpu,graddiv=none

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.
`defence` is `adv-bnn`, `rse`, `adv-train` or `none`; the last two are deterministic. `graddiv` is
the measure of the regularizer.

Accuracy in % under EOT-PGD with 20 draws per gradient (Table A.2 of the thesis), by radius

                           0      0.3     0.36    0.38    0.4
    adv-bnn              99.38   93.83   25.82    2.33    0.02
    adv-bnn, kappa       99.14   88.73   63.34   40.05   15.57
    rse                  99.44    0.70    0.27    0.19    0.15
    adv-train            99.40   94.85   26.57   12.44    3.48

These defences are empirical: no number here is certified. `cpu` trains Small* with LeakyReLU on
12,000 images for 10 epochs; it takes about seven minutes on 2 cores, and its results are in
docs/results/random-networks.md. The published size needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import graddiv


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns a defence, of the published size or, with `cpu`, for 2 cores."""
    options = common.arguments(variant, **graddiv.choices("mnist"), cpu=False)
    config = common.base()
    graddiv.train(config, "mnist", options)
    if options.cpu:
        graddiv.mnist_two_cores(config)
    return config

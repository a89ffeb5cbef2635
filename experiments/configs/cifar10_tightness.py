"""CAP (Wong & Kolter 2018) with the tightness regularizers d and r (REG) on CIFAR-10, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_tightness.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_tightness.py:eps=8,net=large,baseline

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Improved Training of Certifiably Robust Models": standard / PGD / verified error in %, by the test
radius in 255ths and the network; `baseline` leaves d and r out

                                        baseline                 regularised
    eps=2,net=small                  38.19 / 48.0 / 53.19    37.30 / 47.0 / 51.52
    eps=2,net=large                  29.42 / 38.5 / 45.78    29.76 / 38.8 / 45.19
    eps=8,net=small                  62.79 / 68.3 / 75.45    62.50 / 67.9 / 74.70
    eps=8,net=large                  59.73 / 68.8 / 74.04    59.82 / 68.5 / 73.74
    eps=8,net=xlarge (CROWN-IBP, r)  54.02 / 65.42 / 66.94   53.78 /      / 66.64

`net` is Small*, Medium ("Large" there; its weights of d and r are not published, Small*'s are
taken), or CROWN-IBP's largest network with CROWN-IBP's recipe of 3 200 epochs (`eps=2` is no row of
the paper). `projections=0` trains on exact bounds. `cap_sgd` is CAP's own optimiser, 60 epochs of
SGD: with `baseline` it is CAP itself.

It differs from the paper in two things: the ball is clipped to the pixel range
(`--config.robust.clip=False`; the paper does not say), and the last epoch counts, of training on
all images. d and r are summed over the classes, which the paper leaves open.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import families, tightness


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size of one row."""
    given = common.arguments(
        variant,
        baseline=False,
        cap_sgd=False,
        eps=("2", "8"),
        net=("small", "large", "xlarge"),
        projections=("50", "0"),
    )
    common.exclude(given, "net=xlarge", "cap_sgd", "projections")
    config = common.base()
    if given.net == "xlarge":
        families.cifar10_large(config, given.eps)
        config.regularizers.slack = families.SLACK
    else:
        tightness.cifar10(config, given)
    if given.cap_sgd:
        tightness.cap_sgd(config)
    if given.baseline:
        tightness.baseline(config)
    return config

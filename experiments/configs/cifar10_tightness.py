"""CAP (Wong & Kolter 2018) with the tightness regularizers d and r (REG) on CIFAR-10, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_tightness.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_tightness.py:eps=8,net=large,baseline

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Improved Training of Certifiably Robust Models": standard / PGD / verified error in %, by the test
radius in 255ths and the network; `baseline` omits d and r

                                        baseline                 regularised
    eps=2,net=small                  38.19 / 48.0 / 53.19    37.30 / 47.0 / 51.52
    eps=2,net=large                  29.42 / 38.5 / 45.78    29.76 / 38.8 / 45.19
    eps=8,net=small                  62.79 / 68.3 / 75.45    62.50 / 67.9 / 74.70
    eps=8,net=large                  59.73 / 68.8 / 74.04    59.82 / 68.5 / 73.74
    eps=8,net=xlarge (CROWN-IBP, r)  54.02 / 65.42 / 66.94   53.78 /      / 66.64

`net` is Small*, Medium (the paper's "Large"; its weights of d and r are unpublished, so those of
Small* are used), or CROWN-IBP's largest network with CROWN-IBP's recipe of 3 200 epochs (the paper
has no row of `eps=2`). `projections=0` trains on exact bounds. `cap_sgd` is CAP's own optimiser, 60
epochs of SGD; with `baseline` it is CAP itself.

Two differences from the paper: the ball is clipped to the pixel range
(`--config.robust.clip=False`; the paper does not say), and the last epoch of training on all images
counts. d and r are sums over the classes, which the paper leaves open.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import families, tightness


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration of one row."""
    options = common.arguments(
        variant,
        baseline=False,
        cap_sgd=False,
        eps=("2", "8"),
        net=("small", "large", "xlarge"),
        projections=("50", "0"),
    )
    common.exclude(options, "net=xlarge", "cap_sgd", "projections")
    config = common.base()
    if options.net == "xlarge":
        families.cifar10_large(config, options.eps)
        config.regularizers.slack = families.SLACK
    else:
        tightness.cifar10(config, options)
    if options.cap_sgd:
        tightness.cap_sgd(config)
    if options.baseline:
        tightness.baseline(config)
    return config

"""CTBench's recipes (Mao et al. 2024) on CIFAR-10, l-inf, eps in 255ths.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_ctbench.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_ctbench.py:eps=8,method=ibp

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

CTBench: standard / verified error in %, by `method` and `eps`

                      2               8
    ibp         32.51 / 44.01   51.49 / 64.72
    crown-ibp   32.40 / 42.89   51.75 / 67.41
    sabr        22.14 / 36.39   47.29 / 64.66
    taps        25.56 / 38.73   50.04 / 64.75
    staps       22.95 / 35.79   48.51 / 64.89
    mtl-ibp     21.18 / 35.59   45.72 / 64.59

The column of 8 is recalled from the publication and not checked against it. Certified by intervals
alone, the column of 2 has 45.78, 50.08, 87.88, 71.78, 99.28 and 99.38 % verified error. `cc-ibp`
and `exp-ibp` are not in the table; their recipe is that of their own paper
(`cifar10_expressive.py`).

Published certificates come from a complete verifier, ours from bounds: the two are close for IBP
and CROWN-IBP, and far apart for networks trained on attacks at small radii. Other differences: no
stochastic weight averaging (CTBench uses it for the expressive losses, and on Tiny ImageNet for
CROWN-IBP) and no shrinking of boxes after every ReLU (by 0.8 for SABR, TAPS and STAPS at 2/255);
TAPS and EXP-IBP combine the losses of each image, not the means of the batch, and TAPS' gradient is
(1 + scale) / 2 times shorter; the latent attack starts once per margin, not three times, and keeps
its last iterate, not the best; the epoch of IBP and CROWN-IBP is selected on held-out training
images, and for the rest the last epoch counts (CTBench selects on the test set).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import ctbench


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the published configuration with one method."""
    options = common.arguments(variant, eps=("2", "8"), method=ctbench.METHODS)
    config = common.base()
    ctbench.train(config, f"cifar10-{options.eps}", options.method)
    return config

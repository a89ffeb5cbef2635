"""Expressive losses (De Palma et al. 2024) on CIFAR-10, l-inf, eps in 255ths.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_expressive.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_expressive.py:eps=8,method=exp-ibp

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Expressive Losses for Verified Robustness via Convex Combinations": MTL-IBP has 19.89 / 36.76 %
(standard / verified error) at 2/255 and 46.65 / 64.56 % at 8/255 (`eps`). `method` selects the
loss, with the weights of its own paper; `cifar10_ctbench.py` has CTBench's.

Published certificates come from a complete verifier, ours from bounds: the two are far apart at
small radii. Three more differences: batch normalisation uses the statistics of the clean images for
bounds (the authors' code uses those of the attacked ones), EXP-IBP combines the losses of each
image (theirs combines the means of the batch), and the attack starts at the image itself rather
than at a random point. The last epoch counts, as in the paper.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import ctbench


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the published configuration with one of the losses."""
    options = common.arguments(variant, eps=("2", "8"), method=ctbench.EXPRESSIVE_METHODS)
    config = common.base()
    ctbench.expressive(config, f"cifar10-{options.eps}", options.method)
    return config

"""Expressive losses (De Palma et al. 2024) on MNIST, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_expressive.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_expressive.py:eps=0.3,method=cc-ibp

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Expressive Losses for Verified Robustness via Convex Combinations": MTL-IBP has 1.20 / 6.38 %
(standard / verified error) at 0.3; we have no number at 0.1 (`eps`). `method` selects the loss,
with the weights of its own paper; `mnist_ctbench.py` has CTBench's. The paper has no EXP-IBP for
MNIST; it uses the weights of MTL-IBP.

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
    options = common.arguments(variant, eps=("0.1", "0.3"), method=ctbench.EXPRESSIVE_METHODS)
    config = common.base()
    ctbench.expressive(config, f"mnist-{options.eps}", options.method)
    return config

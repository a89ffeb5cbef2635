"""Expressive losses (De Palma et al. 2024) on Tiny ImageNet at l-inf radius 1/255.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_expressive.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_expressive.py:method=cc-ibp

FOLDER holds Tiny ImageNet, which TensorFlow Datasets does not prepare.

"Expressive Losses for Verified Robustness via Convex Combinations": MTL-IBP has 62.44 / 73.91 %
(standard / verified error). `method` selects the loss, with the weights of its own paper;
`tiny_imagenet_ctbench.py` has CTBench's.

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
    options = common.arguments(variant, method=ctbench.EXPRESSIVE_METHODS)
    config = common.base()
    ctbench.expressive(config, "tiny_imagenet-1", options.method)
    return config

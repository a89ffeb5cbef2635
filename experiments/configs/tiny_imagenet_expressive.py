"""Expressive losses (De Palma et al. 2024) on Tiny ImageNet at l-inf radius 1/255.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_expressive.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_expressive.py:method=cc-ibp

FOLDER holds Tiny ImageNet, which TensorFlow Datasets does not prepare.

"Expressive Losses for Verified Robustness via Convex Combinations": MTL-IBP has 62.44 / 73.91 %
(standard / verified error). By `method`, each with its own paper's weights;
`tiny_imagenet_ctbench.py` has CTBench's.

Published certificates are by a complete verifier, ours by bounds: they are far apart at small
radii. Three more differences: batch normalisation takes the statistics of the clean images for
bounds (the authors' code those of the attacked ones), EXP-IBP combines the losses of each image
(theirs the means of the batch), and the attack starts at the image itself, not at a random point.
The last epoch counts, as there.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import ctbench


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The published size with one of the losses."""
    given = common.arguments(variant, method=ctbench.EXPRESSIVE_METHODS)
    config = common.base()
    ctbench.expressive(config, "tiny_imagenet-1", given.method)
    return config

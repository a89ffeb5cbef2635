"""Expressive losses (De Palma et al. 2024) on MNIST, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_expressive.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_expressive.py:eps=0.3,method=cc-ibp

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Expressive Losses for Verified Robustness via Convex Combinations": MTL-IBP has 1.20 / 6.38 %
(standard / verified error) at 0.3; at 0.1 (`eps`) no number is at hand. By `method`, each with its
own paper's weights; `mnist_ctbench.py` has CTBench's. EXP-IBP is not in the paper for MNIST and has
those of MTL-IBP.

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
    given = common.arguments(variant, eps=("0.1", "0.3"), method=ctbench.EXPRESSIVE_METHODS)
    config = common.base()
    ctbench.expressive(config, f"mnist-{given.eps}", given.method)
    return config

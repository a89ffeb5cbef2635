"""CTBench's recipes (Mao et al. 2024) on MNIST, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_ctbench.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_ctbench.py:eps=0.3,method=sabr

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

CTBench: standard / verified error in %, by `method` and `eps`

                     0.1             0.3
    ibp           1.13 / 1.74     1.46 / 6.20
    crown-ibp     1.06 / 1.79     1.52 / 6.10
    sabr          0.92 / 1.60     1.34 / 6.32
    taps          0.84 / 1.48     1.44 / 6.05
    staps         0.89 / 1.53     1.26 / 6.36
    mtl-ibp       0.82 / 1.63     1.26 / 6.10

Recalled from the publication, not checked against it. `cc-ibp` and `exp-ibp` are not in the table.
At 0.3 their recipe is that of their own paper (`mnist_expressive.py`).

Published certificates are by a complete verifier, ours by bounds: they are near each other for IBP
and CROWN-IBP, and far apart for networks trained on attacks at small radii. Other differences: no
stochastic weight averaging (it has it for the expressive losses, and on Tiny ImageNet for
CROWN-IBP); TAPS and EXP-IBP combine the losses of each image, not the means of the batch, and TAPS'
gradient is (1 + scale) / 2 times shorter; the latent attack starts once per margin, not three
times, and keeps its last iterate, not the best; the last training images that are held out select
the epoch of IBP and CROWN-IBP, otherwise the last epoch counts (it selects on the test set).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import ctbench


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The published size with one method."""
    given = common.arguments(variant, eps=("0.1", "0.3"), method=ctbench.METHODS)
    config = common.base()
    ctbench.train(config, f"mnist-{given.eps}", given.method)
    return config

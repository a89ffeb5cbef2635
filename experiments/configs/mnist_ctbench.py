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

The numbers are recalled from the publication and not checked against it. `cc-ibp` and `exp-ibp` are
not in the table. At 0.3 their recipe is that of their own paper (`mnist_expressive.py`).

Published certificates come from a complete verifier, ours from bounds: the two are close for IBP
and CROWN-IBP, and far apart for networks trained on attacks at small radii. Other differences: no
stochastic weight averaging (CTBench uses it for the expressive losses, and on Tiny ImageNet for
CROWN-IBP); TAPS and EXP-IBP combine the losses of each image, not the means of the batch, and TAPS'
gradient is (1 + scale) / 2 times shorter; the latent attack starts once per margin, not three
times, and keeps its last iterate, not the best; the epoch of IBP and CROWN-IBP is selected on
held-out training images, and for the rest the last epoch counts (CTBench selects on the test set).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import ctbench


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the published configuration with one method."""
    options = common.arguments(variant, eps=("0.1", "0.3"), method=ctbench.METHODS)
    config = common.base()
    ctbench.train(config, f"mnist-{options.eps}", options.method)
    return config

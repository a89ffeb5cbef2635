"""Short warm-up (Shi et al. 2021) on Tiny ImageNet at l-inf radius 1/255.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_short_warmup.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_short_warmup.py:method=ibp

FOLDER holds Tiny ImageNet, which TensorFlow Datasets does not prepare.

"Fast Certified Robust Training with Short Warmup": standard / verified error in %, by `net` and
`method`

                     ibp              crown-ibp        fast
    cnn7          74.68 / 82.84    76.27 / 83.35    74.29 / 82.36
    wide_resnet   75.65 / 83.17    75.95 / 83.08    74.59 / 82.75
    resnext       81.72 / 87.10    80.81 / 86.43    78.91 / 85.78

The paper's baselines are `method=ibp`, IBP with batch normalisation and nothing else, and
`method=crown-ibp`, CROWN-IBP with loss fusion. The ball is clipped to the pixel range, as in the
paper. One difference from the paper: the epoch is selected on held-out training images (the paper
selects on the test set). Published numbers are means of 5 seeds (`--config.seeds=5`). The
regularizers' weight is that of the authors' scripts, 0.2; gradients are not accumulated.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import short_warmup


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration with one method and one network."""
    options = common.arguments(variant, method=short_warmup.METHODS, net=short_warmup.NETS)
    config = common.base()
    short_warmup.tiny_imagenet(config, options.method, options.net)
    return config

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

`method=ibp` is IBP with batch normalisation and nothing else, `method=crown-ibp` CROWN-IBP with
loss fusion, as the paper compares with them. The ball is clipped to the pixel range, as in the
paper. It differs in one thing: the last training images that are held out select the epoch (the
paper selects on the test set). Published are means of 5 seeds (`--config.seeds=5`). The
regularizers' weight is that of its scripts, 0.2; gradients are not accumulated.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import short_warmup


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size with one method and one network."""
    given = common.arguments(variant, method=short_warmup.METHODS, net=short_warmup.NETS)
    config = common.base()
    short_warmup.tiny_imagenet(config, given.method, given.net)
    return config

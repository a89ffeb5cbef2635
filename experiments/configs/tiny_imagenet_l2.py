"""IBP on Tiny ImageNet at l2 radius 36/255.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_l2.py

FOLDER holds Tiny ImageNet, which TensorFlow Datasets does not prepare.

"Lipschitz-Certifiable Training with a Tight Outer Bound", row IBP: 8C2F, 100 epochs of SGD; it ends
as a constant model (99.5 %). The paper could not train CAP there. It has no arguments. Needs a GPU;
not run yet. Three differences: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), the last training images that are held out select the epoch, and it
has BCP's schedule (the paper does not say).
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import lipschitz


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size."""
    common.arguments(variant)
    config = common.base()
    lipschitz.tiny_imagenet(config, "ibp")
    return config

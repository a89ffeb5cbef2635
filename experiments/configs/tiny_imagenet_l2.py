"""IBP on Tiny ImageNet at l2 radius 36/255.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/tiny_imagenet_l2.py

FOLDER holds Tiny ImageNet, which TensorFlow Datasets does not prepare.

"Lipschitz-Certifiable Training with a Tight Outer Bound", row IBP: 8C2F, 100 epochs of SGD; it ends
as a constant model (99.5 %). The paper could not train CAP there. It has no arguments. Needs a GPU;
not run yet. Three differences from the paper: the ball is clipped to the pixel range (the paper's
is not; `--config.robust.clip=False`), the epoch is selected on held-out training images, and it
uses BCP's schedule (the paper states none).
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import lipschitz


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration."""
    common.arguments(variant)
    config = common.base()
    lipschitz.tiny_imagenet(config, "ibp")
    return config

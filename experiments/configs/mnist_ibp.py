"""IBP on MNIST at l-inf radius 0.1.

    python -m experiments.main --config=experiments/configs/mnist_ibp.py --config.data.dir=FOLDER
    python -m experiments.main --config=experiments/configs/mnist_ibp.py:cpu \
        --config.data.dir=FOLDER

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

Default: "Loss Landscape Matters", Table 3.4, row IBP: Large, 200 epochs, radius 0 to 0.2 in epochs
10 to 59, kappa 1 to 0. The paper has 1.18 / 2.16 / 3.52 % (standard / PGD-100 / verified error).
Needs a GPU; not run yet. It differs from the paper as `mnist_crown.py` does.

`:cpu`: Small* on all 60 000 images, 25 epochs; 6 to 12 minutes on 2 CPU cores.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size, or `:cpu`."""
    common.check_variant(variant, ("", "cpu"))
    config = common.base()
    config.robust.method = "ibp"
    config.evaluation.methods = ("interval", "crown-ibp")
    if variant == "cpu":
        common.mnist_two_cores(config)
        config.train.epochs = 25
        config.optim.milestones = (18.0, 22.0)
        config.robust.ramp_epochs = 6.0
    else:
        common.mnist_paper(config)
    return config

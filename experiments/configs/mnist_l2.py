"""CAP (Wong et al. 2018), or IBP, on MNIST at l2 radius 1.58.

    python -m experiments.main --config=experiments/configs/mnist_l2.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_l2.py:method=ibp

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

"Lipschitz-Certifiable Training with a Tight Outer Bound", row CAP: 4C3F, 11.61 / 37.75 / 56.05 %
(standard / PGD-100 / verified error). The paper has no IBP here.

Three differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), the last epoch counts for CAP while IBP selects one on held-out
images, and both use BCP's schedule, CAP without a natural loss (the paper states neither).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import lipschitz


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration with one method."""
    options = common.arguments(variant, method=("cap", "ibp"))
    config = common.base()
    lipschitz.mnist(config, options.method)
    return config

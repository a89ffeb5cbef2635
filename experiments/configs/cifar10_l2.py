"""CAP (Wong et al. 2018), or IBP, on CIFAR-10 at l2 radius 36/255.

    python -m experiments.main --config=experiments/configs/cifar10_l2.py --config.data.dir=FOLDER
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_l2.py:method=ibp,net=4c3f

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

"Lipschitz-Certifiable Training with a Tight Outer Bound": standard / PGD-100 / verified error in %,
by `net`

                             method=cap              method=ibp
    4c3f               39.86 / 44.33 / 49.71   65.50 / 68.21 / 75.61
    6c2f               39.90 / 43.80 / 49.13   67.04 / 68.92 / 76.58
    wrn                39.30 / 43.23 / 48.37
    4c3f,linf (8/255)  81.00 / 82.67 / 83.94   64.19 / 72.70 / 76.32

`linf` is the row at l-inf radius 8/255, the median of 9 seeds.

Three differences from the paper: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), the last epoch counts for CAP while IBP selects one on held-out
images, and both use BCP's schedule, CAP without a natural loss (the paper states neither).

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import lipschitz


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the paper's configuration with one method and one network."""
    nets = tuple(lipschitz.CIFAR10_MODELS)
    options = common.arguments(variant, method=("cap", "ibp"), net=nets, linf=False)
    common.exclude(options, "linf", "net=6c2f", "net=wrn")
    config = common.base()
    lipschitz.cifar10(config, options.method, options.net)
    if options.linf:
        lipschitz.linf(config)
    return config

"""BCP (Lee, Lee & Park 2020) on CIFAR-10 at l2 radius 36/255.

    python -m experiments.main --config=experiments/configs/cifar10_bcp.py --config.data.dir=FOLDER
    python -m experiments.main --config=experiments/configs/cifar10_bcp.py:cpu \
        --config.data.dir=FOLDER

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

Default: "Lipschitz-Certifiable Training with a Tight Outer Bound", row BCP: 6C2F (`:4c3f` and
`:wrn` are its other networks), 200 epochs, radius 0 to 36/255 and kappa 1 to 0 in epochs 10 to 131,
then the learning rate halves every 10 epochs; images are mirrored and moved at random. The paper
has 34.28 / 39.22 / 48.70 % (standard / PGD-100 / verified error). Needs a GPU; not run yet. Three
differences: the ball is clipped to the pixel range (the paper's is not;
`--config.robust.clip=False`), the last 5 000 training images select the epoch, and the radius ends
at its target (the released code's goes on a little).

`:cpu`: Small* on all 50 000 images, 12 epochs, for 2 CPU cores; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The paper's size with one of its networks, or `:cpu`."""
    common.check_variant(variant, ("", "4c3f", "wrn", "cpu"))
    config = common.base()
    common.cifar10_lipschitz(config, "bcp", variant)
    return config

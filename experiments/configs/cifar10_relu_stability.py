"""ReLU stability (Xiao et al. 2019) on CIFAR-10, l-inf, eps in 255ths.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_relu_stability.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_relu_stability.py:eps=8

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

The loss is that of attacked images plus `-tanh(1 + l u)` over all units and an l1 norm. "Loss
Landscape Matters", Table 3.5, cites standard / verified error in %, by the test radius `eps`

    2   38.88 / 54.07
    8   59.55 / 79.72

Published certificates are by mixed-integer programming, ours by CROWN. It differs in three more
things: the network is Small* (the paper's has kernels of 5x5 in place of 4x4), the l1 norm counts
every kernel once (there a kernel of a convolution counts once per place), and intervals for the
penalty have the radius of the schedule. The weights are recalled from the publication, not checked
against it; 200 epochs are ours.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from ml_collections import config_dict

from experiments.configs import common
from experiments.configs.recipes import relu_stability


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The method at one radius."""
    given = common.arguments(variant, eps=("2", "8"))
    config = common.base()
    relu_stability.cifar10(config, given.eps)
    return config

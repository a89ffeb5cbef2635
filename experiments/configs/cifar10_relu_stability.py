"""ReLU stability (Xiao et al. 2019) on CIFAR-10, l-inf, eps in 255ths.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_relu_stability.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/cifar10_relu_stability.py:eps=8

FOLDER holds the binary version of CIFAR-10, or `cifar10_jpeg.npz` (JPEG copies: the results say
so); without it TensorFlow Datasets must have a prepared copy.

The loss is the cross-entropy of attacked images plus `-tanh(1 + l u)` over all units and an l1
norm. "Loss Landscape Matters", Table 3.5, cites standard / verified error in %, by the test radius
`eps`

    2   38.88 / 54.07
    8   59.55 / 79.72

Published certificates come from mixed-integer programming, ours from CROWN. Three more differences
from the paper: the network is Small* (the paper's has 5x5 kernels instead of 4x4), the l1 norm
counts every kernel once (the paper's counts a convolution's kernel once per position), and the
intervals of the penalty follow the scheduled radius. The weights are recalled from the publication
and not checked against it; the 200 epochs are our choice.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import relu_stability


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the method at one radius."""
    options = common.arguments(variant, eps=("2", "8"))
    config = common.base()
    relu_stability.cifar10(config, options.eps)
    return config

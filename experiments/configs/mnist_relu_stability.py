"""ReLU stability (Xiao et al. 2019) on MNIST, l-inf.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_relu_stability.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_relu_stability.py:eps=0.3

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

The loss is the cross-entropy of attacked images plus `-tanh(1 + l u)` over all units and an l1
norm. "Loss Landscape Matters", Table 3.5, cites standard / verified error in %, by the test radius
`eps`

    0.1   1.32 /  4.87
    0.3   2.67 / 19.32

Published certificates come from mixed-integer programming, ours from CROWN, whose open images
`experiments.evaluate --methods=crown,complete --cascade` searches. Three more differences from the
paper: the network is Small* (the paper's has 5x5 kernels instead of 4x4), the l1 norm
counts every kernel once (the paper's counts a convolution's kernel once per position), and the
intervals of the penalty follow the scheduled radius. The weights are those of the released
settings, which are for 0.1; the 100 epochs are our choice.

Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import relu_stability


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the method at one radius."""
    options = common.arguments(variant, eps=("0.1", "0.3"))
    config = common.base()
    relu_stability.mnist(config, options.eps)
    return config

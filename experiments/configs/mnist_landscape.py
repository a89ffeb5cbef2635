"""The loss landscapes of "Loss Landscape Matters" (Lee et al. 2021) on MNIST, for 2 CPU cores.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_landscape.py:method=crown-ibp
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/mnist_landscape.py:method=0-1,every=100 --config.seed=1

FOLDER holds the four IDX files of MNIST; without it TensorFlow Datasets must have a prepared copy.

Every run writes what Figures 1 to 5, 7 to 10 and 14 to 16 of the paper show to `landscape.jsonl`,
every 20 steps or every 100. `method` is IBP, CROWN-IBP (beta = 1), CAP-IBP, one step, or `p-q`,
lower slopes that are 0 or 1 with these probabilities of 0 and 1 (Figure 3).

The paper has Medium on CIFAR-10 at 8/255 for 200 epochs (`cifar10_slopes.py`, `cifar10_ibp.py`,
with `--config.train.diagnostics`). Here family A of CROWN-IBP is trained at 0.3 for 12 epochs on
the first 3 000 images, all methods on the same; the radius grows in epochs 1 to 8. The other images
are held out, and nothing is selected on them. `0-1` draws nothing: it is CROWN-IBP.

With linear bounds and a line every 20 steps, a run takes 5 to 15 minutes on one CPU core.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import landscape


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns one method, measured every 20 steps or every 100."""
    slopes = ("cap-ibp", "0-0", "0-1", "1-1")
    options = common.arguments(
        variant,
        method=("crown-ibp", "ibp", "one-step", *slopes),
        every=("20", "100"),
    )
    config = common.base()
    landscape.mnist_measured(config, int(options.every))
    if options.method in slopes:
        landscape.slopes(config, options.method)
    else:
        config.robust.method = options.method
    if options.method == "ibp":
        config.train.diagnostics = ("landscape", "relus")
    return config

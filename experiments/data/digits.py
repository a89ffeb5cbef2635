"""The UCI optical digits that scikit-learn ships: 1 797 grey images of 8x8 pixels, values 0..16."""

from __future__ import annotations

import numpy as np

from experiments.config import DataConfig
from experiments.data.images import Images, Loaded

# The order of the file groups writers; a fixed permutation makes train and test alike. It is part
# of the definition of this split and must not follow the seed of the run.
_SPLIT_SEED = 0
_TEST_IMAGES = 360


def load(config: DataConfig) -> Loaded:
    """1 437 training and 360 test images, scaled to `[0, 1]`."""
    del config  # nothing to choose
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch = load_digits()
    images = (bunch.images.astype(np.float32) / np.float32(16.0))[..., None]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    everything = Images(images[order], bunch.target.astype(np.int32)[order])
    return Loaded(
        train=everything.take(slice(None, -_TEST_IMAGES)),
        test=everything.take(slice(-_TEST_IMAGES, None)),
        title="UCI digits",
    )

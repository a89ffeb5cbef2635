"""The UCI optical digits that scikit-learn ships: 1 797 grey images of 8x8 pixels, values 0..16."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.data.dataset import Parts, Raw

# The file groups images by writer, so a fixed permutation makes train and test alike. It defines
# the split and must not depend on the run's seed.
_SPLIT_SEED = 0
_TEST_IMAGES = 360


def read() -> Parts:
    """Reads the 1 437 training and 360 test images."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch: Any = load_digits()  # its annotation also covers the pair of `return_X_y=True`
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(bunch.target))
    images = bunch.images.astype(np.uint8)[order, ..., None]  # whole numbers as floats
    labels = bunch.target[order]
    train, test = (
        Raw(images[part], labels[part], "scikit-learn digits")
        for part in (slice(None, -_TEST_IMAGES), slice(-_TEST_IMAGES, None))
    )
    return train, test

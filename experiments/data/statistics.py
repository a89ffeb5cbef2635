"""Published means and standard deviations per channel, for `config.model.mean` and `.std`.

Radii stay in pixels of `[0, 1]`: the model normalises in its first layer.
"""

from __future__ import annotations

from typing import NamedTuple


class Statistics(NamedTuple):
    """One value per channel, of pixels in `[0, 1]`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# CROWN-IBP (Zhang et al. 2020) and fast certified training (Shi et al. 2021).
CIFAR10 = Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
# Wong et al. 2018: one deviation, so that a ball stays a ball.
CIFAR10_CAP = Statistics((0.485, 0.456, 0.406), (0.225, 0.225, 0.225))
# "Loss Landscape Matters" (Lee et al. 2021).
SVHN = Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
# Fast certified training (Shi et al. 2021).
TINY_IMAGENET = Statistics((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))

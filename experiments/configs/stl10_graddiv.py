"""GradDiv on STL-10, l-inf (Lee et al. 2022): random networks and their baselines.

    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/stl10_graddiv.py
    python -m experiments.main --config.data.dir=FOLDER \
        --config=experiments/configs/stl10_graddiv.py:graddiv=none

FOLDER holds the binary version of STL-10. `defence` is `adv-bnn`, `rse`, `adv-train` or `none`; the
last two are deterministic. `graddiv` is the measure of the regularizer.

Accuracy in % under EOT-PGD with 20 draws per gradient (Table A.3 of the thesis), by radius

                           0      0.01    0.03    0.05    0.07
    adv-bnn              54.85   47.16   31.65   18.53    9.05
    adv-bnn, mean        60.31   53.36   38.94   26.23   15.05
    rse                  73.65   43.65    7.69    0.88    0.04
    adv-train            62.43   47.84   25.18   11.91    4.74

These defences are empirical: no number here is certified. The thesis validates on the last 10 % of
the training images; here all are trained on. Needs a GPU; not run yet.
"""

from __future__ import annotations

from experiments.configs import common
from experiments.configs.recipes import graddiv


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns a defence."""
    options = common.arguments(variant, **graddiv.choices("stl10"))
    config = common.base()
    graddiv.train(config, "stl10", options)
    return config

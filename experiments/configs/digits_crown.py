"""CROWN-IBP on the 8x8 digits that scikit-learn ships: the smallest complete run, for a first look.

    python -m experiments.main --config=experiments/configs/digits_crown.py --workdir=runs/digits

It reproduces no paper and needs no download: 1 293 training, 144 selection and 360 test images. It
takes about half a minute on 2 CPU cores and ends near 3.3 / 14 / 19 % (standard / PGD / verified
error) at l-inf radius 0.1. `python launch/sweep.py --config=experiments/configs/digits_crown.py
--run` also trains at larger radii, for the same `eps_test`.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.configs import common


def get_config(variant: str = "") -> common.ConfigDict:
    """Returns the only size, which fits 2 CPU cores (`:cpu` is the same)."""
    common.arguments(variant, cpu=False)
    config = common.base()
    config.data.name = "digits"
    config.data.validation = 144
    config.model.name = "tiny"
    config.train.epochs = 40
    config.train.batch_size = 64
    config.optim.lr = 3e-3
    config.optim.milestones = (30.0, 36.0)
    config.optim.factor = 0.2
    config.robust.method = "crown-ibp"
    config.robust.eps_train = 0.1
    config.robust.eps_test = 0.1
    config.robust.warmup_epochs = 2.0
    config.robust.ramp_epochs = 16.0
    config.robust.kappa = (1.0, 0.5)
    config.robust.beta = (1.0, 0.0)
    config.evaluation.every = 5
    config.checkpoint.every = 200
    return config


def sweep() -> Iterator[dict[str, float]]:
    """Varies the training radius, for a fixed test radius."""
    for eps_train in (0.1, 0.12, 0.15):
        yield {"robust.eps_train": eps_train}

"""The network of a run, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from experiments import data, methods, models
from experiments.checkpoints import Checkpoints
from experiments.config import Config, from_config_dict
from experiments.data import Images
from experiments.errors import ExperimentError
from experiments.loop import nothing_selected, variables_of
from experiments.run_folder import read_config
from experiments.train_step import create_optimizer, create_state


class Trained(NamedTuple):
    """A network of the last epoch of a run, or of its latest checkpoint.

    Attributes:
      config: of the run.
      model, variables: the unbound Linen module and its variables.
      test: the test images of the run's data set, pixels in [0, 1].
      title: of that data set.
    """

    config: Config
    model: nn.Module
    variables: dict[str, Any]
    test: Images
    title: str


def load(workdir: Path) -> Trained:
    """The network that `experiments.main --workdir=...` has trained.

    Raises:
      ExperimentError: if there is no run, no checkpoint, or not the run's data.
    """
    config = from_config_dict(read_config(workdir))
    splits = data.load(config.data)
    model = models.from_config(config.model)
    optimizer = create_optimizer(config.optim, len(splits.train) // config.train.batch_size)
    state = create_state(
        methods.create(model, config),
        model,
        optimizer,
        splits.train.images.shape[1:],
        jax.random.key(0),
    )
    selected = nothing_selected(state, selecting=len(splits.validation) > 0)
    with Checkpoints(workdir, config) as checkpoints:
        restored = checkpoints.restore(state, selected)
    if restored is None:
        raise ExperimentError(f"{workdir} has no checkpoint yet; let its run train for longer")
    return Trained(config, model, variables_of(restored[0]), splits.test, splits.title)

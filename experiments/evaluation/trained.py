"""Reads the network of a run from its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import linen as nn

import boundjax as bj
from experiments import data, methods, models
from experiments.data import Images
from experiments.records.folder import Records, read_config
from experiments.settings.checks import from_config_dict
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError
from experiments.train.step import create_optimizer, create_state
from experiments.train.variables import deployed, nothing_selected

Which = Literal["last", "selected"]


class Trained(NamedTuple):
    """A network of a run.

    Attributes:
      config: the run's configuration.
      model, variables: the unbound Linen module and the variables to evaluate.
      test: the test images of the run's data set, pixels in [0, 1].
      title: the data set's title.
      validation: the images on which the epoch was selected; may be empty.
      label: names the network: `last epoch (20)`, `selected epoch (15)`, `step 400 of 800`.
      finished: whether the training has reached its last step.
    """

    config: Config
    model: nn.Module
    variables: dict[str, Any]
    test: Images
    title: str
    validation: Images
    label: str
    finished: bool = True

    @property
    def pure(self) -> bj.PureModel:
        """The network as a pure function, to bound and attack."""
        return bj.PureModel.of((self.model, self.variables))


def read_run_config(workdir: Path) -> Config:
    """Returns the configuration of the run in a folder.

    Raises:
      ExperimentError: if there is none, or it is damaged.
    """
    stored = read_config(workdir)
    try:
        return from_config_dict(stored)
    except ExperimentError as error:
        raise ExperimentError(f"{workdir / 'config.json'}: {error}") from error


def single_config(workdir: Path) -> Config:
    """Returns the configuration of a run of one seed.

    Raises:
      ExperimentError: if the folder holds no run or those of several seeds, or if its
        configuration is damaged.
    """
    config = read_run_config(workdir)
    if config.seeds > 1:
        raise ExperimentError(
            f"{workdir} holds the runs of {config.seeds} seeds; choose one of them, "
            f"{workdir / f'seed-{config.seed}'} and so on"
        )
    return config


def load(workdir: Path, which: Which = "last", data_dir: str | None = None) -> Trained:
    """Loads a network that `experiments.main --workdir=...` trained.

    Args:
      workdir: the run folder.
      which: `"last"` for the last epoch or latest checkpoint, `"selected"` for the epoch selected
        on the validation images.
      data_dir: where the data set lies now, if it has moved since the run.

    Raises:
      ExperimentError: if the run, a checkpoint, the selection or the run's data are missing, or if
        its configuration is damaged.
    """
    config = single_config(workdir)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    splits = data.load(config.data)
    model = models.from_config(config.model, config.random)
    steps_per_epoch = len(splits.train) // config.train.batch_size
    optimizer = create_optimizer(config.optim, steps_per_epoch)
    state = create_state(
        methods.create(model, config, images=len(splits.train)),
        model,
        optimizer,
        splits.train.images.shape[1:],
        jax.random.key(0),
    )
    selected = nothing_selected(state, selecting=len(splits.validation) > 0)
    with Records(workdir, config) as records:
        restored = records.restore(state, selected) if records.has_checkpoints else None
    if restored is None:
        raise ExperimentError(f"{workdir} has no checkpoint yet; let its run train for longer")
    state, selected, _ = restored
    step, steps = int(state["step"]), config.train.epochs * steps_per_epoch
    label = f"last epoch ({config.train.epochs})" if step == steps else f"step {step} of {steps}"
    if which == "selected":
        if int(selected["epoch"]) == 0:
            raise ExperimentError(
                f"{workdir} has selected no epoch (config.data.validation is "
                f"{config.data.validation}); evaluate the last one"
            )
        state, label = selected, f"selected epoch ({int(selected['epoch'])})"
    return Trained(
        config=config,
        model=model,
        variables=deployed(config, model, state, splits),
        test=splits.test,
        title=splits.title,
        validation=splits.validation,
        label=label,
        finished=step == steps,
    )

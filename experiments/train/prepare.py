"""Prepares the training of a configuration: data, network, method and compiled steps."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

import boundjax as bj
from boundjax.certification import presets
from experiments import data, methods, models
from experiments.cluster import distributed
from experiments.settings import radius
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError, one_line
from experiments.train import mesh
from experiments.train.augment import create_augmentation
from experiments.train.diagnostics import Diagnostics
from experiments.train.step import (
    State,
    create_learning_rate,
    create_optimizer,
    create_schedule,
    create_state,
    create_train_step,
)

# The methods of `boundjax.certify`.
_CERTIFY_METHODS = (*presets.METHODS, presets.BEST)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that the runs of one configuration share, whatever their seeds.

    Attributes:
      config: the configuration.
      mesh: the devices (`experiments.train.mesh`).
      splits: the data.
      steps_per_epoch: number of steps in an epoch.
      total_steps: number of steps in the training.
      model: the unbound Linen module.
      parameters: number of its parameters.
      method: the training method.
      schedule: the radius and the coefficients of the loss at a step.
      learning_rate: the learning rate at a step.
      optimizer: the optimizer of the parameters.
      phases: index of the method's objective at each step, int `[total_steps]`.
    """

    config: Config
    mesh: Mesh
    splits: data.Splits
    steps_per_epoch: int
    total_steps: int
    model: nn.Module
    parameters: int
    method: methods.Method
    schedule: Callable[..., methods.Coefficients]
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    phases: np.ndarray

    @property
    def threat(self) -> bj.Threat:
        """The threat model of the test."""
        return methods.Setting(self.model, self.config).threat

    @property
    def devices(self) -> str:
        """The number and kind of the devices, and the number of processes if several."""
        return mesh.device_name(list(self.mesh.devices.flat))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that keeps an array whole on every device."""
        return mesh.replicated(self.mesh)

    def state_shardings(self, together: bool) -> Any:
        """Returns the shardings of a state, or of several seeds: one for all leaves or for each."""
        if self.mesh.shape["fsdp"] == 1:
            return self.replicated
        return mesh.state_shardings(self._state_shapes, self.mesh, together)

    @functools.cached_property
    def _state_shapes(self) -> State:
        return jax.eval_shape(self._create_state, jax.random.key(0))

    def _create_state(self, key: jax.Array) -> State:
        return create_state(self.method, self.model, self.optimizer, self.splits.shape, key)

    def initial_state(self, seed: int) -> State:
        """Creates the state that a run of this seed starts with."""
        create = jax.jit(self._create_state, out_shardings=self.state_shardings(together=False))
        return create(jax.random.key(seed))

    @functools.cached_property
    def diagnostics(self) -> Diagnostics:
        """The measures that are taken while training."""
        return Diagnostics(
            self.config,
            self.method,
            self.schedule,
            self.learning_rate,
            self.steps_per_epoch,
            self.model,
        )

    def train_steps(self, seeds: tuple[int, ...]) -> list[Callable[..., Any]]:
        """Creates one step per phase of the method, compiled on its first call.

        A step is `(state, images, labels) -> (state, metrics)`. With several seeds, all of these
        have a leading axis with one entry per seed.
        """
        augment = create_augmentation(**dataclasses.asdict(self.config.augment))
        together = len(seeds) > 1

        def create(objective: methods.Objective) -> Callable[..., Any]:
            def step_of(key: jax.Array) -> Callable[..., Any]:
                return create_train_step(
                    self.model,
                    objective,
                    self.optimizer,
                    self.schedule,
                    self.steps_per_epoch,
                    key,
                    augment,
                    self.config.train.precision,
                    whole=self.replicated if self.mesh.shape["fsdp"] > 1 else None,
                )

            if not together:
                return step_of(jax.random.key(seeds[0]))
            keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
            return lambda *arguments: jax.vmap(lambda key, *rest: step_of(key)(*rest))(
                keys, *arguments
            )

        batch = mesh.batch_sharding(self.mesh, together)
        state = self.state_shardings(together)
        return [
            jax.jit(
                create(objective),
                in_shardings=(state, batch, batch),
                out_shardings=(state, self.replicated),
                donate_argnums=0,
            )
            for objective in self.method.objectives
        ]


def is_certify_method(name: str) -> TypeGuard[presets.Method]:
    """Whether a name is a method of `boundjax.certify`."""
    return name in _CERTIFY_METHODS


def prepare(config: Config, splits: data.Splits | None = None) -> Prepared:
    """Reads the data and checks that everything fits together; writes and compiles nothing.

    All processes must call this with the same data. `splits` replaces the configured data.

    Raises:
      ExperimentError: for anything that the user can correct.
    """
    for name in (*config.evaluation.methods, config.evaluation.selection_method):
        if not is_certify_method(name):  # reported before the training, not after it
            raise ExperimentError(
                f"config.evaluation: unknown method {name!r}: use {', '.join(_CERTIFY_METHODS)}"
            )
    devices = mesh.create_mesh(config.mesh)
    batch_size = config.train.batch_size
    mesh.check_batch(batch_size, devices)
    splits = data.load(config.data) if splits is None else splits
    distributed.agree({"data": _description(splits)})
    steps_per_epoch = len(splits.train) // batch_size
    if steps_per_epoch == 0:
        raise ExperimentError(
            f"config.train.batch_size must be at most the {len(splits.train)} training images, "
            f"got {batch_size}"
        )
    total_steps = config.train.epochs * steps_per_epoch
    for key in ("eps_train", "eps_test"):
        eps, name = getattr(config.robust, key), f"config.robust.{key}"
        radius.check(name, eps, config.robust.norm, splits.shape, splits.title)
    channels = splits.shape[-1]
    for key in ("mean", "std"):
        values = getattr(config.model, key)
        if values and len(values) != channels:
            raise ExperimentError(
                f"config.model.{key} must have one number per channel of {splits.title} "
                f"({channels}) or none, got {values}"
            )
    model = models.from_config(config.model, config.random)
    classes = models.network_of(model).num_classes
    if classes != splits.classes:
        raise ExperimentError(
            f"config.model.name={config.model.name!r} has {classes} classes, but "
            f"{splits.title} has {splits.classes}; choose a network with {splits.classes} classes"
        )
    parameters = models.count_parameters(model, splits.shape)
    method = methods.create(model, config, devices, len(splits.train))
    schedule = create_schedule(config.robust, steps_per_epoch)
    prepared = Prepared(
        config=config,
        mesh=devices,
        splits=splits,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        model=model,
        parameters=parameters,
        method=method,
        schedule=schedule,
        learning_rate=create_learning_rate(config.optim, steps_per_epoch),
        optimizer=create_optimizer(config.optim, steps_per_epoch),
        phases=np.asarray(
            jax.vmap(lambda step: method.phase(schedule(step)))(jnp.arange(total_steps))
        ),
    )
    _require_trainable(prepared)
    return prepared


def _description(splits: data.Splits) -> dict[str, Any]:
    """Describes the data for a comparison between processes, without reading all images."""
    description: dict[str, Any] = {"title": splits.title, "classes": splits.classes}
    for part in ("train", "validation", "test"):
        images, labels = getattr(splits, part)
        description[part] = {
            "shape": list(images.shape),
            "dtype": str(images.dtype),
            "labels": hashlib.sha256(labels.tobytes()).hexdigest()[:16],
        }
    return description


def _require_trainable(prepared: Prepared) -> None:
    """Traces every phase, so that errors are reported now and not during the training."""
    config = prepared.config
    images, labels = (
        jax.ShapeDtypeStruct((config.train.batch_size, *array.shape[1:]), array.dtype)
        for array in prepared.splits.train
    )
    try:
        state = jax.eval_shape(prepared.initial_state, config.seed)
        steps = prepared.train_steps((config.seed,))
        phases = sorted(set(prepared.phases.tolist()))
        for phase in phases:
            jax.eval_shape(steps[phase], state, images, labels)
    except (bj.UnsupportedOpError, NotImplementedError, TypeError, ValueError) as error:
        # After the dashes JAX reports what it left out of the traceback.
        reason = one_line(error).split(" ---")[0]
        raise ExperimentError(
            f"robust.method={config.robust.method!r} cannot train model {config.model.name!r}: "
            f"{reason}"
        ) from error
    prepared.diagnostics.check(phases, state, images, labels)

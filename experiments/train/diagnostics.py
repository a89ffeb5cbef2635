"""Measures that a run takes while it is trained, for `landscape.jsonl`; they change nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from boundjax import diagnostics, power_iteration, power_vectors, training_precision
from experiments.cluster import distributed
from experiments.methods import Batch, Coefficients, Method
from experiments.methods.certified import normalised
from experiments.methods.method import Outcome, Setting, one_example, with_statistics
from experiments.methods.random import gradient_measures
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError
from experiments.train.augment import create_augmentation
from experiments.train.step import (
    AUGMENTATION_STREAM,
    OBJECTIVE_STREAM,
    State,
    collections_of,
    stream_key,
)

# From random vectors; BCP and LMT keep theirs and need one at a step.
_POWER_ITERATIONS = 50


class Diagnostics:
    """Measures the loss and the bounds that a step trains on, before its update.

    Images, radius, coefficients and the key of random numbers are those of the step. All of its
    points share that key: slopes and projections are the same along an update.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        schedule: Callable[[int], Coefficients],
        learning_rate: optax.Schedule,
        steps_per_epoch: int,
        model: nn.Module,
    ):
        """Compiles nothing yet."""
        self._setting = Setting(model, config)
        self._config, self._method = config, method
        self._schedule, self._learning_rate = schedule, learning_rate
        self._steps_per_epoch = steps_per_epoch
        self._names = set(config.train.diagnostics)
        augment = create_augmentation(**dataclasses.asdict(config.augment))
        self._augment = None if augment is None else jax.jit(augment)
        # One compiled function per phase of the method.
        self._landscape = functools.cache(self._create_landscape)
        self._outcome = functools.cache(self._create_outcome)

    def due(self, step: int) -> bool:
        """Whether a step is measured."""
        return bool(self._names) and step % self._config.train.diagnostics_every == 0

    def measure(
        self, step: int, seed: int, state: State, images: jax.Array, labels: jax.Array
    ) -> dict[str, Any]:
        """Returns the line of `landscape.jsonl` of a step, from the state and the batch before it.

        A group is left out where a phase does not have it: bounds while the training is natural.
        Numbers that are not finite are None.
        """
        coefficients = jax.tree.map(jnp.asarray, self._schedule(step))
        key = jax.random.key(seed)
        if self._augment is not None:
            images = self._augment(stream_key(key, AUGMENTATION_STREAM, step), images)
        rate = jnp.asarray(self._learning_rate(step))
        at = (
            state["params"],
            (collections_of(state), images, labels),
            coefficients,
            stream_key(key, OBJECTIVE_STREAM, step),
        )
        line: dict[str, Any] = {
            "step": step,
            "epoch": step // self._steps_per_epoch,
            "rate": rate.item(),
            "coefficients": _numbers(coefficients._asdict()),
        }
        precision = self._config.train.precision
        with training_precision(precision), jax.default_matmul_precision(precision):
            line |= self._along_the_update(rate, *at)
        return line

    def _along_the_update(
        self, rate: jax.Array, params: Any, data: Any, coefficients: Coefficients, key: jax.Array
    ) -> dict[str, Any]:
        phase = self._phase(coefficients)
        groups: dict[str, Any] = {}
        if "gradients" in self._names:
            measures = self._gradients(params, data, coefficients.eps, key)
            groups["gradients"] = _numbers(measures)
        gradient = None
        if self._names & {"landscape", "relaxation"}:
            here = self._landscape(phase)(params, rate, data, coefficients, key)
            gradient = here.gradient
        if "landscape" in self._names:
            groups["landscape"] = _measures(here)
            target = self._target(coefficients)
            at_target = self._landscape(self._phase(target))(
                params, rate, data, target, key, direction=gradient
            )
            groups["target"] = _measures(at_target)
        if not self._names & {"relaxation", "relus", "norms"}:
            return groups
        outcome = self._outcome(phase)
        # One program at a time, see `boundjax.diagnostics.landscape`.
        before = jax.block_until_ready(outcome(params, data, coefficients, key))
        if "relus" in self._names and before.bounds is not None:
            std = tuple(self._config.model.std)
            groups["relus"] = _numbers(_relus(before.bounds, std))
        if "norms" in self._names:
            norms = before.norms or self._norms(params, data)
            product = diagnostics.log_norm_product(norms)
            groups["norms"] = _numbers({"log_product": product, **norms})
        if "relaxation" in self._names and _has_slopes(before):
            moved = jax.tree.map(lambda p, g: p - rate.astype(p.dtype) * g, params, gradient)
            after = outcome(moved, data, coefficients, key)
            groups["relaxation"] = _numbers(_relaxation(before.bounds, after.bounds))
        return groups

    @functools.cached_property
    def _gradients(self) -> Callable[..., dict[str, jax.Array]]:
        @jax.jit
        def measures(params: Any, data: Any, radius: jax.Array, key: jax.Array) -> Any:
            collections, images, labels = data
            variables = with_statistics(params, collections["batch_stats"])
            return gradient_measures(self._setting, variables, Batch(images, labels), radius, key)

        return measures

    @functools.cached_property
    def _norms(self) -> Callable[..., dict[str, jax.Array]]:
        """Estimates the spectral norms of the layers where the objective does not."""

        @jax.jit
        def norms(params: Any, data: Any) -> dict[str, jax.Array]:
            collections, images, _ = data
            function = one_example(self._setting.model, params, collections["batch_stats"])
            image = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
            vectors = power_vectors(function, image, jax.random.key(0))

            def iterate(vectors: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
                norms, vectors = power_iteration(function, image, vectors)
                return vectors, norms

            _, estimates = jax.lax.scan(iterate, vectors, length=_POWER_ITERATIONS)
            return jax.tree.map(lambda of_all: of_all[-1], estimates)

        return norms

    def _phase(self, coefficients: Coefficients) -> int:
        return int(self._method.phase(coefficients))

    def _target(self, coefficients: Coefficients) -> Coefficients:
        """At the final radius, without the natural loss; beta is that of the step."""
        values = {"eps": self._config.robust.eps_train, "kappa": 0.0, "ramp": 1.0}
        like = coefficients._asdict()
        return coefficients._replace(
            **{name: jnp.asarray(value, like[name].dtype) for name, value in values.items()}
        )

    def _create_landscape(self, phase: int) -> diagnostics.Measure:
        objective = self._method.objectives[phase]

        def loss(params: Any, data: Any, coefficients: Coefficients, key: jax.Array) -> jax.Array:
            collections, images, labels = data
            return objective(params, collections, Batch(images, labels), coefficients, key)[0]

        # Without "landscape" only the update itself is needed.
        multiples = diagnostics.MULTIPLES if "landscape" in self._names else (1.0,)
        return diagnostics.landscape(loss, multiples)

    def _create_outcome(self, phase: int) -> Callable[..., Outcome]:
        objective = self._method.objectives[phase]

        @jax.jit
        def outcome(params: Any, data: Any, coefficients: Coefficients, key: jax.Array) -> Outcome:
            collections, images, labels = data
            return objective(params, collections, Batch(images, labels), coefficients, key)[1]

        return outcome

    def check(self, phases: Collection[int], state: State, images: Any, labels: Any) -> None:
        """Checks that every named measure exists in one of the phases, whose shapes are given.

        Raises:
          ExperimentError: if one does not.
        """
        if not self._names:
            return
        if distributed.processes() > 1:
            raise ExperimentError(
                "config.train.diagnostics are measured in one process, got "
                f"{distributed.processes()}; start one, or set config.train.diagnostics=()"
            )
        coefficients = jax.tree.map(jnp.asarray, self._schedule(0))
        data = collections_of(state), images, labels
        outcomes = [
            jax.eval_shape(
                self._outcome(phase), state["params"], data, coefficients, jax.random.key(0)
            )
            for phase in phases
        ]
        exist = {
            "relaxation": any(map(_has_slopes, outcomes)),
            "relus": any(outcome.bounds is not None for outcome in outcomes),
            "norms": not self._config.random.draws,
            "gradients": self._config.random.draws,
        }
        for name in self._config.train.diagnostics:
            if not exist.get(name, True):
                raise ExperimentError(
                    f"config.train.diagnostics has {name!r}, but training with robust.method="
                    f"{self._config.robust.method!r} has no {_NEEDS[name]}; leave it out"
                )


_NEEDS = {
    "relaxation": "linear bounds with free slopes",
    "relus": "bounds on the inputs of ReLUs",
    "norms": "weights that stay the same between forward passes (use a deterministic network)",
    "gradients": "draws whose gradients differ (use a random network)",
}


def _has_slopes(outcome: Outcome) -> bool:
    bounds = outcome.bounds
    return bounds is not None and bounds.relaxed is not None and bool(bounds.relaxed.slopes)


def _measures(landscape: diagnostics.Landscape) -> dict[str, Any]:
    fields = landscape._asdict()
    del fields["gradient"]  # as large as the network
    return _numbers(fields)


@functools.partial(jax.jit, static_argnames="std")
def _relus(bounds: Any, std: tuple[float, ...]) -> dict[str, Any]:
    box = normalised(bounds.input_interval, std)
    states = diagnostics.relu_states_by_layer(bounds.pre_activations)
    return {
        "states": {label: layer._asdict() for label, layer in states.items()},
        "slopes": diagnostics.slope_histograms(bounds.pre_activations),
        "widths": diagnostics.mean_widths(bounds.pre_activations),
        "input_width": jnp.mean(box.upper - box.lower),
        **diagnostics.warmup_measures(box, bounds.pre_activations)._asdict(),
    }


@jax.jit
def _relaxation(before: Any, after: Any) -> dict[str, Any]:
    shares = diagnostics.slope_shares(before.pre_activations, before.relaxed.slopes)
    change = jax.vmap(diagnostics.relaxed_gradient_change)(
        before.relaxed.coefficients, after.relaxed.coefficients
    )
    means = {name: jnp.mean(value) for name, value in change._asdict().items()}
    return {"slopes": shares._asdict(), **means}


def _numbers(tree: Any) -> Any:
    """Arrays as (lists of) numbers that JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value if math.isfinite(value) else None

    return jax.tree.map(lambda leaf: plain(np.asarray(leaf).tolist()), jax.device_get(tree))

"""The train step, a pure function of state and batch that the loop and the benchmarks compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding

from boundjax import training_precision
from boundjax.training import eps_dependent, linear_schedule, smoothed_schedule, stairs_schedule
from experiments.methods import Batch, Coefficients, Method, Objective
from experiments.methods.method import RELU_METRICS, momentum_of, one_example
from experiments.settings.config import OptimConfig, Precision, RobustConfig

State = dict[str, Any]
Metrics = dict[str, jax.Array]
# Called with a PRNG key and images `[B, H, W, channels]`.
Augmentation = Callable[[jax.Array, jax.Array], jax.Array]
METRICS = ("loss", "natural_loss", "robust_loss", "standard_error", "verified_error", *RELU_METRICS)

# The rest of a state are collections that the objectives read.
_NO_COLLECTIONS = ("step", "params", "opt_state", "metrics")
# Streams of random numbers; the initial parameters use the key of the seed itself.
_COLLECTIONS_STREAM, AUGMENTATION_STREAM, OBJECTIVE_STREAM = 1, 2, 3


def stream_key(key: jax.Array, stream: int, step: jax.Array | int) -> jax.Array:
    """The key of a stream of random numbers at a step, from the key of the seed."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), step)


def collections_of(state: State) -> dict[str, Any]:
    """The collections that an objective reads beside the parameters."""
    return {name: value for name, value in state.items() if name not in _NO_COLLECTIONS}


def create_schedule(
    config: RobustConfig, steps_per_epoch: int
) -> Callable[[jax.Array | int], Coefficients]:
    """Creates the radius and the coefficients of the loss as a function of the global step."""
    start = round(config.warmup_epochs * steps_per_epoch)
    end = start + round(config.ramp_epochs * steps_per_epoch)

    def radius(step: jax.Array | int) -> jax.Array:
        if config.schedule == "constant":
            return jnp.float32(config.eps_train)
        if config.schedule == "stairs":
            eps = stairs_schedule(
                step - start,
                steps_per_epoch,
                max(1, round(config.ramp_epochs)),
                config.eps_start,
                config.eps_train,
            )
            return jnp.where(step < start, 0.0, eps)
        ramp = linear_schedule if config.schedule == "linear" else smoothed_schedule
        return ramp(step, start, end, config.eps_train)

    def schedule(step: jax.Array | int) -> Coefficients:
        eps = radius(step)
        return Coefficients(
            eps=eps,
            kappa=eps_dependent(eps, config.eps_train, *config.kappa),
            beta=eps_dependent(eps, config.eps_train, *config.beta),
            ramp=linear_schedule(step, start, end, 1.0)
            if config.schedule == "constant"
            else eps_dependent(eps, config.eps_train, 0.0, 1.0),
        )

    return schedule


def create_learning_rate(config: OptimConfig, steps_per_epoch: int) -> optax.Schedule:
    """Creates the learning rate, `lr` multiplied by `factor` at each milestone."""
    boundaries = {round(epoch * steps_per_epoch): config.factor for epoch in config.milestones}
    return optax.piecewise_constant_schedule(config.lr, boundaries)


def create_optimizer(config: OptimConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Creates Adam or SGD with the scheduled rate and, if configured, clipping.

    Weight decay is added to the clipped gradient, as in PyTorch's optimizers.
    """
    rate = create_learning_rate(config, steps_per_epoch)
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    if config.name == "sgd":
        parts.append(optax.sgd(rate, momentum=config.momentum or None))
    else:
        parts.append(optax.adam(rate))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def create_state(
    method: Method,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    key: jax.Array,
) -> State:
    """Creates the initial state for images `[H, W, channels]`: exactly what a step changes.

    `metrics` holds the sums of the step metrics since the epoch began, so that a run resumed in the
    middle of an epoch reports the same means. The collections of `method` are entries under their
    names.
    """
    variables = model.init(key, jnp.zeros((1, *image_shape), jnp.float32))
    statistics = variables.get("batch_stats", {})
    collections = method.init(
        one_example(model, variables["params"], statistics),
        jax.ShapeDtypeStruct(tuple(image_shape), jnp.float32),
        jax.random.fold_in(key, _COLLECTIONS_STREAM),
    )
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": variables["params"],
        "batch_stats": statistics,
        "opt_state": optimizer.init(variables["params"]),
        "metrics": {name: jnp.zeros((), jnp.float32) for name in METRICS},
        **collections,
    }


def create_train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], Coefficients],
    steps_per_epoch: int,
    key: jax.Array,
    augment: Augmentation | None = None,
    precision: Precision = "highest",
    whole: NamedSharding | None = None,
) -> Callable[[State, jax.Array, jax.Array], tuple[State, Metrics]]:
    """Creates a step, `(state, images [B, H, W, channels], labels [B]) -> (state, metrics)`.

    The step is not compiled. Its metrics are those of this step alone and `norm`, that of the new
    parameters and statistics, which is not finite if they are not.

    Args:
      model: a Linen module with `__call__(x, train=False)`; with batch normalisation it has
        `bn_momentum`.
      objective: one of the objectives of a training method for that model.
      optimizer: the optimizer of the parameters.
      schedule: the radius and the coefficients of the loss at a step.
      steps_per_epoch: number of steps after which the metric sums restart.
      key: the PRNG key from which, with the number of a step, all of its random numbers follow.
      augment: the variation of the images (`experiments.train.augment`), or None.
      precision: precision of all products, see `boundjax.training_precision`.
      whole: sharding of the parameters during their use, if devices divide them.
    """
    loss_and_gradient = jax.value_and_grad(objective, has_aux=True)

    @training_precision(precision)
    @jax.default_matmul_precision(precision)
    def train_step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, Metrics]:
        coefficients = schedule(state["step"])
        if augment is not None:
            images = augment(stream_key(key, AUGMENTATION_STREAM, state["step"]), images)
        collections = collections_of(state)
        params = state["params"]
        if whole is not None:
            # Without this constraint XLA sends the activations of some layers instead.
            params = jax.lax.with_sharding_constraint(params, whole)
        (_, outcome), gradient = loss_and_gradient(
            params,
            collections,
            Batch(images, labels),
            coefficients,
            stream_key(key, OBJECTIVE_STREAM, state["step"]),
        )
        # Adam's bias correction raises a float to an int.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        begins_epoch = state["step"] % steps_per_epoch == 0
        metrics = {name: outcome.metrics[name] for name in METRICS}
        new = {
            **collections,
            **outcome.collections,
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "batch_stats": _running_average(model, state["batch_stats"], outcome.statistics),
            "opt_state": opt_state,
            "metrics": {
                name: jnp.where(begins_epoch, 0.0, state["metrics"][name]) + metrics[name]
                for name in METRICS
            },
        }
        metrics["norm"] = _norm((new["params"], new["batch_stats"]))
        return new, metrics

    return train_step


def _norm(tree: Any) -> jax.Array:
    # XLA's CPU backend computes products far faster than sums.
    squares = [jnp.tensordot(leaf, leaf, leaf.ndim) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def _running_average(model: nn.Module, running: Any, statistics: Any) -> Any:
    if not jax.tree.leaves(running):
        return running
    momentum = momentum_of(model)
    return jax.tree.map(lambda r, s: momentum * r + (1.0 - momentum) * s, running, statistics)

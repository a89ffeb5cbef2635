"""Defines a training method, and what the methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

import boundjax as bj
from boundjax.stochastic import STREAM, GaussianWeights
from boundjax.training import cross_entropy, relu_states
from experiments.settings.config import NORMS, Config

PyTree = Any
PIXEL_RANGE = (0.0, 1.0)
RELU_METRICS = ("active_relus", "unstable_relus", "dead_relus")


class Batch(NamedTuple):
    """`images` `[B, H, W, channels]` in `[0, 1]` and `labels` int `[B]`."""

    images: jax.Array
    labels: jax.Array


class Coefficients(NamedTuple):
    """The values of the schedules at one step.

    Attributes:
      eps: the radius.
      kappa: weight of the natural loss.
      beta: weight of the linear bounds against the interval bounds.
      ramp: progress of the radius from 0 to exactly 1 at its final value.
    """

    eps: jax.Array
    kappa: jax.Array
    beta: jax.Array
    ramp: jax.Array


class Setting(NamedTuple):
    """The model, configuration and devices that a method is created for.

    `model` is a Linen module with `__call__(x, train=False)`; with batch normalisation it has a
    field `bn_momentum`, or its network has one. `mesh` holds the devices that share the work
    (`experiments.train.mesh`); None means one device. `images` is the number of training images.
    """

    model: nn.Module
    config: Config
    mesh: Mesh | None = None
    images: int = 1

    @property
    def clip(self) -> tuple[float, float] | None:
        """The pixel range that balls are intersected with, or None."""
        return PIXEL_RANGE if self.config.robust.clip else None

    @property
    def threat(self) -> bj.Threat:
        """The threat model of the test; its radius is in pixels of `[0, 1]`."""
        robust = self.config.robust
        return bj.Threat(robust.eps_test, robust.order, self.clip)


class Outcome(NamedTuple):
    """What an objective returns beside the loss.

    Attributes:
      metrics: scalars to log.
      statistics: `batch_stats` of the clean batch; the state keeps their running average.
      collections: new values of the method's collections; omitted ones stay as they are.
      bounds: the `Bounded` of the batch, or None; for diagnostics, the step does not use it.
      norms: estimated spectral norms of the layers, by label; for diagnostics.
    """

    metrics: dict[str, jax.Array]
    statistics: PyTree
    collections: dict[str, PyTree] = {}  # noqa: RUF012
    bounds: PyTree = None
    norms: dict[str, jax.Array] = {}  # noqa: RUF012


# (params, collections, batch, coefficients, key) -> (loss, Outcome). `collections` is the state
# without the parameters: `batch_stats` (may be empty) and the method's collections; `key` is a new
# PRNG key at every step.
Objective = Callable[
    [PyTree, dict[str, PyTree], Batch, Coefficients, jax.Array], tuple[Any, Outcome]
]

# (function of one example [H, W, channels], its shape and dtype, key) -> collections by name.
Initializer = Callable[[Callable, jax.ShapeDtypeStruct, jax.Array], dict[str, PyTree]]


def no_collections(
    function: Callable, example: jax.ShapeDtypeStruct, key: jax.Array
) -> dict[str, PyTree]:
    """The `Initializer` of methods that keep nothing from one step to the next."""
    del function, example, key
    return {}


class Method(NamedTuple):
    """A training method: the objectives of its phases, and the rule that selects one.

    A method keeps what it must remember from one step to the next in collections of the state:
    `init` creates them, the objectives return them, and checkpoints store them.

    Each phase is a step of its own, compiled when it first runs; the loop selects it from the
    schedule. One step that switches on the device would be simpler, but XLA's CPU backend runs
    convolutions inside a conditional 5 to 12 times slower.
    """

    objectives: tuple[Objective, ...]
    phase: Callable[[Coefficients], jax.Array]  # scalar coefficients -> index into `objectives`
    init: Initializer = no_collections


# Keys of `config.regularizers` whose terms `certified` computes from interval bounds.
ON_INTERVALS = ("tightness", "relu_balance", "relu_stability", "l1")


@dataclass(frozen=True)
class TrainingMethod:
    """A line of the table: how to create a method, and every fact that settings are checked for.

    Attributes:
      creates: (model and configuration) -> the objectives and phases.
      norms: keys of `NORMS`: the norms whose balls it can train on.
      relaxes: it has a linear relaxation, which the regularizers `gap` and `slack` read.
      divisible_rows: devices can divide the rows of its bounds (axis `spec` of the mesh).
      needs_split: it attacks between two blocks of layers; `adversary.split` says where.
      draws: the networks that it trains: `"none"`, deterministic ones; `"noise"` or `"weights"`,
        those with such draws; `"any"`.
      regularizers: which keys of `ON_INTERVALS` it supports.
      variants: other forms of the method, by the key of `config.relaxation` that selects them.
      otherwise: of a variant, what messages call the method without it.
    """

    creates: Callable[[Setting], Method]
    norms: tuple[str, ...] = tuple(NORMS)
    relaxes: bool = False
    divisible_rows: bool = False
    needs_split: bool = False
    draws: Literal["none", "noise", "weights", "any"] = "none"
    regularizers: tuple[str, ...] = ON_INTERVALS
    variants: Mapping[str, TrainingMethod] = field(default_factory=dict)
    otherwise: str = ""

    def variant(self, config: Config) -> TrainingMethod:
        """Returns the variant that `config.relaxation` selects, or the method itself."""
        for key, variant in self.variants.items():
            if getattr(config.relaxation, key):
                return variant
        return self


def apply(
    model: nn.Module, variables: PyTree, images: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Returns the logits `[B, C]` of the eval-mode model; `key` is that of a draw."""
    logits = model.apply(variables, images, rngs=_streams(key))
    assert not isinstance(logits, tuple)  # Flax returns a pair only with `mutable` collections
    return logits


def clean_pass(
    model: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    images: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, PyTree]:
    """Returns the logits `[B, C]` of the clean batch and the statistics to bound the model with.

    With batch normalisation the statistics are the (differentiable) mean and variance of the clean
    batch, as in Shi et al. 2021. Without it they are empty. `key` is that of a random network's
    draw.
    """
    if not jax.tree.leaves(batch_stats):
        return apply(model, {"params": params}, images, key), batch_stats
    logits, updated = with_momentum(model, 0.0).apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs=_streams(key),
    )
    return logits, updated["batch_stats"]


def _streams(key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if key is None else {STREAM: key}


def with_momentum(model: nn.Module, momentum: float) -> nn.Module:
    """The model with another `bn_momentum`."""
    if isinstance(model, GaussianWeights):
        return model.clone(network=model.network.clone(bn_momentum=momentum))
    return model.clone(bn_momentum=momentum)


def momentum_of(model: nn.Module) -> float:
    """The field `bn_momentum` of a model, or of the network whose weights it draws."""
    network: Any = model.network if isinstance(model, GaussianWeights) else model
    return network.bn_momentum


def with_statistics(params: PyTree, statistics: PyTree) -> dict[str, PyTree]:
    """The variables of the eval-mode model."""
    variables = {"params": params}
    if jax.tree.leaves(statistics):
        variables["batch_stats"] = statistics
    return variables


class OneExample(NamedTuple):
    """The eval-mode model on one image `[H, W, channels]`: the function to bound."""

    model: nn.Module
    variables: PyTree

    def __call__(self, image: jax.Array) -> jax.Array:
        """Returns the logits `[C]`."""
        return self.model.apply(self.variables, image[None])[0]

    def blocks(self, split: int) -> tuple[Callable, Callable]:
        """Splits the model after `split` layers; its `__call__` must take `start` and `stop`."""
        apply = self.model.apply
        return (
            lambda image: apply(self.variables, image[None], stop=split)[0],
            lambda latent: apply(self.variables, latent[None], start=split)[0],
        )


def one_example(model: nn.Module, params: PyTree, statistics: PyTree) -> OneExample:
    """Returns the function to bound."""
    return OneExample(model, with_statistics(params, statistics))


def margin_rows(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the specifications `[B, C - 1, C]` of `z_y - z_m` for the other classes `m`."""
    return bj.margin_specification(labels, logits.shape[-1], rows="others", dtype=logits.dtype)


def clean_metrics(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Computes mean natural loss and standard error of the batch."""
    wrong = jnp.argmax(logits, axis=-1).astype(labels.dtype) != labels
    return {
        "natural_loss": jnp.mean(cross_entropy(logits, labels)),
        "standard_error": jnp.mean(wrong.astype(logits.dtype)),
    }


def relu_metrics(pre_activations: dict[str, bj.Interval] | None) -> dict[str, jax.Array]:
    """Computes the fractions of active, unstable and dead ReLUs; NaN without bounds."""
    if pre_activations is None:
        return dict.fromkeys(RELU_METRICS, jnp.float32(jnp.nan))
    states = relu_states(jax.lax.stop_gradient(pre_activations))
    return dict(zip(RELU_METRICS, states, strict=True))


def verified_error(margins: jax.Array) -> jax.Array:
    """Computes the fraction of the batch with a bound, of `[B, C - 1]`, that is not positive."""
    return jnp.mean(1.0 - jnp.all(margins > 0, axis=-1).astype(margins.dtype))

"""What a training method is, and what the methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

import boundjax as bj
from boundjax.training import cross_entropy, relu_states
from experiments.settings.config import NORMS, Config

PyTree = Any
PIXEL_RANGE = (0.0, 1.0)
RELU_METRICS = ("active_relus", "unstable_relus", "dead_relus")


class Batch(NamedTuple):
    """`images` `[B, H, W, channels]` in `[0, 1]` and `labels` int `[B]`."""

    images: jax.Array
    labels: jax.Array


class Weights(NamedTuple):
    """What the schedules say at this step.

    Attributes:
      eps: the radius.
      kappa: weight of the natural loss.
      beta: weight of the linear bounds against the interval bounds.
      ramp: the part of its way that the radius has gone, exactly 1 at its end.
    """

    eps: jax.Array
    kappa: jax.Array
    beta: jax.Array
    ramp: jax.Array


class Setting(NamedTuple):
    """What a method is made for: `model` is a Linen module with `__call__(x, train=False)`.

    With batch normalisation it has a field `bn_momentum`. `mesh` has the devices that share the
    work (`experiments.train.mesh`); None: one device.
    """

    model: nn.Module
    config: Config
    mesh: Mesh | None = None

    @property
    def threat(self) -> bj.Threat:
        """The threat model that networks are tested in; its radius in pixels of `[0, 1]`."""
        robust = self.config.robust
        return bj.Threat(robust.eps_test, robust.order, PIXEL_RANGE if robust.clip else None)


class Outcome(NamedTuple):
    """What an objective returns beside the loss.

    Attributes:
      metrics: scalars to log.
      statistics: `batch_stats` of the clean batch, of which the state keeps a running average.
      own: new values of collections that the method owns; those left out stay as they are.
    """

    metrics: dict[str, jax.Array]
    statistics: PyTree
    own: dict[str, PyTree] = {}  # noqa: RUF012


# (params, collections, batch, weights, key) -> (loss, Outcome). `collections` holds what the state
# has beside the parameters: `batch_stats` (perhaps empty) and what the method owns; `key` is a new
# PRNG key at every step.
Objective = Callable[[PyTree, dict[str, PyTree], Batch, Weights, jax.Array], tuple[Any, Outcome]]

# (function of one example [H, W, channels], its shape and dtype, key) -> collections by name.
Initializer = Callable[[Callable, jax.ShapeDtypeStruct, jax.Array], dict[str, PyTree]]


def nothing_owned(
    function: Callable, example: jax.ShapeDtypeStruct, key: jax.Array
) -> dict[str, PyTree]:
    """The `Initializer` of the methods that keep nothing from one step to the next."""
    del function, example, key
    return {}


class Method(NamedTuple):
    """A training method: the objectives of its phases, and which of them is due.

    What a method must remember from one step to the next, it owns as collections of the state:
    `init` makes them, the objectives return them, and checkpoints carry them.

    The phases are steps of their own, compiled when first met, and the loop knows from the schedule
    which one is due. One step that switches on the device would be simpler, but XLA's CPU backend
    runs convolutions inside a conditional 5 to 12 times slower.
    """

    objectives: tuple[Objective, ...]
    phase: Callable[[Weights], jax.Array]  # scalar weights -> index into `objectives`
    init: Initializer = nothing_owned


# The weights of `config.regularizers` whose terms `certified` computes from interval bounds.
ON_INTERVALS = ("tightness", "relu_balance", "relu_stability", "l1")


@dataclass(frozen=True)
class TrainingMethod:
    """A line of the table: how a method is made, and every fact that settings are checked against.

    Attributes:
      creates: (model and configuration) -> the objectives and phases.
      norms: keys of `NORMS`, of the balls that it can train on.
      relaxes: it has a linear relaxation, which the regularizers `gap` and `slack` read.
      divisible_rows: devices can divide the rows of its bounds (axis `spec` of the mesh).
      needs_split: it attacks between two blocks of layers, and `adversary.split` says where.
      regularizers: those of the others that it can have.
      variants: by the key of `config.relaxation` that turns the method into another one.
      otherwise: how messages call the method that a variant is not.
    """

    creates: Callable[[Setting], Method]
    norms: tuple[str, ...] = tuple(NORMS)
    relaxes: bool = False
    divisible_rows: bool = False
    needs_split: bool = False
    regularizers: tuple[str, ...] = ON_INTERVALS
    variants: Mapping[str, TrainingMethod] = field(default_factory=dict)
    otherwise: str = ""

    def chosen(self, config: Config) -> TrainingMethod:
        """The method itself, or the variant that `config.relaxation` asks for."""
        for key, variant in self.variants.items():
            if getattr(config.relaxation, key):
                return variant
        return self


def clean_pass(
    model: nn.Module, params: PyTree, batch_stats: PyTree, images: jax.Array
) -> tuple[jax.Array, PyTree]:
    """Logits `[B, C]` on the clean batch and the statistics to bound the model with.

    With batch normalisation these are the (differentiable) mean and variance of the clean batch, as
    in Shi et al. 2021; without, the pass is an ordinary one and there are none.
    """
    if not jax.tree.leaves(batch_stats):
        return model.apply({"params": params}, images), batch_stats
    logits, updated = model.clone(bn_momentum=0.0).apply(
        {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    return logits, updated["batch_stats"]


def with_statistics(params: PyTree, statistics: PyTree) -> dict[str, PyTree]:
    """The variables of the eval-mode model."""
    variables = {"params": params}
    if jax.tree.leaves(statistics):
        variables["batch_stats"] = statistics
    return variables


class OneExample(NamedTuple):
    """The eval-mode model on one image `[H, W, channels]`: the function that is bounded."""

    model: nn.Module
    variables: PyTree

    def __call__(self, image: jax.Array) -> jax.Array:
        """Its logits `[C]`."""
        return self.model.apply(self.variables, image[None])[0]

    def blocks(self, split: int) -> tuple[Callable, Callable]:
        """Its first `split` layers, and the others; the model has `start` and `stop`."""
        apply = self.model.apply
        return (
            lambda image: apply(self.variables, image[None], stop=split)[0],
            lambda latent: apply(self.variables, latent[None], start=split)[0],
        )


def one_example(model: nn.Module, params: PyTree, statistics: PyTree) -> OneExample:
    """The function that is bounded."""
    return OneExample(model, with_statistics(params, statistics))


def margin_rows(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The specifications `[B, C - 1, C]` whose values are `z_y - z_m` for the other classes `m`."""
    return bj.margin_specification(labels, logits.shape[-1], rows="others", dtype=logits.dtype)


def clean_metrics(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Mean natural loss and standard error of the batch."""
    wrong = jnp.argmax(logits, axis=-1).astype(labels.dtype) != labels
    return {
        "natural_loss": jnp.mean(cross_entropy(logits, labels)),
        "standard_error": jnp.mean(wrong.astype(logits.dtype)),
    }


def relu_metrics(pre_activations: dict[str, bj.Interval] | None) -> dict[str, jax.Array]:
    """The parts of the ReLUs that are active, unstable and dead; NaN where no bounds are known."""
    if pre_activations is None:
        return dict.fromkeys(RELU_METRICS, jnp.float32(jnp.nan))
    states = relu_states(jax.lax.stop_gradient(pre_activations))
    return dict(zip(RELU_METRICS, states, strict=True))


def verified_error(margins: jax.Array) -> jax.Array:
    """The part of the batch without a certificate: a bound of `[B, C - 1]` is not positive."""
    return jnp.mean(1.0 - jnp.all(margins > 0, axis=-1).astype(margins.dtype))

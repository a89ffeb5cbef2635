"""Training methods by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flax import linen as nn
from jax.sharding import Mesh

from boundjax import slopes
from experiments.methods import adversarial, bounded
from experiments.methods.certified import certified
from experiments.methods.lipschitz import lipschitz
from experiments.methods.method import ON_INTERVALS
from experiments.methods.method import PIXEL_RANGE as PIXEL_RANGE
from experiments.methods.method import Batch as Batch
from experiments.methods.method import Coefficients as Coefficients
from experiments.methods.method import Method as Method
from experiments.methods.method import Objective as Objective
from experiments.methods.method import Setting as Setting
from experiments.methods.method import TrainingMethod as TrainingMethod
from experiments.methods.natural import natural
from experiments.methods.random import random
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError


def _bounded(setting: Setting, bound: bounded.Bound) -> Method:
    """Creates a method with the same bound at every step."""
    return certified(setting, lambda key: bound)


def _linear(setting: Setting, slopes_of: Callable) -> Method:
    """Creates a method on linear bounds, with interval pre-activations, mixed by beta."""
    bound = bounded.linear_bound(slopes_of, setting.mesh)
    return certified(setting, lambda key: bound, mixes_intervals=True)


def _fused(setting: Setting) -> Method:
    return certified(setting, lambda key: bounded.fused_bound, mixes_intervals=True)


def _projected(setting: Setting) -> Method:
    projections = setting.config.relaxation.projections
    return certified(setting, lambda key: bounded.estimated_bound(projections, key))


def _attacked(setting: Setting, bound: bounded.Bound, *, after_ramp: bool = False) -> Method:
    attack = adversarial.attack_of(setting)
    return certified(setting, lambda key: bound, attack=attack, after_ramp=after_ramp)


def _expressive(name: adversarial.Expressive) -> TrainingMethod:
    return TrainingMethod(lambda s: _attacked(s, adversarial.expressive_bound(s, name)))


def _taps(setting: Setting) -> Method:
    bound = adversarial.taps_bound(setting, small=False)
    return certified(setting, lambda key: bound, after_ramp=True)


def _staps(setting: Setting) -> Method:
    return _attacked(setting, adversarial.taps_bound(setting, small=True), after_ramp=True)


def _pq_slopes(setting: Setting) -> Method:
    p, q = setting.config.relaxation.p, setting.config.relaxation.q
    return _linear(setting, bounded.drawn_slopes(lambda key: slopes.random(p, q, key)))


METHODS: dict[str, TrainingMethod] = {
    "natural": TrainingMethod(natural, regularizers=()),
    "pgd": TrainingMethod(lambda s: _attacked(s, adversarial.pgd_bound(s))),
    "ibp": TrainingMethod(lambda s: _bounded(s, bounded.interval_bound)),
    "crown-ibp": TrainingMethod(
        lambda s: _linear(s, bounded.fixed_slopes("adaptive")),
        relaxes=True,
        divisible_rows=True,
        # It has one row per image: nothing to divide, and no relaxation of every margin.
        variants={"fused": TrainingMethod(_fused, otherwise="not fused")},
    ),
    # Its rows cannot be divided: all of an image's rows share the objective of its slopes.
    "one-step": TrainingMethod(lambda s: _linear(s, bounded.one_step_slopes(s)), relaxes=True),
    "cap-ibp": TrainingMethod(
        lambda s: _linear(s, bounded.fixed_slopes("parallel")), relaxes=True, divisible_rows=True
    ),
    "random-slopes": TrainingMethod(
        lambda s: _linear(s, bounded.drawn_slopes(slopes.uniform)),
        relaxes=True,
        divisible_rows=True,
    ),
    "pq-slopes": TrainingMethod(_pq_slopes, relaxes=True, divisible_rows=True),
    "cap": TrainingMethod(
        lambda s: _bounded(s, bounded.cap_bound(s.mesh)),
        relaxes=True,
        divisible_rows=True,
        variants={"projections": TrainingMethod(_projected, relaxes=True, otherwise="exact")},
    ),
    "bcp": TrainingMethod(lambda s: lipschitz(s, box=True), regularizers=()),
    "lmt": TrainingMethod(lambda s: lipschitz(s, box=False), regularizers=()),
    "sabr": TrainingMethod(lambda s: _attacked(s, adversarial.sabr_bound(s)), norms=("inf",)),
    "mtl-ibp": _expressive("mtl-ibp"),
    "exp-ibp": _expressive("exp-ibp"),
    "cc-ibp": _expressive("cc-ibp"),
    "taps": TrainingMethod(_taps, norms=("inf",), needs_split=True),
    "staps": TrainingMethod(_staps, norms=("inf",), needs_split=True),
    "adv-train": TrainingMethod(lambda s: random(s, attacks=True), regularizers=(), draws="any"),
    "adv-bnn": TrainingMethod(
        lambda s: random(s, attacks=True, diverges=True), regularizers=(), draws="weights"
    ),
    "rse": TrainingMethod(lambda s: random(s, attacks=False), regularizers=(), draws="noise"),
}


def create(model: nn.Module, config: Config, mesh: Mesh | None = None, images: int = 1) -> Method:
    """Creates the method that `config` names, for `model`, on the devices of `mesh`.

    `images` is the number of training images, by which Adv-BNN divides its divergence.

    Raises:
      ExperimentError: for an unknown name, or settings that the method does not support.
    """
    name = config.robust.method
    if name not in METHODS:
        raise ExperimentError(
            f"unknown robust.method {name!r}: use one of {', '.join(sorted(METHODS))}"
        )
    method = METHODS[name].variant(config)
    _check(name, method, config)
    if mesh is not None and mesh.shape["spec"] > 1 and not method.divisible_rows:
        raise ExperimentError(
            f"config.mesh.spec={mesh.shape['spec']} divides rows of linear bounds, which needs "
            f"{_divisible()}, got robust.method={name!r}; set config.mesh.spec=1"
        )
    return method.creates(Setting(model, config, mesh, images))


def _check(name: str, method: TrainingMethod, config: Config) -> None:
    """Refuses settings that the method does not support."""
    regularizers = config.regularizers
    if config.robust.norm not in method.norms:
        raise ExperimentError(
            f"robust.method={name!r} needs robust.norm={' or '.join(map(repr, method.norms))}, "
            f"got {config.robust.norm!r}"
        )
    _check_draws(name, method, config)
    if method.needs_split and config.adversary.split < 1:
        raise ExperimentError(
            f"robust.method={name!r} needs adversary.split, the number of layers before the attack"
        )
    if (regularizers.gap or regularizers.slack) and not method.relaxes:
        raise ExperimentError(
            f"regularizers.gap and .slack need one of {_relaxing()}, got robust.method={name!r}"
        )
    for key in ON_INTERVALS:
        if getattr(regularizers, key) and key not in method.regularizers:
            raise ExperimentError(
                f"regularizers.{key} needs a method that trains on intervals, "
                f"got robust.method={name!r}"
            )


def _check_draws(name: str, method: TrainingMethod, config: Config) -> None:
    """Refuses a random network that the method cannot train, and one that it needs and lacks."""
    random, diversity = config.random, config.diversity
    if method.draws == "none" and random.draws:
        trainable = ", ".join(key for key, other in METHODS.items() if other.draws != "none")
        raise ExperimentError(
            f"robust.method={name!r} trains deterministic networks, got a random one by "
            f"config.random; use one of {trainable}"
        )
    if method.draws == "noise" and (not random.noise or random.prior_std):
        raise ExperimentError(
            f"robust.method={name!r} needs random.noise, such as (0.2, 0.1), and random.prior_std="
            f"0, got random.noise={random.noise} and random.prior_std={random.prior_std:g}"
        )
    if method.draws == "weights" and not random.prior_std:
        raise ExperimentError(
            f"robust.method={name!r} needs random weights: set random.prior_std, such as 0.1"
        )
    if diversity.weight and not (random.prior_std or any(random.noise)):
        raise ExperimentError(
            f"diversity.weight={diversity.weight:g} needs a random network, whose gradients differ "
            "between draws: set random.noise or random.prior_std, with a method that trains it"
        )
    if random.draws and (config.data.validation or config.evaluation.precise_bn):
        key = "data.validation" if config.data.validation else "evaluation.precise_bn"
        raise ExperimentError(
            f"config.{key} is for networks with bounds, which a random one does not have: no epoch "
            f"is selected, and running averages are its statistics; set config.{key} to "
            f"{'0' if config.data.validation else 'False'}"
        )


def _relaxing() -> str:
    """Lists the methods with a relaxation: `crown-ibp, ..., cap (not fused)`."""
    methods = {name: method for name, method in METHODS.items() if method.relaxes}
    variants = [variant for method in methods.values() for variant in method.variants.values()]
    return ", ".join(methods) + _without(variant for variant in variants if not variant.relaxes)


def _divisible() -> str:
    """Lists the methods with divisible rows: `crown-ibp (not fused), ... or cap (exact)`."""
    described = [
        name + _without(v for v in method.variants.values() if not v.divisible_rows)
        for name, method in METHODS.items()
        if method.divisible_rows
    ]
    return f"{', '.join(described[:-1])} or {described[-1]}"


def _without(variants: Iterable[TrainingMethod]) -> str:
    """Describes a method without these variants of it, in parentheses; empty without any."""
    descriptions = ", ".join(variant.otherwise for variant in variants)
    return f" ({descriptions})" if descriptions else ""

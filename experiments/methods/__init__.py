"""Training methods by name."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
from jax.sharding import Mesh

from boundjax import slopes
from experiments.methods import adversarial, bounded
from experiments.methods.certified import certified
from experiments.methods.lipschitz import lipschitz
from experiments.methods.method import PIXEL_RANGE as PIXEL_RANGE
from experiments.methods.method import Batch as Batch
from experiments.methods.method import Method as Method
from experiments.methods.method import Objective as Objective
from experiments.methods.method import Setting as Setting
from experiments.methods.method import Threat as Threat
from experiments.methods.method import Weights as Weights
from experiments.methods.natural import natural
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError


def _linear(setting: Setting, slopes_of: Callable) -> Method:
    """Linear bounds on interval pre-activations, mixed with interval margins by beta."""
    bound = bounded.linear_bound(slopes_of, setting.mesh)
    return certified(setting, lambda key: bound, mixes_intervals=True)


def _crown_ibp(setting: Setting) -> Method:
    if setting.config.relaxation.fused:
        return certified(setting, lambda key: bounded.fused_bound, mixes_intervals=True)
    return _linear(setting, bounded.fixed_slopes("adaptive"))


def _cap(setting: Setting) -> Method:
    projections = setting.config.relaxation.projections
    if projections:
        return certified(setting, lambda key: bounded.estimated_bound(projections, key))
    bound = bounded.cap_bound(setting.mesh)
    return certified(setting, lambda key: bound)


def _attacked(setting: Setting, bound: bounded.Bound, *, after_ramp: bool = False) -> Method:
    attack = adversarial.attack_of(setting)
    return certified(setting, lambda key: bound, attack=attack, after_ramp=after_ramp)


def _pq_slopes(setting: Setting) -> Method:
    p, q = setting.config.relaxation.p, setting.config.relaxation.q
    return _linear(setting, bounded.drawn_slopes(lambda key: slopes.random(p, q, key)))


METHODS: dict[str, Callable[[Setting], Method]] = {
    "natural": natural,
    "pgd": lambda s: _attacked(s, adversarial.pgd_bound(s)),
    "ibp": lambda s: certified(s, lambda key: bounded.interval_bound),
    "crown_ibp": _crown_ibp,
    "one_step": lambda s: _linear(s, bounded.one_step_slopes(s)),
    "cap_ibp": lambda s: _linear(s, bounded.fixed_slopes("parallel")),
    "random_slopes": lambda s: _linear(s, bounded.drawn_slopes(slopes.uniform)),
    "pq_slopes": _pq_slopes,
    "cap": _cap,
    "bcp": lambda s: lipschitz(s, box=True),
    "lmt": lambda s: lipschitz(s, box=False),
    "sabr": lambda s: _attacked(s, adversarial.sabr_bound(s)),
    "mtl_ibp": lambda s: _attacked(s, adversarial.expressive_bound(s, "mtl_ibp")),
    "exp_ibp": lambda s: _attacked(s, adversarial.expressive_bound(s, "exp_ibp")),
    "cc_ibp": lambda s: _attacked(s, adversarial.expressive_bound(s, "cc_ibp")),
    "taps": lambda s: certified(
        s, lambda key: adversarial.taps_bound(s, small=False), after_ramp=True
    ),
    "staps": lambda s: _attacked(s, adversarial.taps_bound(s, small=True), after_ramp=True),
}

# Those whose objectives are about l-infinity balls.
_ONLY_LINF = ("sabr", "taps", "staps")
# Those with a relaxation for the regularizers `gap` and `slack`.
_RELAXING = ("crown_ibp", "one_step", "cap_ibp", "random_slopes", "pq_slopes", "cap")


def create(model: nn.Module, config: Config, mesh: Mesh | None = None) -> Method:
    """The method that `config` names, for `model`, on the devices of `mesh`.

    Raises:
      ExperimentError: for an unknown name, or settings that the method has nothing to do with.
    """
    name, regularizers = config.robust.method, config.regularizers
    if name not in METHODS:
        raise ExperimentError(
            f"unknown robust.method {name!r}: use one of {', '.join(sorted(METHODS))}"
        )
    if name in _ONLY_LINF and config.robust.norm != "inf":
        raise ExperimentError(
            f"robust.method={name!r} needs robust.norm='inf', got {config.robust.norm!r}"
        )
    if name in ("taps", "staps") and config.adversary.split < 1:
        raise ExperimentError(
            f"robust.method={name!r} needs adversary.split, the number of layers before the attack"
        )
    fused = name == "crown_ibp" and config.relaxation.fused
    if (regularizers.gap or regularizers.slack) and (name not in _RELAXING or fused):
        raise ExperimentError(
            f"regularizers.gap and .slack need one of {', '.join(_RELAXING)} (not fused), "
            f"got robust.method={name!r}"
        )
    without = ("natural", "bcp", "lmt")
    if mesh is not None and mesh.shape["spec"] > 1:
        # One image's slopes are optimised on all rows together, and fused rows are one row.
        divisible = name in _RELAXING and name != "one_step" and not fused
        if not divisible or (name == "cap" and config.relaxation.projections):
            raise ExperimentError(
                f"config.mesh.spec={mesh.shape['spec']} divides the rows of linear bounds: of "
                f"crown_ibp (not fused), cap_ibp, random_slopes, pq_slopes and cap (exact), "
                f"got robust.method={name!r}; set config.mesh.spec=1"
            )
    wanted = [
        key
        for key in ("tightness", "relu_balance", "relu_stability", "l1")
        if getattr(regularizers, key)
    ]
    if wanted and name in without:
        raise ExperimentError(
            f"regularizers.{wanted[0]} needs a method that trains on intervals, "
            f"got robust.method={name!r}"
        )
    return METHODS[name](Setting(model, config, mesh))

"""Methods by name, and their margins compiled for a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import PyTree

from boundjax.certification import sharding
from boundjax.precision import training_precision
from boundjax.sets.ball import LpBall
from boundjax.sets.interval import Interval
from boundjax.sets.threat import Threat
from boundjax.slopes import optimized
from boundjax.training.losses import robust_cross_entropy
from boundjax.transforms.interval import interval
from boundjax.transforms.linear import linear
from boundjax.transforms.lipschitz import lipschitz
from boundjax.transforms.specification import margin_specification


def _preset(**options: Any) -> Callable[[Callable[[Array], Array], int], Callable[..., Any]]:
    return lambda f, max_bytes: linear(f, sides="lower", max_bytes=max_bytes, **options)


# Options of `linear` by method.
LINEAR_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "crown-ibp": {},
    # From CROWN's slopes, not the papers' 0.5: the start counts too, so never worse than crown-ibp.
    "one-step": {"slopes": optimized(objective=robust_cross_entropy, start="adaptive")},
    "crown": {"intermediate": "linear"},
    # To the letter, so that published errors are reproduced: see `linear`'s `intersect`.
    "fast-lin": {"slopes": "parallel", "intermediate": "linear", "intersect": False},
    # 20 steps of Adam; the rate and its decay did best on the stored bounds of another library.
    "alpha-crown": {
        "slopes": optimized(
            steps=20,
            rule=optax.adam(optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.9)),
            per_spec=True,
            optimize_intermediate=True,
        ),
        "intermediate": "linear",
    },
}

# Every sound method by name: (function of one example, byte budget) -> bounds function.
METHODS: Mapping[str, Callable[[Callable[[Array], Array], int], Callable[..., Any]]] = {
    "interval": lambda f, max_bytes: interval(f),
    **{name: _preset(**options) for name, options in LINEAR_OPTIONS.items()},
    "lmt": lambda f, max_bytes: lipschitz(f, box=False),
    "bcp": lambda f, max_bytes: lipschitz(f),
}

# Those that rest on spectral norms.
LIPSCHITZ = ("lmt", "bcp")

BEST = "best"
# Of its methods: alpha-CROWN costs tens of times as much as all the others together.
IN_BEST = ("interval", "crown-ibp", "one-step", "crown", "fast-lin")
# And of balls other than boxes; LMT is never better.
IN_BEST_OF_BALLS = (*IN_BEST, "bcp")

_DEFAULT_BATCH = {
    **dict.fromkeys(("interval", "lmt", "bcp"), 512),
    **dict.fromkeys(("crown-ibp", "one-step"), 128),
    "alpha-crown": 4,
}

# One example after the other on CPU: their rows fill the machine, and the rows that each of them
# needs are known exactly, while examples that are mapped over together take the same.
ONE_BY_ONE = ("crown", "fast-lin", "alpha-crown")

# A transform of the user's: function of one example -> function from an input set to an Interval.
Transform = Callable[[Callable[[Array], Array]], Callable[..., Any]]


def default_batch(method: str | Transform) -> int:
    """Examples in one compiled call where the caller does not say."""
    return _DEFAULT_BATCH.get(method, 16) if isinstance(method, str) else 16


def name_of(method: str | Transform) -> str:
    """A method's name for the certificate: ``linear(slopes='parallel')`` for a partial."""
    if isinstance(method, str):
        return method
    if isinstance(method, functools.partial):
        options = [*map(repr, method.args), *(f"{k}={v!r}" for k, v in method.keywords.items())]
        return f"{name_of(method.func)}({', '.join(options)})"
    return getattr(method, "__name__", type(method).__name__)


def compiled_margins(
    apply: Callable,
    method: str | Transform,
    num_classes: int,
    max_bytes: int,
    one_by_one: bool,
    mesh: Mesh | None = None,
) -> Callable[..., Array]:
    """Compiles ``(variables, threat, xs, eps, labels) -> margins [B, C]`` for one method.

    The batch is divided over the devices of ``mesh``.
    """

    @training_precision("highest")  # a certificate, whoever asks
    def margins(variables: PyTree, threat: Threat, xs: Array, eps: Array, labels: Array) -> Array:
        def function(x: Array) -> Array:
            return apply(variables, x[None])[0]

        transformed = (
            METHODS[method](function, max_bytes) if isinstance(method, str) else method(function)
        )

        def bounds(ball: LpBall, specification: Array) -> Interval:
            found = transformed(ball, specification)
            if not isinstance(found, Interval):
                raise TypeError(
                    f"method must give bounds, an Interval, but {name_of(method)} returned "
                    f"{type(found).__name__}; an estimate or a pair with aux certifies nothing"
                )
            return found

        def one(x: Array, radius: Array, label: Array) -> Array:
            specification = margin_specification(label, num_classes, dtype=x.dtype)
            lower = bounds(threat.within(radius)(x), specification).lower
            steps = jnp.arange(1, num_classes, dtype=label.dtype)
            others = (label + steps) % num_classes
            return jnp.zeros((num_classes,), lower.dtype).at[others].set(lower)

        if one_by_one:
            return jax.lax.map(lambda example: one(*example), (xs, eps, labels))
        return jax.vmap(one)(xs, eps, labels)

    return sharding.compiled(margins, mesh, whole=2)

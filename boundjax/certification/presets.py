"""The methods of `certify` by name, and their margins compiled for a batch."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from boundjax import sharding
from boundjax.certification.applies import Apply, one_example
from boundjax.precision import training_precision
from boundjax.sets.ball import LpBall
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.sets.threat import Threat
from boundjax.slopes import optimized
from boundjax.training.losses import robust_cross_entropy
from boundjax.transforms.interval import interval
from boundjax.transforms.linear import LinearOptions, linear
from boundjax.transforms.lipschitz import lipschitz
from boundjax.transforms.presets import LINEAR_OPTIONS
from boundjax.transforms.specification import margin_specification
from boundjax.typing import Jitted, PyTree


class Preset(Protocol):
    """A sound method of `certify`."""

    def __call__(
        self, function: Callable[[Array], Array], max_bytes: int, rounding: Rounding = "nearest", /
    ) -> Callable[..., Any]:
        """Turns a function of one example into `(input_set, specification) -> Interval`.

        Args:
          function: the logits `[C]` of one example.
          max_bytes: memory for the rows of intermediate bounds.
          rounding: what the bounds hold for, see `boundjax.linear`.
        """
        ...


def _preset(options: LinearOptions) -> Preset:
    def transform(
        function: Callable[[Array], Array], max_bytes: int, rounding: Rounding = "nearest", /
    ) -> Callable[..., Any]:
        common: LinearOptions = {"sides": "lower", "max_bytes": max_bytes, "rounding": rounding}
        preset: LinearOptions = {**common, **options}
        return linear(function, **preset)

    return transform


def _interval(
    function: Callable[[Array], Array], max_bytes: int, rounding: Rounding = "nearest", /
) -> Callable[..., Any]:
    return interval(function, rounding=rounding)


def _lipschitz(box: bool) -> Preset:
    def transform(
        function: Callable[[Array], Array], max_bytes: int, rounding: Rounding = "nearest", /
    ) -> Callable[..., Any]:
        return lipschitz(function, box=box, rounding=rounding)

    return transform


# Starts from CROWN's slopes rather than the paper's 0.5, and keeps the better of both bounds: never
# worse than crown-ibp.
_ONE_STEP: LinearOptions = {"slopes": optimized(objective=robust_cross_entropy, start="adaptive")}

# Every sound method by name.
METHODS: Mapping[str, Preset] = {
    "interval": _interval,
    "crown-ibp": _preset(LINEAR_OPTIONS["crown-ibp"]),
    "one-step": _preset(_ONE_STEP),
    **{name: _preset(LINEAR_OPTIONS[name]) for name in ("crown", "fast-lin", "alpha-crown")},
    "lmt": _lipschitz(box=False),
    "bcp": _lipschitz(box=True),
}

# Methods that use spectral norms.
LIPSCHITZ = ("lmt", "bcp")

BEST = "best"
# Without alpha-crown, which costs tens of times as much as these together.
IN_BEST = ("interval", "crown-ibp", "one-step", "crown", "fast-lin")
# Branch and bound; these two are tried first.
COMPLETE = "complete"
IN_COMPLETE = ("crown-ibp", "crown")
# For norms other than inf. LMT is left out because BCP is never looser.
IN_BEST_OF_BALLS = (*IN_BEST, "bcp")

# The names that `method` accepts.
NAMES = (*METHODS, BEST, COMPLETE)

_DEFAULT_BATCH = {
    **dict.fromkeys(("interval", "lmt", "bcp"), 512),
    **dict.fromkeys(("crown-ibp", "one-step"), 128),
    "alpha-crown": 4,
    "complete": 1,
}

# On CPU these bound one example after the other: the rows of one example fill the machine, and
# only the rows that it needs are computed, while vmapped examples all compute the same rows.
ONE_BY_ONE = ("crown", "fast-lin", "alpha-crown")

# A custom transform: function of one example -> function from an input set to an `Interval`.
Transform: TypeAlias = Callable[[Callable[[Array], Array]], Callable[..., Any]]

Method: TypeAlias = Literal[
    "interval",
    "crown-ibp",
    "one-step",
    "crown",
    "fast-lin",
    "alpha-crown",
    "lmt",
    "bcp",
    "best",
    "complete",
]


def default_batch(method: str | Transform) -> int:
    """Default number of examples in one compiled call."""
    return _DEFAULT_BATCH.get(method, 16) if isinstance(method, str) else 16


def name_of(method: str | Transform) -> str:
    """A method's name in certificates, for a partial like `linear(slopes='parallel')`."""
    if isinstance(method, str):
        return method
    if isinstance(method, functools.partial):
        partial: functools.partial[Any] = method
        options = [*map(repr, partial.args), *(f"{k}={v!r}" for k, v in partial.keywords.items())]
        return f"{name_of(partial.func)}({', '.join(options)})"
    return getattr(method, "__name__", type(method).__name__)


def compiled_margins(
    apply: Apply,
    method: str | Transform,
    num_classes: int,
    max_bytes: int,
    one_by_one: bool,
    mesh: Mesh | None = None,
    rounding: Rounding = "nearest",
) -> Jitted:
    """Compiles `(variables, threat, xs, eps, labels, constants) -> margins [B, C]` of one method.

    A model that classifies several positions of an example has labels `[B, ...]` and margins
    `[B, ..., C]`: its outputs are bounded as one vector. The devices of `mesh` divide the batch.
    `eps` replaces the radius of `threat`. A transform rounds as it says itself.
    """

    @training_precision("highest")  # certificates ignore the caller's matmul precision
    def margins(
        variables: PyTree,
        threat: Threat,
        xs: Array,
        eps: Array,
        labels: Array,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        def bounds(function: Callable[[Array], Array], ball: LpBall, rows: Array) -> Interval:
            transformed = (
                METHODS[method](function, max_bytes, rounding)
                if isinstance(method, str)
                else method(function)
            )
            result = transformed(ball, rows)
            if not isinstance(result, Interval):
                raise TypeError(
                    f"method must give bounds, an Interval, but {name_of(method)} returned "
                    f"{type(result).__name__}; an estimate or a pair with aux certifies nothing"
                )
            return result

        def one(x: Array, radius: Array, label: Array, constants: Sequence[PyTree]) -> Array:
            function = one_example(apply, variables, None, constants)
            specification = margin_specification(label, num_classes, dtype=x.dtype)
            if label.ndim:
                function, specification = _flat(function), _of_positions(specification)
            lower = bounds(function, threat.within(radius)(x), specification).lower
            return _in_order(lower.reshape(*label.shape, num_classes - 1), label)

        if one_by_one:

            def one_of_batch(example: Any) -> Array:
                return one(*example)

            return jax.lax.map(one_of_batch, (xs, eps, labels, constants))
        return jax.vmap(one)(xs, eps, labels, constants)

    return sharding.compiled(margins, mesh, whole=2)


def _flat(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: function(x).reshape(-1)


def _of_positions(specification: Array) -> Array:
    """Rows `[..., m, C]` of each position as rows of the flat logits of all, `[P m, P C]`."""
    m, classes = specification.shape[-2:]
    each = specification.reshape(-1, m, classes)
    positions = len(each)
    identity = jnp.eye(positions, dtype=each.dtype)[:, None, :, None]
    return (identity * each[:, :, None, :]).reshape(positions * m, positions * classes)


def _in_order(lower: Array, label: Array) -> Array:
    """Margins of the classes after the label `[..., C - 1]` by class `[..., C]`: 0 at the label."""
    classes = lower.shape[-1] + 1
    padded = jnp.concatenate([jnp.zeros_like(lower[..., :1]), lower], axis=-1)
    every = jnp.arange(classes, dtype=label.dtype).reshape((1,) * label.ndim + (-1,))
    steps = (every - label[..., None]) % classes
    return jnp.take_along_axis(padded, steps, axis=-1)

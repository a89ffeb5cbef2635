"""Policies for the free lines of a relaxation, such as the lower line of an unstable ReLU.

A policy maps bounds `lower < 0 < upper` around a kink at 0 to the free slope's position in
`[0, 1]` (for a ReLU: the lower slope itself). Any position is sound; stable units do not use it.
Ops whose best line is known (tangents of smooth functions, planes of products) do not ask the
policy. Their lines have positions all the same, which a dictionary may set and `optimized` moves.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Set
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

SlopePolicy = Callable[[Array, Array], Array]


def adaptive(
    lower: Float[Array, "*shape"], upper: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """1 where `upper > -lower`, else 0, for the least area (Zhang et al. 2018, CROWN)."""
    return (upper > -lower).astype(lower.dtype)


def parallel(
    lower: Float[Array, "*shape"], upper: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`upper / (upper - lower)`, parallel to the upper line.

    Fast-Lin (Weng et al. 2018) and CAP (Wong & Kolter 2018) use this slope.
    """
    unstable = (lower < 0) & (upper > 0)
    return jnp.where(unstable, upper / jnp.where(unstable, upper - lower, 1.0), 0.0)


def zero(lower: Float[Array, "*shape"], upper: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0: the ReLU's lower line is `y >= 0`."""
    return jnp.zeros_like(lower)


def one(lower: Float[Array, "*shape"], upper: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1: the ReLU's lower line is `y >= x`."""
    return jnp.ones_like(lower)


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn:
    """A random policy, which draws separate numbers for every op from the key and its label."""

    key: Array
    draw: Callable[[Array, Array, Array], Array]

    def at(self, label: str) -> SlopePolicy:
        digest = hashlib.sha256(label.encode()).digest()
        key = jax.random.fold_in(self.key, int.from_bytes(digest[:4], "little"))
        return lambda lower, upper: self.draw(key, lower, upper)


def uniform(key: Array) -> _Drawn:
    """Uniform in `[0, 1]`, one draw per unit (RANDOM of Lee et al. 2021).

    Args:
      key: a PRNG key; under `vmap`, one per example.
    """
    return _Drawn(key, lambda k, lower, upper: jax.random.uniform(k, lower.shape, lower.dtype))


def random(p: Float[Array, ""] | float, q: Float[Array, ""] | float, key: Array) -> _Drawn:
    """0 or 1: 1 with probability `p` where `|lower| > |upper|`, with probability `q` elsewhere.

    These are the variants of the loss-landscape study (Lee et al. 2021): `(0, 1)` is `adaptive`,
    `(0, 0)` is `zero`, `(1, 1)` is `one`.

    Args:
      p, q: probabilities in `[0, 1]`.
      key: a PRNG key; under `vmap`, one per example.

    Raises:
      ValueError: for a probability outside `[0, 1]`.
    """
    for name, value in (("p", p), ("q", q)):
        if not isinstance(value, Tracer) and not 0 <= value <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], got {value}")

    def draw(k: Array, lower: Array, upper: Array) -> Array:
        probability = jnp.where(-lower > upper, p, q).astype(lower.dtype)
        return (jax.random.uniform(k, lower.shape, lower.dtype) < probability).astype(lower.dtype)

    return _Drawn(key, draw)


class _Constant:
    """Two constant lines at the ends of the op's image: interval bounds as a relaxation."""


CONSTANT = _Constant()

POLICIES: Mapping[str, SlopePolicy | _Constant] = {
    "adaptive": adaptive,
    "parallel": parallel,
    "zero": zero,
    "one": one,
    "constant": CONSTANT,
}

PolicyName = Literal["adaptive", "parallel", "zero", "one", "constant"]
Slopes = PolicyName | float | SlopePolicy | _Drawn | Mapping[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Optimized:
    """The result of `optimized`; its fields are that function's arguments."""

    steps: int
    rule: Literal["sign"] | optax.GradientTransformation
    per_spec: bool
    learning_rate: optax.ScalarOrSchedule
    optimize_intermediate: bool
    start: Slopes
    objective: Callable[[Float[Array, " n"]], Float[Array, ""]] | None

    def transformation(self) -> optax.GradientTransformation:
        """The update of the positions from the gradient of the objective."""
        if not isinstance(self.rule, str):
            return self.rule
        sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
        rate = self.learning_rate
        schedule = rate if callable(rate) else lambda count: rate
        return optax.chain(
            sign, optax.scale_by_schedule(lambda count: jnp.negative(schedule(count)))
        )


def optimized(
    steps: int = 1,
    rule: Literal["sign"] | optax.GradientTransformation = "sign",
    per_spec: bool = False,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    optimize_intermediate: bool = False,
    start: Slopes | None = None,
    objective: Callable[[Float[Array, " n"]], Float[Array, ""]] | None = None,
) -> Optimized:
    """Slopes that gradient steps move towards tighter bounds; pass them as `linear(slopes=...)`.

    The best iterate is kept for every row of the specification, so more steps are never worse.
    Outer gradients treat the slopes as constants, as in the papers.

    Args:
      steps: number of steps, `>= 0`.
      rule: `"sign"`, the projected signed gradient of Lee et al. 2021 (their method is one such
        step), or any optax optimizer: `optax.adam(0.1)` gives alpha-CROWN (Xu et al. 2021).
      per_spec: optimise separate slopes for every row of the specification; otherwise all rows
        share one set.
      learning_rate: the rate of `"sign"`, a number or a schedule of the step; by default
        `2 / (k+1)^2`, whose first step reaches 0 or 1 wherever the gradient is not 0 and whose
        later steps refine that. An optax optimizer has its own rate.
      optimize_intermediate: also optimise the slopes behind the intermediate linear bounds, for
        every pre-activation separately; needs `intermediate="linear"`.
      start: the initial positions, anything that `slopes` may be; by default 0.5 for `"sign"`
        (deterministic, for certificates; use `uniform(key)` for training) and `"adaptive"` for an
        optax optimizer.
      objective: the function that shared slopes minimise. It takes the lower bounds `[m]`, followed
        by minus the upper bounds if both sides are wanted, and must not increase with any of them;
        by default minus their sum.

    Raises:
      ValueError: for `steps < 0`, an unknown rule, a learning rate beside an optax optimizer, or an
        objective beside slopes per row.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    if isinstance(rule, str) and rule != "sign":
        raise ValueError(f"rule must be 'sign' or an optax optimizer, got {rule!r}")
    if not isinstance(rule, str) and learning_rate is not None:
        raise ValueError("learning_rate belongs to rule='sign'; an optax optimizer has its own")
    if per_spec and objective is not None:
        raise ValueError("objective is for shared slopes; with per_spec every row has its own")
    if learning_rate is None:
        learning_rate = lambda count: 2.0 / (count + 1.0) ** 2  # noqa: E731
    if start is None:
        start = 0.5 if isinstance(rule, str) else "adaptive"
    resolve(start)
    return Optimized(steps, rule, per_spec, learning_rate, optimize_intermediate, start, objective)


def resolve(slopes: Slopes) -> Callable[[str], Any]:
    """Converts a user's `slopes=` to the positions of free lines, by the label of an op.

    Args:
      slopes: a name in `POLICIES`; a number in `[0, 1]`; a function of `(lower, upper)`, clipped to
        `[0, 1]`; a random policy; or positions by label (as returned under `aux.slopes`), arrays
        that broadcast to the op's shape with values in `[0, 1]`.

    Returns:
      `label -> position`, see `ir.families.Position`; or `CONSTANT` for every label.

    Raises:
      ValueError: for an unknown name, or a number outside `[0, 1]`.
      KeyError: when an op that needs a policy has no slope in the mapping.
      TypeError: for anything else.
    """
    if isinstance(slopes, str):
        if slopes not in POLICIES:
            raise ValueError(f"slopes must be one of {', '.join(POLICIES)}, got {slopes!r}")
        policy = POLICIES[slopes]
        position = policy if isinstance(policy, _Constant) else _or_default(policy)
        return lambda label: position
    if isinstance(slopes, (int, float)):
        if not 0 <= slopes <= 1:
            raise ValueError(f"slopes must be a number in [0, 1], got {slopes}")
        return lambda label: _or_default(lambda lower, upper: jnp.full_like(lower, slopes))
    if isinstance(slopes, Mapping):
        return lambda label: _position_in(slopes, label)
    if isinstance(slopes, _Drawn):
        return lambda label: _or_default(slopes.at(label))
    if callable(slopes):
        # Lines at positions outside [0, 1] would not bound the op.
        return lambda label: _or_default(lambda *ends: jnp.clip(slopes(*ends), 0.0, 1.0))
    raise TypeError(
        "slopes must be a policy's name, a function of (lower, upper), a dict of arrays or "
        f"optimized(...), got {type(slopes).__name__}"
    )


def require_known(slopes: Mapping[str, Any], labels: Set[str]) -> None:
    """Raises KeyError if a key of `slopes` is the label of none of the function's ops."""
    unknown = sorted(key for key in slopes if key.removesuffix(":below") not in labels)
    if unknown:
        names = ", ".join(sorted(label for label in labels if label))
        raise KeyError(f"slopes has an entry {unknown[0]!r} for no op; known: {names}")


def _or_default(policy: SlopePolicy) -> Callable[..., Array]:
    def position(lower: Array, upper: Array, default: Array | None = None) -> Array:
        return policy(lower, upper) if default is None else default

    return position


def _position_in(slopes: Mapping[str, Any], label: str) -> Callable[..., Array]:
    def position(lower: Array, upper: Array, default: Array | None = None) -> Array:
        # Checked on use, because an op without a free slope (a max pool) needs no entry.
        if label not in slopes:
            if default is not None:
                return default
            raise KeyError(f"slopes need an entry for {label!r}, got {sorted(slopes)}")
        # Outside [0, 1] a line would not bound the function; NaN stays NaN.
        value = jnp.asarray(slopes[label], lower.dtype)
        # Avoid jnp.clip, whose derivative at the ends is one half.
        value = jnp.where(value < 0, 0.0, jnp.where(value > 1, 1.0, value))
        return jnp.broadcast_to(value, lower.shape)

    return position

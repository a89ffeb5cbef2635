"""Input sets: what a perturbed input may be, and the maximum of a linear function over it.

A set knows nothing of networks. It answers two questions:

* ``interval()``: the smallest box around the set, from which interval bounds start;
* ``support(c)``: ``max <c, x>`` over the set, with which linear bounds end ("concretize"); or
  ``spread(c)``, the same seen from the middle of ``interval()``, which the walks use because
  nothing cancels in it.

Sets are pytrees: build them inside ``jax.vmap`` / ``jax.jit``, differentiate with respect to them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from chex import Array, Numeric

from boundjax import ball_box, rounding
from boundjax.numerics import larger, length, smaller, with_derivative_of


class Interval(NamedTuple):
    """Elementwise bounds: ``lower <= value <= upper``, two arrays of one shape."""

    lower: Array
    upper: Array

    @property
    def width(self) -> Array:
        """``upper - lower``."""
        return self.upper - self.lower

    @property
    def middle(self) -> Array:
        """``(lower + upper) / 2``."""
        return 0.5 * (self.lower + self.upper)

    @property
    def radius(self) -> Array:
        """``(upper - lower) / 2``."""
        return 0.5 * (self.upper - self.lower)


@runtime_checkable
class InputSet(Protocol):
    """What a transform asks of an input set; a user's own set only needs these."""

    @property
    def is_box(self) -> bool:
        """Whether the set equals its ``interval()``; intervals are then exact at the input."""

    def interval(self) -> Interval:
        """The smallest box that contains the set."""

    def support(self, coefficients: Array) -> Array:
        """``max <coefficients, x>`` over the set (or an upper bound on it), a scalar."""

    def spread(self, coefficients: Array) -> Array:
        """``max <coefficients, x - m>`` with ``m`` the middle of ``interval()``, a scalar."""


def _concrete(value: Any) -> np.ndarray | None:
    """``value`` as a numpy array where its numbers are known now, else None.

    None stands for tracers and the placeholders that JAX puts into a pytree (``in_axes``, sharding
    trees).
    """
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        return np.asarray(value)
    return None


def _first(mask: np.ndarray) -> str:
    index = tuple(int(i) for i in np.argwhere(mask)[0])
    return "" if not index else f" at index {index[0] if len(index) == 1 else index}"


def require_finite(name: str, value: Any) -> None:
    """Raises ValueError where a concrete ``value`` holds a NaN or an infinity."""
    array = _concrete(value)
    if array is not None and not np.isfinite(array).all():
        bad = ~np.isfinite(array)
        raise ValueError(f"{name} must be finite, got {array[bad].flat[0]}{_first(bad)}")


def require_radius(value: Any) -> None:
    """Raises ValueError where a concrete radius is negative or not finite."""
    array = _concrete(value)
    if array is not None:
        bad = ~(np.isfinite(array) & (array >= 0))
        if bad.any():
            raise ValueError(
                f"eps must be finite and >= 0, got {array[bad].flat[0]}{_first(bad)}; "
                "give the radius in the units of the input"
            )


def require_norm(name: str, value: Any) -> None:
    """Raises ValueError where ``value`` is no order of a norm, TypeError where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(
            f"{name} must be a number, the order of a norm (1, 2 or jax.numpy.inf), got {value!r}"
        )
    if not value >= 1:
        raise ValueError(f"{name} must be a norm's order >= 1 (1, 2 or inf), got {value}")


def require_input_set(value: Any) -> None:
    """Raises TypeError where ``value`` is not one input set."""
    if isinstance(value, InputSet):
        return
    if isinstance(value, Interval):
        raise TypeError("expected an input set, got an Interval; use boundjax.Box(*interval)")
    if isinstance(value, (dict, list, tuple)):
        raise TypeError(f"expected one input set, got a {type(value).__name__}; {_ONE_ARRAY}")
    if hasattr(value, "shape"):
        raise TypeError(
            f"expected an input set, got an array of shape {tuple(value.shape)}; say what may be "
            "perturbed: boundjax.LpBall(x, eps) or boundjax.Box(lower, upper)"
        )
    raise TypeError(
        "expected an input set such as boundjax.LpBall or boundjax.Box (with is_box, interval(), "
        f"support() and spread()), got {type(value).__name__}"
    )


def require_array(name: str, value: Any) -> None:
    """Raises TypeError where ``value`` is a collection of arrays instead of one."""
    leaves = value.values() if isinstance(value, Mapping) else ()
    if isinstance(value, (list, tuple)):
        leaves = [v for v in value if np.ndim(v) > 0 and hasattr(v, "shape")]
    if isinstance(value, Mapping) or len(leaves):
        raise TypeError(f"{name} must be one array, got a {type(value).__name__}; {_ONE_ARRAY}")


# What to do with a function of several inputs.
_ONE_ARRAY = (
    "a function of several inputs takes them as one array: concatenate them, and split that array "
    "inside the function"
)


def _float(value: Numeric, like: Any = None) -> Array:
    """``value`` as a floating array (of ``like``'s dtype where given)."""
    if like is not None:
        return jnp.asarray(value, dtype=jnp.result_type(like))
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lower", "upper"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Box:
    """All ``x`` with ``lower <= x <= upper``, elementwise; both of the input's shape.

    Raises:
      ValueError: for different shapes, values that are not finite, or ``lower > upper``.
    """

    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        require_array("Box.lower", self.lower)
        require_array("Box.upper", self.upper)
        lower, upper = _concrete(self.lower), _concrete(self.upper)
        if lower is None or upper is None:
            return
        if lower.shape != upper.shape:
            raise ValueError(
                f"Box needs bounds of one shape, got lower {lower.shape} and upper {upper.shape}"
            )
        require_finite("Box.lower", lower)
        require_finite("Box.upper", upper)
        if (lower > upper).any():
            bad = lower > upper
            raise ValueError(
                f"Box needs lower <= upper, got {lower[bad].flat[0]} > {upper[bad].flat[0]}"
                f"{_first(bad)}"
            )

    @property
    def is_box(self) -> bool:
        """True: the set is its own interval."""
        return True

    def interval(self) -> Interval:
        """The box itself; NaN where a NaN end or ``lower > upper`` turned up under ``jit``."""
        lower = _float(self.lower)
        upper = _float(self.upper, lower)
        empty = ~(lower <= upper)
        return Interval(jnp.where(empty, jnp.nan, lower), jnp.where(empty, jnp.nan, upper))

    def ball(self) -> tuple[Array, Array]:
        """The center and the radius of the smallest l2 ball that holds the set."""
        interval = self.interval()
        return interval.middle, length(interval.radius)

    def support(self, coefficients: Array) -> Array:
        """``max <c, x> = <c, middle> + <|c|, radius>``; ``c`` has the input's shape."""
        return jnp.sum(coefficients * self.interval().middle) + self.spread(coefficients)

    def spread(self, coefficients: Array) -> Array:
        """``max <c, x - middle> = <|c|, radius>``."""
        return jnp.sum(jnp.abs(coefficients) * self.interval().radius)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "eps", "clip"],
    meta_fields=["p", "outward"],
)
@dataclasses.dataclass(frozen=True)
class LpBall:
    """All ``x`` with ``||(x - center) / eps||_p <= 1``, cut to ``clip[0] <= x <= clip[1]``.

    Attributes:
      center: the unperturbed input, any shape.
      eps: radius in the units of the input (for pixels in [0, 1]: 8 / 255, say), ``>= 0``; a
        scalar, or an array that broadcasts to the input's shape (one radius per feature; 0 keeps it
        fixed).
      p: order of the norm, 1, 2 or ``inf`` (any ``p >= 1`` works through its dual norm).
      clip: ``None`` or ``(low, high)``, the range of valid inputs, scalars or arrays.
      outward: whether the ends of ``interval()`` are rounded outwards where they are inexact, as
        certificates need it; else to nearest, where an ``eps`` below half a spacing of the center
        is lost.

    ``support`` is exact for every ball without clip, and for a clipped one with ``p = inf`` or
    ``p = 2`` whose center lies in the clip range. Else (other finite ``p``, a center outside) it is
    an upper bound, no larger than the ball's and the clipped box's support.

    Raises:
      ValueError: for ``p < 1``, a radius that is negative or NaN, a center that is not finite, a
        clip range that is empty.
    """

    center: Array
    eps: Numeric
    p: float = jnp.inf
    clip: tuple[Numeric, Numeric] | None = None
    outward: bool = False

    def __post_init__(self) -> None:
        require_norm("p", self.p)
        require_array("LpBall.center", self.center)
        require_finite("LpBall.center", self.center)
        require_radius(self.eps)
        require_clip(self.clip)

    @property
    def is_box(self) -> bool:
        """True for ``p = inf``, with or without clip."""
        return self.p == jnp.inf

    def _radius(self) -> Array:
        center, eps = _float(self.center), jnp.asarray(self.eps)
        # Not in __post_init__: a batch of balls (vmap's result) has one scalar eps per center.
        if eps.ndim > center.ndim or any(
            e not in (1, n) for e, n in zip(eps.shape[::-1], center.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"eps must be a scalar or broadcast to the input's shape {center.shape}, "
                f"got shape {eps.shape}"
            )
        eps = jnp.broadcast_to(_float(eps, center), center.shape)
        # Under jit a bad radius cannot raise; NaN bounds never certify.
        return jnp.where(eps >= 0, eps, jnp.nan)

    def _clip(self) -> tuple[Array, Array]:
        center = _float(self.center)
        low, high = (jnp.broadcast_to(_float(end, center), center.shape) for end in self.clip)
        return low, high

    def interval(self) -> Interval:
        """``[center - eps, center + eps]``, cut to the clip range."""
        center, radius = _float(self.center), self._radius()
        nearest = self._cut(center - radius, center + radius)
        if not self.outward:
            return nearest
        ends = rounding.with_exact_middle(*self._cut(*rounding.outward_ends(center, radius)))
        # Rounding has no derivative; that of the sums is the right one.
        return Interval(*map(with_derivative_of, jax.lax.stop_gradient(ends), nearest))

    def _cut(self, lower: Array, upper: Array) -> Interval:
        if self.clip is not None:
            low, high = self._clip()
            lower, upper = jnp.clip(lower, low, high), jnp.clip(upper, low, high)
        return Interval(lower, upper)

    def ball(self) -> tuple[Array, Array]:
        """``center`` and the radius of an l2 ball around it that holds the set.

        With one eps for ``n`` features it is ``n ** (1 / 2 - 1 / max(p, 2)) eps``, or less where
        the clip range does not reach as far.
        """
        center, radius, interval = _float(self.center), self._radius(), self.interval()
        if self.p <= 2:
            size = jnp.max(radius, initial=0.0)
        else:  # Hoelder: ||eps u||_2 <= ||eps||_r ||u||_p with 1 / r = 1 / 2 - 1 / p
            size = dual_norm(radius, 2.0 if self.p == jnp.inf else 2 * self.p / (self.p + 2))
        corner = jnp.maximum(jnp.abs(interval.upper - center), jnp.abs(center - interval.lower))
        return center, jnp.minimum(size, length(corner))

    def support(self, coefficients: Array) -> Array:
        """``max <c, x> = <c, center> + ||eps * c||_q`` with ``1 / p + 1 / q = 1``."""
        return jnp.sum(coefficients * self.interval().middle) + self.spread(coefficients)

    def spread(self, coefficients: Array) -> Array:
        """``max <c, x - middle>``; the middle is the center unless clipped or rounded outwards."""
        interval = self.interval()
        box = jnp.sum(jnp.abs(coefficients) * interval.radius)
        if self.is_box:
            return box
        center, radius = _float(self.center), self._radius()
        if self.clip is None and not self.outward:
            return dual_norm(radius * coefficients, self.p)
        shift = jnp.sum(coefficients * (center - interval.middle))
        if self.clip is None:
            return dual_norm(radius * coefficients, self.p) + shift
        if self.p != 2:
            return smaller(dual_norm(radius * coefficients, self.p) + shift, box)
        # In u = (x - center) / eps the ball is round; a fixed feature's slope is 0 there.
        low, high = self._clip()
        unit = jnp.where(radius > 0, radius, 1.0)
        below, above = (center - low) / unit, (high - center) / unit
        found = ball_box.spread(radius * coefficients, 1.0, below, above) + shift
        # With the center inside it is exact; a tie with the box would only blur its derivative.
        inside = jnp.all((below >= 0) & (above >= 0))
        return jnp.where(inside, found, smaller(found, box))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "radius", "lower", "upper"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class BallBox:
    """All ``x`` with ``||x - center||_2 <= radius`` and ``lower <= x <= upper``, elementwise.

    What is known of a hidden layer when both its Lipschitz constant and its interval are.

    Attributes:
      center: the ball's center, any shape.
      radius: scalar, in the units of ``x``, ``>= 0``; infinite where only the box is known.
      lower: of the center's shape; may be ``-inf``.
      upper: of the center's shape; may be ``inf``.

    ``support`` is exact where the center lies in the box. Where it lies outside, the box counts as
    extended to the center: an upper bound, no larger than the support of ``interval()``. A set that
    is unbounded in some feature has no middle; its support is NaN.

    Raises:
      ValueError: for different shapes, a center that is not finite, a radius that is negative or
        NaN, ``lower > upper``.

    Source: Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound".
    """

    center: Array
    radius: Numeric
    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        require_array("BallBox.center", self.center)
        require_finite("BallBox.center", self.center)
        radius = _concrete(self.radius)
        if radius is not None and not (radius >= 0).all():
            bad = ~(radius >= 0)
            raise ValueError(f"BallBox.radius must be >= 0, got {radius[bad].flat[0]}{_first(bad)}")
        center, lower, upper = map(_concrete, (self.center, self.lower, self.upper))
        if center is None or lower is None or upper is None:
            return
        if not center.shape == lower.shape == upper.shape:
            raise ValueError(
                f"BallBox needs arrays of one shape, got center {center.shape}, "
                f"lower {lower.shape} and upper {upper.shape}"
            )
        bad = ~(lower <= upper)
        if bad.any():
            raise ValueError(
                f"BallBox needs lower <= upper, got {lower[bad].flat[0]} > {upper[bad].flat[0]}"
                f"{_first(bad)}"
            )

    @property
    def is_box(self) -> bool:
        """False: the ball cuts the box's corners."""
        return False

    def _radius(self) -> Array:
        radius = _float(self.radius, _float(self.center))
        # Not in __post_init__: a batch of sets (vmap's result) has one radius per center.
        if radius.ndim:
            raise ValueError(f"BallBox.radius must be a scalar, got shape {radius.shape}")
        return radius

    def interval(self) -> Interval:
        """``[center - radius, center + radius]``, cut to the box; NaN where that is empty."""
        center, radius = _float(self.center), self._radius()
        lower = larger(_float(self.lower, center), center - radius)
        upper = smaller(_float(self.upper, center), center + radius)
        empty = ~(lower <= upper)
        return Interval(jnp.where(empty, jnp.nan, lower), jnp.where(empty, jnp.nan, upper))

    def ball(self) -> tuple[Array, Array]:
        """``center`` and ``radius``, or less where the box does not reach as far."""
        center = _float(self.center)
        lower, upper = _float(self.lower, center), _float(self.upper, center)
        corner = jnp.maximum(jnp.abs(upper - center), jnp.abs(center - lower))
        return center, jnp.minimum(self._radius(), length(corner))

    def support(self, coefficients: Array) -> Array:
        """``max <c, x>``; ``c`` has the input's shape."""
        return jnp.sum(coefficients * self.interval().middle) + self.spread(coefficients)

    def spread(self, coefficients: Array) -> Array:
        """``max <c, x - middle>``, see ``ball_box.spread``."""
        center, interval = _float(self.center), self.interval()
        below = center - _float(self.lower, center)
        above = _float(self.upper, center) - center
        shift = jnp.sum(coefficients * (center - interval.middle))
        found = ball_box.spread(coefficients, self._radius(), below, above) + shift
        # With the center inside it is exact; a tie with the box would only blur its derivative.
        inside = jnp.all((below >= 0) & (above >= 0))
        box = jnp.sum(jnp.abs(coefficients) * interval.radius)
        return jnp.where(inside, found, smaller(found, box))


def require_clip(clip: tuple[Numeric, Numeric] | None) -> None:
    """Raises ValueError where ``clip`` is neither None nor a pair ``(low, high)``, low <= high."""
    if clip is None:
        return
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"clip must be None or a pair (low, high), got {clip!r}")
    low, high = _concrete(clip[0]), _concrete(clip[1])
    if low is not None and high is not None and not (low <= high).all():
        raise ValueError(f"clip must be (low, high) with low <= high, got {clip!r}")


def dual_norm(values: Array, p: float) -> Array:
    """``||values||_q`` with ``1 / p + 1 / q = 1``, over all axes; its gradient at 0 is 0."""
    if p == 1:
        return jnp.max(jnp.abs(values))
    if p == jnp.inf:
        return jnp.sum(jnp.abs(values))
    q = p / (p - 1)
    # Scaling by the largest entry keeps squares of small coefficients from underflowing to 0 (XLA
    # flushes subnormals), which would make the support too small. Double where: no NaN gradient
    # at 0.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(values)))
    positive = scale > 0
    safe = jnp.where(positive, values / jnp.where(positive, scale, 1.0), 1.0)
    norm = jnp.sum(jnp.abs(safe) ** jnp.asarray(q, safe.dtype)) ** jnp.asarray(1 / q, safe.dtype)
    return jnp.where(scale == 0, jnp.zeros_like(scale), scale * norm)

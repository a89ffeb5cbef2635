"""The interface of input sets."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

from jax import Array
from jaxtyping import Float

from boundjax.numerics import length
from boundjax.sets.interval import Interval
from boundjax.typing import PyTree


@runtime_checkable
class InputSet(Protocol):
    """The interface of input sets: a class with these four is one.

    Rigorous bounds also need `outwards()`: the same set with answers that hold for it exactly, not
    up to rounding. The half-width and the middle of its `interval()`, as computed, then describe an
    interval that encloses the set, and `support` and `spread` are upper bounds on exact maxima. A
    method `ball()` may return the center and the radius of an l2 ball that contains the set; it is
    optional.
    """

    @property
    def is_box(self) -> bool:
        """Whether the set equals its `interval()`; intervals are then exact at the input."""
        ...

    def interval(self) -> Interval:
        """The smallest box that contains the set."""
        ...

    def support(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <coefficients, x>` over the set (or an upper bound on it), a scalar."""
        ...

    def spread(self, coefficients: Float[Array, "*shape"]) -> Float[Array, ""]:
        """`max <coefficients, x - m>` with `m` the middle of `interval()`, a scalar."""
        ...


# The set of a function's inputs: an input set, or a pytree of input sets and of arrays that are not
# perturbed.
InputTree: TypeAlias = InputSet | PyTree


def outwards(input_set: InputSet) -> InputSet:
    """The set with rigorous answers, see `InputSet`; sets that are rigorous return themselves.

    Raises:
      TypeError: for a set of a class without `outwards()`.
    """
    method: Any = getattr(input_set, "outwards", None)
    if method is None:
        raise TypeError(
            "rigorous bounds need an input set with a method outwards(), got "
            f"{type(input_set).__name__}; add it (see boundjax.InputSet) or use rounding='nearest'"
        )
    return method()


def enclosing_ball(input_set: InputSet) -> tuple[Array, Array]:
    """The center and the radius of an l2 ball that contains an input set.

    A user's set may define it as `ball() -> (center, radius)`. Otherwise it is the ball around the
    set's interval.
    """
    ball = getattr(input_set, "ball", None)
    if ball is not None:
        return ball()
    interval = input_set.interval()
    return interval.middle, length(interval.radius)

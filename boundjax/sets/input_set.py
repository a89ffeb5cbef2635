"""The interface of input sets."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jax import Array

from boundjax.sets.interval import Interval


@runtime_checkable
class InputSet(Protocol):
    """The interface of input sets: a class with these four is one."""

    @property
    def is_box(self) -> bool:
        """Whether the set equals its `interval()`; intervals are then exact at the input."""
        ...

    def interval(self) -> Interval:
        """The smallest box that contains the set."""
        ...

    def support(self, coefficients: Array) -> Array:
        """`max <coefficients, x>` over the set (or an upper bound on it), a scalar."""
        ...

    def spread(self, coefficients: Array) -> Array:
        """`max <coefficients, x - m>` with `m` the middle of `interval()`, a scalar."""
        ...

"""Functions that are not defined everywhere: infinite bounds, and a warning.

If an interval leaves the domain, outside which the function is NaN, both ends of its bounds are
infinite. If it only touches a pole at the edge of the domain, one end is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from boundjax.ir.node import Node
from boundjax.ops.envelope import Function


class DomainWarning(UserWarning):
    """Bounds on an op's operand leave the op's domain; the bounds on its value are infinite."""


_WARNS = contextvars.ContextVar("boundjax_domain_warns", default=True)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Leaves `warn` out of what is traced inside, whenever that runs.

    A warning is a callback into Python, and JAX keeps no program with one in its cache on disk.
    """
    token = _WARNS.set(False)
    try:
        yield
    finally:
        _WARNS.reset(token)


def warn(node: Node, outside: Array, reason: str) -> None:
    """Warns, now or when compiled code runs, if `outside` holds anywhere.

    It does nothing where it is called in `without_warnings`.

    Args:
      node: the op, for its name and the user's source line.
      outside: boolean, of any shape.
      reason: what the bounds on the operand do, e.g. "reach 0".
    """
    if not _WARNS.get():
        return
    message = (
        f"bounds on the operand of '{node.primitive}' at {node.location} {reason}; the bounds on "
        "its value are infinite"
    )

    def tell(anywhere: Array) -> None:
        if np.any(anywhere):
            warnings.warn(message, DomainWarning, stacklevel=2)

    anywhere = jnp.any(jax.lax.stop_gradient(outside))
    if isinstance(anywhere, Tracer):
        # A callback takes a millisecond, and hardly any run has something to tell.
        jax.lax.cond(anywhere, functools.partial(jax.debug.callback, tell), _nothing, anywhere)
    else:
        tell(anywhere)


def _nothing(anywhere: Array) -> None:
    del anywhere


class Domain(NamedTuple):
    """Where a function is defined: `least <= x <= most`. Numbers may also be arrays.

    Attributes:
      least, most: the ends, possibly infinite.
      at_least, at_most: the function's values there, infinite at a pole.
    """

    least: float = -float("inf")
    at_least: ArrayLike = -float("inf")
    most: float = float("inf")
    at_most: ArrayLike = float("inf")

    @property
    def everywhere(self) -> bool:
        """Whether it has no end."""
        return self.least == -float("inf") and self.most == float("inf")

    def __str__(self) -> str:
        if self.most == float("inf"):
            return f"from {self.least:g} upward"
        return f"from {self.least:g} to {self.most:g}"

    def leaves(self, lower: Array, upper: Array) -> Array:
        """Where an interval leaves the domain."""
        return (lower < self.least) | (upper > self.most)

    def at_pole(self, x: Array) -> Array:
        """Where an operand is an end of the domain at which the function is infinite."""
        ends = (
            (self.least, self.at_least, x <= self.least),
            (self.most, self.at_most, x >= self.most),
        )
        poles = jnp.zeros(x.shape, bool)
        for end, value, reached in ends:
            if np.isfinite(end):
                poles = poles | (reached & _infinite(value, x))
        return poles


def extended(function: Function, domain: Domain) -> Function:
    """Extends a function beyond its domain by its values at the ends.

    The derivative is 0 there and at the ends, where the function's may be infinite. NaN stays NaN.
    """
    if domain.everywhere:
        return function
    least, most = (end if np.isfinite(end) else None for end in (domain.least, domain.most))
    if least is None or most is None:
        inside = least + 1.0 if least is not None else domain.most - 1.0
    else:
        inside = 0.5 * (least + most)

    def extension(x: Array) -> Array:
        below = jnp.zeros(x.shape, bool) if least is None else x <= least
        above = jnp.zeros(x.shape, bool) if most is None else x >= most
        value = function(jnp.where(below | above, inside, x))
        for beyond, end in ((below, domain.at_least), (above, domain.at_most)):
            value = jnp.where(beyond, jnp.broadcast_to(jnp.asarray(end, x.dtype), x.shape), value)
        return value

    return extension


def overflowing(function: Function) -> Function:
    """Sets a function's derivative to 0 where its value overflows, so that 0 times it is not NaN.

    The value at 1/2 must be finite.
    """

    def guarded(x: Array) -> Array:
        value = jax.lax.stop_gradient(function(x))
        finite = jnp.isfinite(value)
        return jnp.where(finite, function(jnp.where(finite, x, 0.5)), value)

    return guarded


def outside(domain: Domain, lower: Array, upper: Array) -> Array:
    """Where an interval leaves the domain, or touches a pole at its end."""
    return domain.leaves(lower, upper) | domain.at_pole(lower) | domain.at_pole(upper)


def restricted(
    low: Array, high: Array, domain: Domain, lower: Array, upper: Array
) -> tuple[Array, Array]:
    """The image of `[lower, upper]` under a function with a domain.

    Args:
      low, high: the image of the part of the interval in the domain.
      domain: the function's.
      lower, upper: the interval.

    Returns:
      The image's ends: infinite where the interval leaves the domain, NaN where all of it is
      outside.
    """
    below = (upper < domain.least) | ((upper <= domain.least) & domain.at_pole(upper))
    above = (lower > domain.most) | ((lower >= domain.most) & domain.at_pole(lower))
    unknown = below | above | jnp.isnan(lower) | jnp.isnan(upper)
    leaves = domain.leaves(lower, upper)
    low, high = jnp.where(leaves, -jnp.inf, low), jnp.where(leaves, jnp.inf, high)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _infinite(value: ArrayLike, like: Array) -> Array:
    return jnp.isinf(jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape))

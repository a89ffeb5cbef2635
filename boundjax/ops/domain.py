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


def extended(function: Function, least: float, at_least: ArrayLike) -> Function:
    """Extends a function below its domain by its value at the edge.

    The derivative is 0 there and at the edge, where the function's may be infinite. NaN stays NaN.
    """
    if least == -float("inf"):
        return function

    def extension(x: Array) -> Array:
        below = x <= least
        value = jnp.broadcast_to(jnp.asarray(at_least, x.dtype), x.shape)
        return jnp.where(below, value, function(jnp.where(below, 1.0, x)))

    return extension


def overflowing(function: Function) -> Function:
    """Sets a function's derivative to 0 where its value overflows, so that 0 times it is not NaN.

    The value at 1 must be finite.
    """

    def guarded(x: Array) -> Array:
        value = jax.lax.stop_gradient(function(x))
        finite = jnp.isfinite(value)
        return jnp.where(finite, function(jnp.where(finite, x, 1.0)), value)

    return guarded


def outside(least: float, at_least: ArrayLike, lower: Array) -> Array:
    """Where an interval leaves the domain `x >= least`, or touches a pole at `least`."""
    return (lower < least) | ((lower <= least) & _pole(at_least, lower))


def restricted(
    low: Array, high: Array, least: float, at_least: ArrayLike, lower: Array, upper: Array
) -> tuple[Array, Array]:
    """The image of `[lower, upper]` under a function with the domain `x >= least`.

    Args:
      low, high: the image of the part of the interval in the domain.
      least: the domain's lower end.
      at_least: the function's value at `least`, infinite at a pole.
      lower, upper: the interval.

    Returns:
      The image's ends: infinite where the interval leaves the domain, NaN where all of it is
      outside.
    """
    all_outside = (upper < least) | ((upper <= least) & _pole(at_least, upper))
    unknown = all_outside | jnp.isnan(lower) | jnp.isnan(upper)
    low, high = jnp.where(lower < least, -jnp.inf, low), jnp.where(lower < least, jnp.inf, high)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _pole(at_least: ArrayLike, like: Array) -> Array:
    return jnp.isinf(jnp.broadcast_to(jnp.asarray(at_least, like.dtype), like.shape))

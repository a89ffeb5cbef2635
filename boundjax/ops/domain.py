"""Functions that are not defined everywhere: honest infinite bounds, and a warning.

An interval that leaves the domain has no bound: the function is not a number there. Both ends are
infinite then. At the very edge of the domain a pole has one infinite end.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from boundjax.ir.node import Node
from boundjax.ops.envelope import Function


class DomainWarning(UserWarning):
    """Bounds on an op's operand leave the op's domain; the bounds on its value are infinite."""


def warn(node: Node, outside: Array, reason: str) -> None:
    """Warns, now or when compiled code runs, if ``outside`` holds anywhere.

    Args:
      node: the op, for its name and the user's source line.
      outside: boolean, of any shape.
      reason: what the bounds on the operand do, e.g. "reach 0".
    """
    message = (
        f"bounds on the operand of '{node.primitive}' at {node.location} {reason}; the bounds on "
        "its value are infinite"
    )

    def tell(found: Array) -> None:
        if np.any(found):
            warnings.warn(message, DomainWarning, stacklevel=2)

    found = jnp.any(jax.lax.stop_gradient(outside))
    if isinstance(found, jax.core.Tracer):
        jax.debug.callback(tell, found)
    else:
        tell(found)


def extended(function: Function, least: float, at_least: ArrayLike) -> Function:
    """A function with its value at the edge of the domain at and below that edge.

    There the derivative may be infinite; this one's is 0. NaN stays NaN.
    """
    if least == -float("inf"):
        return function

    def extension(x: Array) -> Array:
        below = x <= least
        value = jnp.broadcast_to(jnp.asarray(at_least, x.dtype), x.shape)
        return jnp.where(below, value, function(jnp.where(below, 1.0, x)))

    return extension


def overflowing(function: Function) -> Function:
    """The same function, with a derivative of 0 where its value overflows: 0 times it is not NaN.

    Its value at 1 must be finite.
    """

    def guarded(x: Array) -> Array:
        value = jax.lax.stop_gradient(function(x))
        finite = jnp.isfinite(value)
        return jnp.where(finite, function(jnp.where(finite, x, 1.0)), value)

    return guarded


def outside(least: float, at_least: ArrayLike, lower: Array) -> Array:
    """Where an interval leaves the domain ``x >= least``, or touches a pole there."""
    return (lower < least) | ((lower <= least) & _pole(at_least, lower))


def restricted(
    low: Array, high: Array, least: float, at_least: ArrayLike, lower: Array, upper: Array
) -> tuple[Array, Array]:
    """An image of ``[lower, upper]`` where the function has the domain ``x >= least``.

    Args:
      low, high: the image of the part inside.
      least: the domain's lower end.
      at_least: the function's value there, infinite at a pole.
      lower, upper: the interval.

    Returns:
      Infinite ends where the interval leaves the domain, NaN where nothing of it is inside.
    """
    nowhere = (upper < least) | ((upper <= least) & _pole(at_least, upper))
    unknown = nowhere | jnp.isnan(lower) | jnp.isnan(upper)
    low, high = jnp.where(lower < least, -jnp.inf, low), jnp.where(lower < least, jnp.inf, high)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _pole(at_least: ArrayLike, like: Array) -> Array:
    return jnp.isinf(jnp.broadcast_to(jnp.asarray(at_least, like.dtype), like.shape))

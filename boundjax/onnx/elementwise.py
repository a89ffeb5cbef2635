"""Operators of arithmetic and comparisons.

A step may act on a constant that is a numpy array. What rounds is then written with `jax.numpy`, so
that it is traced and bounds account for it; numpy would compute it unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.onnx.node import Node, Value
from boundjax.ops import integers

# An array of exponents is one power for each of its integers.
_MAX_EXPONENTS = 8


def same_rank(node: Node, *values: Value) -> tuple[Value, ...]:
    """Adds leading axes of length 1, so that broadcasting promotes no rank."""
    rank = max(v.ndim for v in values)
    node.check_size(np.broadcast_shapes(*(v.shape for v in values)))
    if node.xp is np and len({v.dtype for v in values if v.dtype != np.bool_}) > 1:
        raise node.error(f"expected operands of one type, got {[str(v.dtype) for v in values]}")
    return tuple(
        v if v.ndim == rank else node.xp.reshape(v, (1,) * (rank - v.ndim) + v.shape)
        for v in values
    )


def unary(name: str) -> Callable[[Node, Value], Value]:
    """The function of one operand that numpy and JAX both call `name`."""
    return lambda node, x: getattr(node.xp, name)(x)


def binary(name: str) -> Callable[[Node, Value, Value], Value]:
    """The function of two broadcast operands that numpy and JAX both call `name`."""
    return lambda node, x, y: getattr(node.xp, name)(*same_rank(node, x, y))


# Whole numbers are equal, or 1 apart: `x - y` beside the middle says the same, and decides it also
# where rounding has moved the ends of their intervals.
_ON_WHOLE: Mapping[str, Callable[[Value], Value]] = {
    "equal": lambda difference: abs(difference) < 0.5,
    "greater": lambda difference: difference > 0.5,
    "greater_equal": lambda difference: difference > -0.5,
    "less": lambda difference: difference < -0.5,
    "less_equal": lambda difference: difference < 0.5,
}


def comparison(name: str) -> Callable[[Node, Value, Value], Value]:
    """`binary` for a comparison, also of integers, which are carried as floats."""

    def compare(node: Node, x: Value, y: Value) -> Value:
        if node.xp is np or not node.kinds or node.kinds[0] != "i":
            return binary(name)(node, x, y)
        x, y = same_rank(node, x, y)
        return _ON_WHOLE[name](node.xp.subtract(x, y))

    return compare


def variadic(function: Callable[[Node, Value, Value], Value]) -> Callable[..., Value]:
    """Folds a function of two operands over any number of them, from the left."""
    return lambda node, *values: reduce(lambda x, y: function(node, x, y), values)


def arithmetic(function: Callable[..., Value]) -> Callable[..., Value]:
    """Makes bounds NaN where integers exceed 2^24, see `boundjax.ops.integers.exact`."""

    def apply(node: Node, *values: Value) -> Value:
        result = function(node, *values)
        return integers.exact(result) if node.computes_integers else result

    return apply


def divide(node: Node, x: Value, y: Value) -> Value:
    """Div; integer quotients are rounded towards 0."""
    x, y = same_rank(node, x, y)
    if x.dtype.kind != "i":
        return node.xp.divide(x, y)
    if not y.all():
        raise node.error("expected integer divisors other than 0, got 0")
    quotient = np.abs(x) // np.abs(y)
    return (np.sign(x) * np.sign(y) * quotient).astype(x.dtype)


def reciprocal(x: Value) -> Value:
    """Reciprocal."""
    return jnp.divide(np.float32(1.0), x)


def power(node: Node, x: Value, y: Value) -> Value:
    """Pow; constant exponents become `integer_pow` and `sqrt` where these say the same."""
    if node.xp is np and x.dtype.kind == "i":
        return _known_integer_power(node, x, y)
    x, y = same_rank(node, x, y if isinstance(y, Array) else node.carried(y))
    if isinstance(y, np.ndarray) and not np.isfinite(y).all():
        raise node.error("expected finite exponents, got others")
    integral = isinstance(y, np.ndarray) and y.size > 0 and (y == np.round(y)).all()
    if not isinstance(y, Array) and y.size and (y == y.flat[0]).all():
        result = _power(x, float(y.flat[0]))
        shape = np.broadcast_shapes(x.shape, y.shape)
        result = result if result.shape == shape else jnp.broadcast_to(result, shape)
    elif integral and len(exponents := np.unique(y)) <= _MAX_EXPONENTS:
        # Each is a power of its own: `jnp.power` has bounds for values above 0 only.
        result = jnp.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
        for exponent in exponents:
            result = jnp.where(y == exponent, _power(x, float(exponent)), result)
    else:
        result = jnp.power(x, y)
    if not node.kinds or node.kinds[0] != "i":
        return result
    if not integral or y.min() < 0:
        raise node.error("expected constant integer exponents of at least 0 for an integer base")
    return integers.exact(result)


def _power(x: Value, exponent: float) -> Array:
    """`x` to one constant exponent."""
    x = jnp.asarray(x)
    if exponent == 0.5:
        return jnp.sqrt(x)
    if exponent.is_integer() and abs(exponent) < 128:
        return jax.lax.integer_pow(x, int(exponent))
    return jnp.power(x, np.float32(exponent))


def _known_integer_power(node: Node, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if y.dtype.kind != "i" or (y < 0).any():
        raise node.error("expected integer exponents of at least 0 for an integer base")
    x, y = same_rank(node, x, y.astype(x.dtype))
    # Half of the range leaves room for the rounding of this estimate.
    if (np.abs(x.astype(np.float64)) ** y > np.iinfo(x.dtype).max / 2).any():
        raise node.error(f"expected powers that {x.dtype} can hold, got larger ones")
    return np.power(x, y)


def modulo(node: Node, x: Value, y: Value) -> Value:
    """Mod: the sign of the divisor for `fmod` 0 (integers), that of the dividend for `fmod` 1."""
    truncated = node.flag("fmod", False)
    x, y = same_rank(node, x, y)
    whole = x.dtype.kind == "i" or node.computes_integers
    # While shapes are found, known integers are float32.
    has_values = node.xp is np or node.kinds
    if has_values and not (truncated or whole):
        raise node.error("attribute fmod: expected 1 for floating-point numbers, got 0")
    if whole and not (isinstance(y, np.ndarray) and y.all()):
        raise node.error("expected constant integer divisors other than 0")
    if x.dtype.kind == "i":
        return np.fmod(x, y) if truncated else np.mod(x, y)
    if whole and not truncated:
        # Computed from the quotient rounded down, which is exact for carried integers.
        return jnp.mod(x, y)
    return jax.lax.rem(*jnp.broadcast_arrays(jnp.asarray(x), jnp.asarray(y)))


def mean(node: Node, *values: Value) -> Value:
    """Mean of any number of operands."""
    total = reduce(lambda x, y: jnp.add(*same_rank(node, x, y)), values)
    return total if len(values) == 1 else jnp.divide(total, np.float32(len(values)))


def where(node: Node, condition: Value, x: Value, y: Value) -> Value:
    """Where."""
    condition, x, y = same_rank(node, condition, x, y)
    return node.xp.where(condition, x, y)


def clip(node: Node, x: Value, minimum: Value | None = None, maximum: Value | None = None) -> Value:
    """Clip; both limits are optional, attributes before opset 11 and operands since."""
    limits = []
    for name, operand in (("min", minimum), ("max", maximum)):
        attribute = node.number(name, None)
        if attribute is not None and operand is not None:
            raise node.error(f"{name} is given twice, as an attribute and as an operand")
        limit = attribute if operand is None else node.to_number(operand)
        limits.append(limit if limit is None or isinstance(limit, Array) else np.float32(limit))
    low, high = limits
    if low is not None and high is not None:
        return jnp.clip(x, low, high)
    if low is not None:
        return jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)

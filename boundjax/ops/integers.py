"""Perturbed integers carried as floating-point numbers, and the range where both agree.

Outside its range an integer type wraps around or is undefined; the floating-point number that
represents the integer does neither. JAX's casts of perturbed values to integer types are refused.
`boundjax.onnx` carries integers as float32 and marks them with these functions.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from boundjax.ir.families import Expansion
from boundjax.ir.node import Node
from boundjax.ir.table import register

# In float32 sums, differences and products of integers are exact up to this magnitude.
LARGEST_EXACT = 2**24

_primitive = Primitive("integer_range")


def held_by(x: Array, dtype: np.dtype | type) -> Array:
    """Prepares `x` for a cast to an integer type; values that the type can hold do not change.

    Casting a number outside the type's range is undefined, and runtimes differ. The value is then
    the type's least number, as on x86 processors. *Bounds are NaN wherever the interval leaves the
    range*, so that they prove nothing.

    Args:
      x: floating-point, of any shape.
      dtype: a signed integer type.

    Returns:
      An array like `x`, not rounded.
    """
    info = np.iinfo(dtype)
    # `x.dtype` may not hold the largest integer: float32 holds 2147483520, but not 2147483647.
    most = np.nextafter(np.asarray(info.max + 1, x.dtype), np.asarray(0, x.dtype))
    return _primitive.bind(x, low=float(info.min), high=float(most), outside=float(info.min))


def exact(x: Array, terms: int = 1) -> Array:
    """Marks `x` as the result of integer arithmetic, which is exact in float32 up to 2^24.

    Beyond that float32 rounds, and a 32-bit integer soon wraps around. *Bounds are NaN wherever the
    interval leaves [-2^24, 2^24]*. The value itself is `x` everywhere.

    Args:
      x: floating-point, of any shape.
      terms: how many elements of `x` are summed next. The range shrinks by this factor, so that
        partial sums are exact, too.
    """
    most = float(LARGEST_EXACT // max(1, terms))
    return _primitive.bind(x, low=-most, high=most, outside=None)


def _value(x: Array, *, low: float, high: float, outside: float | None) -> Array:
    return x if outside is None else jnp.where(_inside(x, low, high), x, _like(outside, x))


def _inside(x: Array, low: float, high: float) -> Array:
    return (x >= _like(low, x)) & (x <= _like(high, x))


def _like(number: float, x: Array) -> Array:
    return jnp.asarray(number, x.dtype)


def _derivative(
    tangent: Array, x: Array, *, low: float, high: float, outside: float | None
) -> Array:
    if outside is None:
        return tangent
    return jnp.where(_inside(x, low, high), tangent, jnp.zeros_like(tangent))


_primitive.def_impl(jax.jit(_value, static_argnames=("low", "high", "outside")))
_primitive.def_abstract_eval(lambda x, **_: ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_primitive, mlir.lower_fun(_value, multiple_results=False))
batching.defvectorized(_primitive)
ad.defjvp(_primitive, _derivative)


def _or_nan(node: Node) -> Callable[[Array], Array]:
    low, high = node.params["low"], node.params["high"]
    return lambda x: jnp.where(_inside(x, low, high), x, _like(np.nan, x))


register(
    Expansion(
        name="integer_range",
        note="integers carried as floats; NaN outside their range",
        expand=_or_nan,
    )
)

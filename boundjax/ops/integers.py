"""Integers that depend on the input, carried as floating-point numbers: the range where they agree.

An integer type wraps around, or leaves undefined, what it cannot hold; a floating-point number that
stands for the integer does neither. No other op makes integers of perturbed values: JAX's casts to
integer types are refused, `boundjax.onnx` carries integers as float32 and marks them here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from boundjax.ir.families import Expansion
from boundjax.ir.table import register

if TYPE_CHECKING:
    from boundjax.ir.node import Node

# Sums, differences and products of integers are exact in float32 up to here.
LARGEST_EXACT = 2**24

_primitive = Primitive("integer_range")


def held_by(x: Array, dtype: np.dtype | type) -> Array:
    """`x` before it is cast to an integer type: unchanged where the type can hold it.

    Casting a number outside of the type's range is undefined, and runtimes differ. The value is
    then the type's least number, as on x86 processors. *Bounds are NaN wherever the interval leaves
    the range*, which proves nothing.

    Args:
      x: floating-point, of any shape.
      dtype: a signed integer type.

    Returns:
      An array like `x`, not rounded.
    """
    info = np.iinfo(dtype)
    # The largest integer may be no floating-point number: 2147483647 is not, 2147483520 is.
    most = np.nextafter(np.asarray(info.max + 1, x.dtype), np.asarray(0, x.dtype))
    return _primitive.bind(x, low=float(info.min), high=float(most), outside=float(info.min))


def exact(x: Array, terms: int = 1) -> Array:
    """`x`, the value of integer arithmetic, which float32 carries exactly up to 2^24.

    Beyond that float32 rounds it, and soon a type of 32 bits wraps around: *bounds are NaN wherever
    the interval leaves [-2^24, 2^24]*. The value itself is `x` everywhere.

    Args:
      x: floating-point, of any shape.
      terms: how many elements of `x` are summed next. The range is smaller by this factor, so that
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
_primitive.def_abstract_eval(lambda x, **_: jax.core.ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_primitive, mlir.lower_fun(_value, multiple_results=False))
batching.defvectorized(_primitive)
ad.defjvp(_primitive, _derivative)


def _or_nan(node: Node) -> Callable[[Array], Array]:
    low, high = node.params["low"], node.params["high"]
    return lambda x: jnp.where(_inside(x, low, high), x, _like(np.nan, x))


register(
    Expansion(
        name="integer_range",
        note="of integers carried as floats: NaN outside of their range",
        expand=_or_nan,
    )
)

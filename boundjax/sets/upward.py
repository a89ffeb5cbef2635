"""Sums, products and norms of floating-point numbers, rounded up.

Every function returns an upper bound on what its name says for its arguments taken as exact
numbers: in any order of summation, with or without fused multiply-add, with subnormal numbers kept
or read as 0, and with divisions computed as products with a reciprocal. What overflows is infinite,
NaN stays NaN. No function of this file is to be differentiated, see `with_derivative_of`.

Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.numerics import length, with_derivative_of
from boundjax.sets.rounding import Arithmetic, is_subnormal, raised, sum_above

# The error of a power in ulp. It is an assumption about the runtime, the only one of this file.
POWER_ERROR = 8.0
# The error of one product, in units: its own rounding, and those of rounding it up.
PRODUCT_ERROR = 4.0
# How often each term of a sum may underflow: as a product, and where it is added.
UNDERFLOWS = 2.0


def with_slack(bound: Callable[..., Array], nearest: Array, *arguments: Array) -> Array:
    """`bound(*arguments)`, differentiated as if it were `nearest`: no gradient flows in slack."""
    return with_derivative_of(bound(*jax.lax.stop_gradient(arguments)), nearest)


def product_above(x: Array, y: Array) -> Array:
    """An upper bound on `x * y` for `x, y >= 0`, elementwise; 0 times infinity is 0."""
    arithmetic = Arithmetic.of(x.dtype)
    x, y = raised(x), raised(y)
    above = x * y * (1.0 + PRODUCT_ERROR * arithmetic.unit) + arithmetic.underflow
    zero = ((x == 0) | (y == 0)) & ~jnp.isnan(x) & ~jnp.isnan(y)
    return jnp.where(zero, 0.0, above)


def total_above(terms: Array) -> Array:
    """An upper bound on the sum of all terms, each `>= 0` and none subnormal, a scalar."""
    arithmetic = Arithmetic.of(terms.dtype)
    total = _total(terms)
    # `gamma` pays for three roundings more than there are additions, which this sum takes.
    slack = jnp.maximum(total * arithmetic.gamma(terms.size), arithmetic.underflow)
    return jnp.where(total == 0, 0.0, total + slack)


def combination_above(coefficients: Array, lower: Array, upper: Array) -> Array:
    """An upper bound on `max <c, y>` over `lower <= y <= upper`, a scalar.

    Its slack is relative to `<|c|, |y|>`, so it is 0 where that is.

    Args:
      coefficients: `c`, any shape.
      lower: of the same shape.
      upper: of the same shape.
    """
    arithmetic = Arithmetic.of(coefficients.dtype)
    # The sign of a subnormal number is in its bits only.
    y = jnp.where(jnp.signbit(coefficients), lower, upper)
    sizes = product_above(jnp.abs(coefficients), jnp.abs(y))
    # The products of subnormal numbers may be 0.
    lost = jnp.where(is_subnormal(coefficients) | is_subnormal(y), sizes, 0.0)
    size = total_above(sizes)
    underflow = UNDERFLOWS * (coefficients.size + 1) * arithmetic.underflow
    slack = size * arithmetic.gamma(coefficients.size + 8) + total_above(lost) + underflow
    total = _total(coefficients * y)
    # Partial sums may overflow to -inf in some order.
    total = jnp.where(total == -jnp.inf, jnp.inf, total)
    return jnp.where(size == 0, 0.0, sum_above(total, slack))


def box_above(coefficients: Array, radius: Array) -> Array:
    """An upper bound on `<|c|, radius>`, the spread of a box, a scalar."""
    return total_above(product_above(jnp.abs(coefficients), radius))


def support_above(coefficients: Array, middle: Array, spread: Array) -> Array:
    """An upper bound on `<c, middle> + spread`, a scalar."""
    return sum_above(combination_above(coefficients, middle, middle), spread)


def spread_around(spread: Array, coefficients: Array, center: Array, middle: Array) -> Array:
    """An upper bound on the spread around `middle` for one around `center`, a scalar."""
    least, most = -sum_above(middle, -center), sum_above(center, -middle)
    return sum_above(spread, combination_above(coefficients, least, most))


def length_above(values: Array) -> Array:
    """An upper bound on `||values||_2` over all axes."""
    values = raised(jnp.abs(values))
    price = usable_price(length(values))
    return sum_above(total_above(square_above(values, price)), ball_above(values, price))


def enclosing_radius(radius: Array, center: Array, lower: Array, upper: Array) -> Array:
    """The radius of an l2 ball around the flushed center that contains a ball's part in a box.

    Args:
      radius: that of an l2 ball around `center`, a scalar, may be infinite.
      center: any shape; subnormal elements are flushed, which moves them.
      lower: the lower end of the box, of the same shape.
      upper: the upper end.
    """
    corner = length_above(jnp.maximum(sum_above(upper, -center), sum_above(center, -lower)))
    flushed = jnp.sum(jnp.where(is_subnormal(center), 1.0, 0.0).astype(center.dtype))
    move = flushed * (2.0 * Arithmetic.of(center.dtype).underflow)
    return sum_above(jnp.minimum(radius, corner), move)


def norm_above(values: Array, exponent: Fraction | None) -> Array:
    """An upper bound on `||values||_q` over all axes, for values `>= 0` of which none is subnormal.

    Args:
      values: any shape.
      exponent: `q >= 1`, None for infinity.
    """
    if exponent is None:
        return jnp.max(values, initial=0.0)
    if exponent == 1:
        return total_above(values)
    if exponent == 2:
        return length_above(values)
    arithmetic, dtype = Arithmetic.of(values.dtype), values.dtype
    # Norms fall as their exponent grows, and powers of numbers >= 1 grow with it.
    inner = _number_below(exponent, dtype)
    outer = -_number_below(-1 / Fraction(inner), dtype)
    error = 1.0 + 2.25 * POWER_ERROR * arithmetic.unit  # an ulp is two units; and one product
    # The reciprocal of the scale is a normal number.
    scale = jnp.minimum(jnp.max(values, initial=0.0), 0.5 / arithmetic.underflow)
    shares = values / jnp.where(scale > 0, scale, 1.0)
    powers = jnp.power(shares, inner) * error + arithmetic.underflow
    total = jnp.maximum(total_above(jnp.where(shares == 0, 0.0, powers)), 1.0)
    # Norms are homogeneous: the errors of all shares are one factor. It covers shares that
    # underflow, too, since the largest share is 1.
    norm = jnp.power(total, outer) * error * (1.0 + 2.0 * PRODUCT_ERROR * arithmetic.unit)
    return product_above(scale, norm)


def usable_price(price: Array) -> Array:
    """The nearest number to a price with a normal reciprocal; 1 for NaN."""
    tiny = Arithmetic.of(price.dtype).underflow
    return jnp.where(jnp.isnan(price), 1.0, jnp.clip(price, 2.0 * tiny, 0.5 / tiny))


def square_above(values: Array, price: Array) -> Array:
    """An upper bound on `values**2 / (2 price)`, elementwise, for a `usable_price`.

    The sum of these and `ball_above` is one on `||values||_2`, whatever the price. It is the norm
    itself if the price is.
    """
    reciprocal = (0.5 / price) * (1.0 + PRODUCT_ERROR * Arithmetic.of(values.dtype).unit)
    return product_above(values, product_above(values, reciprocal))


def ball_above(values: Array, price: Array) -> Array:
    """`price / 2`, the part of a bound that is not a sum, see `square_above`; 0 if all values are.

    As the price falls to 0 so does the bound for values of 0.
    """
    return jnp.where(jnp.all(values == 0), 0.0, 0.5 * price)


def _total(terms: Array) -> Array:
    """The sum of all terms in whatever order XLA takes."""
    return jnp.sum(terms)


def _number_below(value: Fraction, dtype: np.dtype[Any]) -> float:
    """The largest number of a floating dtype that is `<= value`."""
    number = dtype.type(float(value))
    below = number if Fraction(float(number)) <= value else np.nextafter(number, -np.inf)
    return float(below)

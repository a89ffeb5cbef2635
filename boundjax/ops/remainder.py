"""Remainders and quotients by a constant: exact where nothing wraps, the whole range elsewhere.

With `k(x)` the number of whole divisors in `x` (rounded down, or towards 0), `mod(x) = x - c k(x)`
is the identity but for a shift on every interval on which `k` is constant. For `c > 0` and
`l <= x <= u`, `k(l) <= k(x) <= k(u)`, so `x - c k(u) <= mod(x) <= x - c k(l)`: two lines of slope 1
that hold whether it wraps or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from boundjax.ir.families import Expansion, Lines, Position, Refused, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import larger, smaller
from boundjax.sets.rounding import with_flushed

# Roundings of the largest number involved by which ends move outward.
_ULPS = 8.0


def _divisor(node: Node, like: Array) -> tuple[Array, Array]:
    """The divisor in the operand's shape, and where it is usable: neither tiny nor infinite."""
    c = jnp.broadcast_to(jnp.asarray(node.constant(1), like.dtype), like.shape)
    least = float(jnp.finfo(like.dtype).tiny) * 2.0**30
    usable = (jnp.abs(c) > least) & jnp.isfinite(c)
    return jnp.where(usable, c, 1.0), usable


def _slack(*sizes: Array) -> Array:
    total = sum((jnp.abs(size) for size in sizes[1:]), jnp.abs(sizes[0]))
    return _ULPS * float(jnp.finfo(total.dtype).eps) * lax.stop_gradient(total)


def _wrapped(
    lower: Array, upper: Array, c: Array, remainder: Callable[[Array, Array], Array]
) -> tuple[Array, Array, Array]:
    """Where `x - remainder(x)` may change on an interval, and its values at both ends.

    These are multiples of the divisor, so a difference below half of it is rounding, unless the
    ends are so large that rounding is of the size of the divisor.
    """
    base_lower, base_upper = (lax.stop_gradient(end - remainder(end, c)) for end in (lower, upper))
    fits = _slack(lower, upper, c) < 0.25 * jnp.abs(c)
    same = fits & (jnp.abs(base_upper - base_lower) < 0.5 * jnp.abs(c))
    return ~same, base_lower, base_upper


def _floored(lower: Array, upper: Array, c: Array) -> tuple[Array, Array]:
    """The image of `x mod c` for `c > 0`, in `[0, c]`."""
    wraps, base_lower, base_upper = _wrapped(lower, upper, c, jnp.remainder)
    slack = _slack(lower, upper, c)
    low = jnp.where(wraps, 0.0, larger(lower - base_lower - slack, jnp.zeros_like(lower)))
    high = jnp.where(wraps, c, smaller(upper - base_upper + slack, c))
    return low, high


def _truncated(lower: Array, upper: Array, c: Array) -> tuple[Array, Array]:
    """The image of the remainder with the dividend's sign for `c > 0`, in `[-c, c]`.

    Both signs are bounded apart: the function is odd, and for positive numbers it is `x mod c`.
    """
    zero = jnp.zeros_like(lower)
    _, above = _floored(jnp.maximum(lower, 0.0), jnp.maximum(upper, 0.0), c)
    below, _ = _floored(jnp.maximum(lower, 0.0), jnp.maximum(upper, 0.0), c)
    mirrored_low, mirrored_high = _floored(jnp.maximum(-upper, 0.0), jnp.maximum(-lower, 0.0), c)
    positive, negative = upper > 0, lower < 0
    high = jnp.where(positive, above, jnp.where(negative, -mirrored_low, zero))
    low = jnp.where(negative, -mirrored_high, jnp.where(positive, below, zero))
    return low, high


def _mod_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Of `jnp.remainder`, whose result has the divisor's sign."""
    c, usable = _divisor(node, lower)
    lower, upper = with_flushed(lower, upper)
    negative = c < 0
    ends = (jnp.where(negative, -upper, lower), jnp.where(negative, -lower, upper))
    low, high = _floored(*_finite(*ends), jnp.abs(c))
    low, high = jnp.where(negative, -high, low), jnp.where(negative, -low, high)
    return _known(lower, upper, low, high, usable)


def _rem_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Of `lax.rem`, whose result has the dividend's sign and ignores the divisor's."""
    c, usable = _divisor(node, lower)
    low, high = _truncated(*_finite(lower, upper), jnp.abs(c))
    return _known(lower, upper, low, high, usable)


def _finite(lower: Array, upper: Array) -> tuple[Array, Array]:
    """The remainder of an infinite end is NaN; the largest numbers give the whole range as well."""
    most = float(jnp.finfo(lower.dtype).max) / 16.0
    return jnp.clip(lower, -most, most), jnp.clip(upper, -most, most)


def _known(
    lower: Array, upper: Array, low: Array, high: Array, usable: Array
) -> tuple[Array, Array]:
    """No bounds of a remainder by 0, or of an infinite number, which is NaN."""
    unknown = jnp.isnan(lower) | jnp.isnan(upper) | ~usable
    open_ended = jnp.isinf(lower) | jnp.isinf(upper)
    low, high = jnp.where(open_ended, -jnp.inf, low), jnp.where(open_ended, jnp.inf, high)
    return jnp.where(unknown, jnp.nan, low), jnp.where(unknown, jnp.nan, high)


def _sawtooth_lines(
    image: Callable[[Node, Array, Array], tuple[Array, Array]],
    remainder: Callable[[Array, Array], Array],
) -> Callable[[Node, Array, Array, Position], Lines]:
    """The lines of slope 1 through the ends, or the ends of the image, as the middle decides."""

    def lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
        c, _ = _divisor(node, lower)
        low, high = image(node, lower, upper)
        ends = _finite(*with_flushed(lower, upper))
        _, *bases = _wrapped(*ends, c, remainder)
        slack = _slack(*ends, c)
        least, most = jnp.minimum(*bases), jnp.maximum(*bases)
        middle = 0.5 * (lower + upper)
        usable = jnp.isfinite(low) & jnp.isfinite(high)
        # With few of its digits left an end says nothing.
        usable = usable & (slack < 0.25 * jnp.abs(c))
        rises_below = usable & (middle - most - slack > low)
        rises_above = usable & (middle - least + slack < high)
        return Lines(
            rises_below.astype(lower.dtype),
            jnp.where(rises_below, -most - slack, low),
            rises_above.astype(lower.dtype),
            jnp.where(rises_above, -least + slack, high),
        )

    return lines


def _sawtooth_lipschitz(
    remainder: Callable[[Array, Array], Array],
) -> Callable[[Node, Array, Array], Array]:
    def lipschitz(node: Node, lower: Array, upper: Array) -> Array:
        c, usable = _divisor(node, lower)
        wraps, *_ = _wrapped(*_finite(*with_flushed(lower, upper)), c, remainder)
        return jnp.where(wraps | ~usable, jnp.inf, 1.0).astype(lower.dtype)

    return lipschitz


def _by_constant(node: Node) -> bool:
    return node.perturbed == (True, False) and jnp.issubdtype(node.dtype, jnp.floating)


_sawtooth = functools.partial(
    Scalar,
    accepts=_by_constant,
    monotone=False,
    partial=True,
    jumps=True,
)
register(
    _sawtooth(
        name="rem",
        note="by a constant; jnp.fmod",
        image=_rem_image,
        lines=_sawtooth_lines(_rem_image, lax.rem),
        lipschitz=_sawtooth_lipschitz(lax.rem),
    )
)
register(
    _sawtooth(
        name="remainder",
        note="by a constant; jnp.mod, %",
        traced_as=jnp.remainder,
        image=_mod_image,
        lines=_sawtooth_lines(_mod_image, jnp.remainder),
        lipschitz=_sawtooth_lipschitz(jnp.remainder),
    )
)
register(
    Refused(
        name="rem",
        accepts=lambda node: not jnp.issubdtype(node.dtype, jnp.floating),
        reason="it computes with integers of a perturbed value; counts and indices, all integers "
        "that depend on the perturbed input, have no bounds",
    )
)
register(
    Refused(
        name="rem",
        accepts=lambda node: node.perturbed[1],
        reason="only remainders by a constant have bounds; the divisor depends on the input",
    )
)


# --- quotients that are rounded down --------------------------------------------------------------


def _floor_image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
    c, usable = _divisor(node, lower)
    lower, upper = with_flushed(lower, upper)
    first, second = jnp.floor_divide(lower, c), jnp.floor_divide(upper, c)
    low, high = jnp.where(c > 0, first, second), jnp.where(c > 0, second, first)
    # Quotients of this size are rounded like any other number.
    rounded = jnp.maximum(jnp.abs(low), jnp.abs(high)) > 2.0**20
    slack = jnp.where(rounded, _slack(low, high) + 1.0, 0.0)
    return _known(lower, upper, low - slack, high + slack, usable)


def _floor_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
    """`x / c - 1 <= f(x) <= x / c`, or the ends of the image."""
    c, _ = _divisor(node, lower)
    low, high = _floor_image(node, lower, upper)
    middle, slope = (0.5 * (lower + upper)) / c, 1.0 / c
    slack = _slack(lower / c, upper / c, jnp.ones_like(lower))
    usable = jnp.isfinite(low) & jnp.isfinite(high) & jnp.isfinite(slack)
    rises_below = usable & (middle - 1.0 - slack > low)
    rises_above = usable & (middle + slack < high)
    return Lines(
        jnp.where(rises_below, slope, 0.0),
        jnp.where(rises_below, -1.0 - slack, low),
        jnp.where(rises_above, slope, 0.0),
        jnp.where(rises_above, slack, high),
    )


def _floor_lipschitz(node: Node, lower: Array, upper: Array) -> Array:
    low, high = _floor_image(node, lower, upper)
    return jnp.where(low == high, 0.0, jnp.inf).astype(lower.dtype)


register(
    Scalar(
        name="floor_divide",
        note="by a constant; //",
        traced_as=jnp.floor_divide,
        accepts=_by_constant,
        image=_floor_image,
        lines=_floor_lines,
        lipschitz=_floor_lipschitz,
        partial=True,
        jumps=True,
    )
)


def _divmod(node: Node) -> Callable[[Array, Array], tuple[Array, Array]]:
    return lambda x, c: (jnp.floor_divide(x, c), jnp.remainder(x, c))


register(
    Expansion(
        name="divmod",
        note="by a constant: quotient and remainder",
        traced_as=jnp.divmod,
        accepts=_by_constant,
        expand=_divmod,
    )
)

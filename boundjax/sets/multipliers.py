"""Multipliers of linear constraints: how much a row of constraints lowers a maximum.

For any multipliers `lam` the maximum of `<c, x>` over a set that is cut by `rows x <= limits` is at
most `max <c - lam rows, x> + lam limits` over the whole set (weak duality). So a search for good
multipliers may stop anywhere and round as it likes: it decides how tight a bound is, never whether
it holds.
"""

# JAX leaves some of its types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.numerics import float_info

# Random programs take seven to ten steps in float32; ordered chains of a hundred rows ten.
_MOST_STEPS = 16
# Multipliers times the size of their rows, relative to that of the coefficients. Larger ones would
# cost more in rounding than they gain.
_LARGEST = 1e3
# Passes over the rows where the multipliers are found one by one.
_PASSES = 3


class Optimum(NamedTuple):
    """What a search proposes.

    Attributes:
      multipliers: `[k]`; a positive one belongs to the upper limit of its row, a negative one to
        the lower limit.
      shares: `[n]`, the maximiser in half-widths from the middle, in `[-1, 1]`.
    """

    multipliers: Array
    shares: Array


class _State(NamedTuple):
    """An interior point of the program and its dual; `up` and `down` are the room to the ends."""

    point: Array
    up: Array
    down: Array
    multipliers: Array
    price_up: Array
    price_down: Array
    gap: Array
    steps: Array


def over_box(coefficients: Array, radius: Array, rows: Array, least: Array, most: Array) -> Optimum:
    """Multipliers for `max <c, d>` over `|d| <= radius` and `least <= rows d <= most`.

    Mehrotra's predictor-corrector method (1992, "On the Implementation of a Primal-Dual Interior
    Point Method") on the program that is scaled to the box, with the values of the rows as further
    variables between their limits: then only equations with free multipliers are left, the first
    point is dual feasible, and every step solves one system of `k` equations.

    Args:
      coefficients: `c`, `[n]`.
      radius: `[n]`, finite.
      rows: `[k, n]`, one or more.
      least, most: `[k]`, finite.
    """
    size = jnp.sum(jnp.abs(coefficients) * radius)
    sizes = jnp.sum(jnp.abs(rows) * radius[None], axis=1)
    safe, safes = jnp.where(size > 0, size, 1.0), jnp.where(sizes > 0, sizes, 1.0)
    scaled = rows * radius[None] / safes[:, None]
    ends = least / safes, most / safes
    optimum: Optimum = _jitted_interior(coefficients * radius / safe, scaled, *ends)
    multipliers = optimum.multipliers * (safe / safes)
    finite = jnp.isfinite(multipliers) & (sizes > 0)
    shares = jnp.where(jnp.isfinite(optimum.shares), optimum.shares, 0.0)
    return Optimum(jnp.where(finite, multipliers, 0.0), jnp.clip(shares, -1.0, 1.0))


def _interior(goal: Array, rows: Array, least: Array, most: Array) -> Optimum:
    """`over_box` with half-widths 1, `sum |goal| = 1` and `sum |rows| = 1`."""
    count, info = len(rows), float_info(goal.dtype)
    middle, radius = 0.5 * (least + most), 0.5 * (most - least)
    matrix = jnp.concatenate([rows, -jnp.diag(radius)], axis=1)
    goal = jnp.concatenate([goal, jnp.zeros(count, goal.dtype)])
    size, ridge = len(goal), 8.0 * info.eps
    pairs = (matrix[:, None, :] * matrix[None, :, :]).reshape(count * count, size)

    def step(state: _State) -> _State:
        point, up, down, multipliers, price_up, price_down, _, steps = state
        lacks = middle - matrix @ point
        rest = goal - multipliers @ matrix - price_up + price_down
        weight = 1.0 / (price_up / up + price_down / down)
        system = (pairs @ weight).reshape(count, count)
        diagonal = ridge * jnp.diagonal(system) + info.tiny
        factor = jax.scipy.linalg.cho_factor(system + jnp.diag(diagonal))

        def move(at_up: Array, at_down: Array) -> tuple[Array, ...]:
            pull = weight * (rest - at_up / up + at_down / down)
            change = jax.scipy.linalg.cho_solve(factor, matrix @ pull - lacks)
            moved = pull - weight * (change @ matrix)
            prices = (at_up + price_up * moved) / up, (at_down - price_down * moved) / down
            return moved, change, *prices

        def lengths(moved: Array, _: Array, *prices: Array) -> tuple[Array, Array]:
            primal = jnp.minimum(_longest(up, -moved), _longest(down, moved))
            dual = jnp.minimum(_longest(price_up, prices[0]), _longest(price_down, prices[1]))
            return primal, dual

        def gap(primal: Array, dual: Array, moved: Array, *prices: Array) -> Array:
            above = (up - primal * moved) * (price_up + dual * prices[0])
            return jnp.sum(above + (down + primal * moved) * (price_down + dual * prices[1]))

        now = jnp.sum(up * price_up + down * price_down)
        first = move(-up * price_up, -down * price_down)
        predicted = gap(*lengths(*first), first[0], *first[2:])
        aim = (predicted / now) ** 3 * now / (2.0 * size)
        moved, change, *prices = move(
            aim - up * price_up + first[0] * first[2], aim - down * price_down - first[0] * first[3]
        )
        primal, dual = lengths(moved, change, *prices)
        return _State(
            point + primal * moved,
            up - primal * moved,
            down + primal * moved,
            jnp.clip(multipliers + dual * change, -_LARGEST, _LARGEST),
            price_up + dual * prices[0],
            price_down + dual * prices[1],
            gap(primal, dual, moved, *prices),
            steps + 1,
        )

    def unfinished(state: _State) -> Array:
        return (state.gap > 4.0 * info.eps) & (state.steps < _MOST_STEPS)

    def advance(state: _State) -> _State:
        moved = step(state)
        # A step that fails numerically ends the search where it is.
        usable = jnp.isfinite(moved.gap) & jnp.all(jnp.isfinite(moved.multipliers))
        usable = usable & jnp.all(jnp.isfinite(moved.point))
        kept = _State(*(jnp.where(usable, new, old) for new, old in zip(moved, state, strict=True)))
        return kept._replace(gap=jnp.where(usable, moved.gap, 0.0))

    one, zero = jnp.ones_like(goal), jnp.zeros((), goal.dtype)
    start = jnp.max(jnp.abs(goal)) + 0.5 / size
    prices = start + jnp.maximum(goal, 0.0), start + jnp.maximum(-goal, 0.0)
    begin = (jnp.zeros_like(goal), one, one, jnp.zeros(count, goal.dtype), *prices)
    last = lax.while_loop(unfinished, advance, _State(*begin, zero + 1.0, jnp.int32(0)))
    return Optimum(last.multipliers, last.point[:-count])


def _at_full_precision(*arguments: Array) -> Optimum:
    with jax.default_matmul_precision("highest"):
        return _interior(*arguments)


# Compiled even where the walk around it runs op by op, so that the loop stays fast.
_jitted_interior: Any = jax.jit(_at_full_precision)


def _longest(room: Array, change: Array) -> Array:
    """The largest step of at most 1 that leaves a hundredth of all room."""
    shrinks = change < 0
    steps = jnp.where(shrinks, -room / jnp.where(shrinks, change, -1.0), jnp.inf)
    return jnp.minimum(1.0, 0.99 * jnp.min(steps, initial=jnp.inf))


def over_set(
    spread: Callable[[Array], Array], coefficients: Array, rows: Array, least: Array, most: Array
) -> Array:
    """Multipliers `[k]` for `max <c, d>` over any convex set and `least <= rows d <= most`.

    They are found one after the other, each exactly: the bound is convex in it, and bisection over
    the bits of a floating-point number finds where its derivative changes sign. With several rows
    the result need not be the best.

    Args:
      spread: `max <c, d>` over the set, differentiable.
      coefficients: `c`, any shape.
      rows: `[k, *shape]`, one or more.
      least, most: `[k]`, finite.
    """
    dtype = coefficients.dtype
    integer = jnp.dtype(f"int{float_info(dtype).bits}")
    bits = float_info(dtype).bits - 1
    count = len(rows)
    # The derivative of a maximum is the point that attains it.
    reached = jax.grad(spread)

    def improve(turn: Array, multipliers: Array) -> Array:
        index = turn % count
        row = rows[index]
        without = multipliers.at[index].set(0.0)
        rest = coefficients - jnp.tensordot(without, rows, axes=1, precision=lax.Precision.HIGHEST)
        at_zero = jnp.sum(row * reached(rest))
        rises, falls = most[index] - at_zero < 0, least[index] - at_zero > 0
        sign = jnp.where(falls, -1.0, 1.0).astype(dtype)
        limit = jnp.where(falls, least[index], most[index])

        def bit(position: Array, prefix: Array) -> Array:
            candidate = prefix | lax.shift_left(jnp.ones((), integer), bits - 1 - position)
            value = sign * lax.bitcast_convert_type(candidate, dtype)
            slope = sign * (limit - jnp.sum(row * reached(rest - value * row)))
            return jnp.where(slope < 0, candidate, prefix)  # NaN from an overflow: too large

        bits_of_best = lax.fori_loop(0, bits, bit, jnp.zeros((), integer))
        value = sign * lax.bitcast_convert_type(bits_of_best, dtype)
        return multipliers.at[index].set(jnp.where(rises | falls, value, 0.0))

    turns = count * (1 if count == 1 else _PASSES)
    found = lax.fori_loop(0, turns, improve, jnp.zeros(count, dtype))
    return jnp.where(jnp.isfinite(found), found, 0.0)


def is_empty(
    rows: np.ndarray, least: np.ndarray, most: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> bool:
    """Whether constraints on a box contradict one another, by a linear program (HiGHS).

    Args:
      rows: float64 `[k, n]`.
      least, most: `[k]`, may be infinite.
      lower, upper: `[n]`, finite.
    """
    middle, radius = 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower
    values, reach = rows @ middle, np.abs(rows) @ radius
    if ((least <= values) & (values <= most)).all():
        return False
    # It takes a while to import, and most sets need none of it.
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    # In shares of the box, with what the sums above may have lost.
    lost = 1e-12 * (np.abs(rows) @ np.abs(middle) + reach)
    above, below = most - values + lost, values - least + lost
    moves = reach > 0
    if (np.minimum(above, below)[~moves] < 0).any():
        return True
    matrix = (rows * radius)[moves] / reach[moves, None]
    limits = np.concatenate([above[moves] / reach[moves], below[moves] / reach[moves]])
    finite = np.isfinite(limits)
    answer: Any = optimize.linprog(
        np.zeros(rows.shape[1]),
        np.concatenate([matrix, -matrix])[finite],
        limits[finite],
        bounds=(-1.0, 1.0),
        method="highs",
    )
    return answer.status == 2

"""Moving the free lines of a relaxation towards tighter bounds, by projected gradient steps.

One step of the signed gradient is the method of Lee et al. 2021 ("Loss Landscape Matters"); an
optax optimizer with positions per row is alpha-CROWN (Xu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import Array, ArrayTree

from boundjax.slopes import Optimized

Positions = dict[str, Array]

# Steps that are written out one after the other; more of them become a loop, which compiles once
# but in which XLA's CPU backend runs convolutions several times slower.
_UNROLLED = 4


class Found(NamedTuple):
    """The best of all iterates.

    Attributes:
      values: ``[R]``, the largest lower bound of every row.
      positions: which positions to bound with again: of every row, if they are per row; else of
        the iterate with the least objective.
    """

    values: Array
    positions: Positions


class _State(NamedTuple):
    positions: Positions
    memory: ArrayTree
    best: Found
    least: Array


def best_positions(
    bound: Callable[[Positions], Array],
    start: Positions,
    per_row: bool,
    options: Optimized,
) -> Found:
    """Maximises lower bounds over positions in ``[0, 1]``.

    Args:
      bound: positions -> lower bounds ``[R]``; differentiable, and of nothing else than its
        argument: no gradient may flow out of it.
      start: positions by label, ``[*shape]``, or ``[R, *shape]`` where ``per_row``.
      per_row: whether every row has positions of its own.
      options: steps, rule and objective.
    """
    transformation = options.transformation()

    def loss(positions: Positions) -> tuple[Array, Array]:
        values = bound(positions)
        objective = None if per_row else options.objective
        return -jnp.sum(values) if objective is None else objective(values), values

    def keep(state: _State, positions: Positions, value: Array, bounds: Array) -> _State:
        better = ~(bounds <= state.best.values)  # NaN at the start is replaced
        values = jnp.fmax(state.best.values, bounds)
        chosen = better if per_row else value < state.least

        def pick(new: Array, old: Array) -> Array:
            mask = chosen.reshape(chosen.shape + (1,) * (new.ndim - chosen.ndim))
            return jnp.where(mask, new, old)

        best = Found(values, jax.tree.map(pick, positions, state.best.positions))
        return state._replace(best=best, least=jnp.fmin(state.least, value))

    def step(state: _State, _: None) -> tuple[_State, None]:
        (value, bounds), gradient = jax.value_and_grad(loss, has_aux=True)(state.positions)
        state = keep(state, state.positions, value, bounds)
        # A bound that is not finite has no direction; its positions stay.
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        # optax and the user's schedules count steps in integers, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = transformation.update(gradient, state.memory, state.positions)
            moved = optax.apply_updates(state.positions, updates)
        moved = jax.tree.map(lambda p: jnp.clip(p, 0.0, 1.0), moved)
        return state._replace(positions=moved, memory=memory), None

    shapes = jax.eval_shape(bound, start)
    worst = jnp.full(shapes.shape, -jnp.inf, shapes.dtype)
    state = _State(
        start,
        transformation.init(start),
        Found(worst, start),
        jnp.asarray(jnp.inf, shapes.dtype),
    )
    if options.steps <= _UNROLLED:
        for _ in range(options.steps):
            state, _ = step(state, None)
    else:
        state, _ = jax.lax.scan(step, state, None, length=options.steps)
    value, bounds = loss(state.positions)
    return keep(state, state.positions, value, bounds).best

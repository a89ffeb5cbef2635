"""Projected gradient steps that move the parameters of a bound towards tighter bounds.

One step of the signed gradient is the method of Lee et al. 2021 ("Loss Landscape Matters"); an
optax optimizer with positions per row is alpha-CROWN (Xu et al. 2021).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from boundjax.slopes import Optimized
from boundjax.typing import PyTree

# Up to so many steps are unrolled; more become a loop, which compiles once but in which XLA's CPU
# backend runs convolutions several times slower.
_UNROLLED = 4


class BestPositions(NamedTuple):
    """The best of all iterates.

    Attributes:
      values: `[R]`, the largest lower bound of every row.
      parameters: the parameters to bound with afterwards: the best ones of every row if rows have
        separate parameters, otherwise those of the iterate with the smallest objective.
    """

    values: Array
    parameters: PyTree


class State(NamedTuple):
    """The state between two steps.

    Attributes:
      parameters: the current iterate.
      memory: the state of the optimizer.
      best: the best of the iterates before it.
      least: the smallest objective of these.
    """

    parameters: PyTree
    memory: PyTree
    best: BestPositions
    least: Array


def unit_interval(value: Array) -> Array:
    """The projection for positions."""
    return jnp.clip(value, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Ascent:
    """Maximises lower bounds over a pytree of parameters.

    Attributes:
      bound: parameters -> lower bounds `[R]`; differentiable in its argument, and closing over
        nothing that is being differentiated.
      per_row: whether rows have separate parameters, `[R, ...]` in every leaf.
      options: steps, rule and objective.
      projection: the map of a leaf after every step: one function for all leaves, or a pytree with
        one function per leaf.
    """

    bound: Callable[[PyTree], Array]
    per_row: bool
    options: Optimized
    projection: Callable[[Array], Array] | PyTree = unit_interval

    def init(self, start: PyTree) -> State:
        """The state before the first step; the start itself counts as an iterate."""
        shapes = jax.eval_shape(self.bound, start)
        worst = jnp.full(shapes.shape, -jnp.inf, shapes.dtype)
        memory = self.options.transformation().init(start)
        return State(start, memory, BestPositions(worst, start), jnp.asarray(jnp.inf, shapes.dtype))

    def step(self, state: State) -> State:
        """One projected step of the optimizer."""
        (value, bounds), gradient = jax.value_and_grad(self._loss, has_aux=True)(state.parameters)
        state = self._keep(state, value, bounds)
        # A bound that is not finite gives no direction, so its parameters stay.
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        # Strict promotion would refuse the integer step counts of optax and of users' schedules.
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = self.options.transformation().update(
                gradient, state.memory, state.parameters
            )
            moved = optax.apply_updates(state.parameters, updates)
        return state._replace(parameters=self._projected(moved), memory=memory)

    def finish(self, state: State) -> BestPositions:
        """The best of all iterates, the last one among them."""
        value, bounds = self._loss(state.parameters)
        return self._keep(state, value, bounds).best

    def run(self, start: PyTree) -> BestPositions:
        """Takes all steps of the options from a start."""
        state = self.init(start)
        if self.options.steps <= _UNROLLED:
            for _ in range(self.options.steps):
                state = self.step(state)
        else:
            state, _ = jax.lax.scan(
                lambda state, _: (self.step(state), None), state, None, length=self.options.steps
            )
        return self.finish(state)

    def _loss(self, parameters: PyTree) -> tuple[Array, Array]:
        values = self.bound(parameters)
        objective = None if self.per_row else self.options.objective
        return -jnp.sum(values) if objective is None else objective(values), values

    def _keep(self, state: State, value: Array, bounds: Array) -> State:
        better = bounds > state.best.values  # a NaN is never better
        values = jnp.fmax(state.best.values, bounds)
        replace = better if self.per_row else value < state.least

        def pick(new: Array, old: Array) -> Array:
            mask = replace.reshape(replace.shape + (1,) * (new.ndim - replace.ndim))
            return jnp.where(mask, new, old)

        best = BestPositions(values, jax.tree.map(pick, state.parameters, state.best.parameters))
        return state._replace(best=best, least=jnp.fmin(state.least, value))

    def _projected(self, parameters: PyTree) -> PyTree:
        if callable(self.projection):
            return jax.tree.map(self.projection, parameters)
        return jax.tree.map(lambda project, leaf: project(leaf), self.projection, parameters)

"""How a loss and its gradient change along an update of the parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

# Ten steps from half an update to five updates, evenly spaced on a log scale.
MULTIPLES: tuple[float, ...] = tuple(np.geomspace(0.5, 5.0, 10).tolist())


class Landscape(NamedTuple):
    """Measures along the line `theta(k) = theta - k * rate * direction` of the parameters.

    All norms are l2 norms over all parameters together. `K` is the number of points; the first
    is `k = 0`, where nothing is changed. A measure is NaN where a loss or a gradient is.

    Attributes:
      multiples: `[K]`, the step lengths `k` in units of one update, ascending, with 0 and 1.
      losses: `[K]`, the loss at each point; its least and largest values bound the band that
        Figure 1 of the paper draws around the learning curve.
      gradient_differences: `[K]`, `||grad(theta(k)) - grad(theta)||`.
      gradient_norm: `||grad(theta)||`.
      variation: largest minus least loss.
      gradient_difference: `||grad(theta(1)) - grad(theta)||`, after one update.
      gradient_rmse: the same divided by the root of the number of parameters. (This is what the
        released code of the paper prints as the gradient difference.)
      cosine_distance: `1 - cos` of the angle between `grad(theta)` and `grad(theta(1))`, in
        `[0, 2]`; NaN if one of them is 0.
      gradient: `grad(theta)`, a pytree like the parameters: a direction for other losses.
      smoothness: effective beta-smoothness, the largest `||grad(theta(k)) - grad(theta)|| /
        ||theta(k) - theta||` over `k > 0`; NaN if the direction is 0.
    """

    multiples: Float[Array, " K"]
    losses: Float[Array, " K"]
    gradient_differences: Float[Array, " K"]
    gradient_norm: Float[Array, ""]
    variation: Float[Array, ""]
    gradient_difference: Float[Array, ""]
    gradient_rmse: Float[Array, ""]
    cosine_distance: Float[Array, ""]
    gradient: PyTree
    smoothness: Float[Array, ""]


class Measure(Protocol):
    """What `landscape` returns."""

    def __call__(
        self, params: PyTree, rate: ArrayLike, *arguments: Any, direction: PyTree | None = None
    ) -> Landscape:
        """Measures the loss at `params`, see `landscape`."""
        ...


def landscape(
    loss: Callable[..., Float[Array, ""]], multiples: Sequence[float] = MULTIPLES
) -> Measure:
    """Turns a loss into a function that measures its landscape along an update.

    The loss is evaluated at every point with the same arguments: whatever it draws from a PRNG key
    (slopes, projections) is the same along the line. The radius is an argument like any other. To
    measure the loss at the target radius along the update at the scheduled one, pass
    the `gradient` of the scheduled loss as `direction`.

    Call the result outside `jit`: it compiles the loss once and evaluates `K` gradients, one after
    another. Inside `jit` the compiled program holds a copy of the loss for every point.

    Args:
      loss: `(params, *arguments) -> scalar`, differentiable in `params`.
      multiples: step lengths `k > 0` in units of one update; 0 and 1 are added. By default ten from
        0.5 to 5.

    Returns:
      `measure(params, rate, *arguments, direction=None)`: a `Landscape`. `rate` is the learning
      rate, a positive scalar; `direction` is a pytree like `params`, by default the gradient of
      `loss` at `params`. It is not normalised.

    Raises:
      ValueError: for no multiples or one that is not positive and finite; from `measure` for such a
        rate, or a direction that does not match the parameters.

    Source: Lee et al. 2021, "Loss Landscape Matters", section 4.1; Santurkar et al. 2018, "How Does
    Batch Normalization Help Optimization?".
    """
    lengths = _lengths(multiples)

    @jax.jit
    def at(
        params: PyTree, direction: PyTree, gradient: PyTree, step: Array, *arguments: Any
    ) -> tuple[Array, PyTree, Array]:
        moved = jax.tree.map(lambda p, d: p - step.astype(p.dtype) * d, params, direction)
        value, here = jax.value_and_grad(loss)(moved, *arguments)
        return value, here, _norm(_difference(here, gradient))

    def measure(
        params: PyTree, rate: ArrayLike, *arguments: Any, direction: PyTree | None = None
    ) -> Landscape:
        if not isinstance(rate, Tracer) and not (
            np.ndim(rate) == 0 and 0 < float(np.asarray(rate)) < math.inf
        ):
            raise ValueError(f"rate must be a positive, finite scalar, got {rate}")
        nothing = jax.tree.map(jnp.zeros_like, params)
        rate = jnp.asarray(rate)
        value, gradient, norm = at(params, nothing, nothing, 0.0 * rate, *arguments)
        # One point at a time: each has a gradient, and on CPU the collectives of programs that wait
        # in line can keep one another from the threads that they need.
        jax.block_until_ready(norm)
        if direction is None:
            direction = gradient
        _require_alike(direction, params)
        losses, differences, after = [value], [jnp.zeros_like(norm)], gradient
        for length in lengths:
            value, here, difference = at(params, direction, gradient, length * rate, *arguments)
            jax.block_until_ready(difference)
            losses.append(value)
            differences.append(difference)
            if length == 1.0:
                after = here
        return _summary(tuple(lengths), rate, losses, differences, (gradient, after, direction))

    return measure


def _lengths(multiples: Sequence[float]) -> list[float]:
    """The multiples beyond 0, ascending, with 1."""
    lengths = [float(k) for k in multiples]
    if not lengths:
        raise ValueError("multiples must hold at least one step length, got none")
    for k in lengths:
        if not 0 < k < math.inf:
            raise ValueError(f"multiples must be positive and finite (0 is added), got {k}")
    return sorted({*lengths, 1.0})


@functools.partial(jax.jit, static_argnums=0)
def _summary(
    lengths: tuple[float, ...],
    rate: Array,
    losses: Sequence[Array],
    differences: Sequence[Array],
    vectors: tuple[PyTree, PyTree, PyTree],
) -> Landscape:
    gradient, after, direction = vectors
    values, changes = jnp.stack(losses), jnp.stack(differences)
    multiples = jnp.asarray([0.0, *lengths], changes.dtype)
    distances = multiples[1:] * rate.astype(changes.dtype) * _norm(direction)
    difference = changes[1 + lengths.index(1.0)]
    count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    return Landscape(
        multiples=multiples,
        losses=values,
        gradient_differences=changes,
        gradient_norm=_norm(gradient),
        variation=jnp.max(values) - jnp.min(values),
        gradient_difference=difference,
        gradient_rmse=difference / math.sqrt(count),
        cosine_distance=_cosine_distance(gradient, after),
        gradient=gradient,
        smoothness=jnp.max(changes[1:] / distances),
    )


def _norm(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(tree)
    # XLA's CPU backend computes products far faster than sums.
    squares = [jnp.vdot(leaf, leaf) for leaf in leaves]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _difference(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, first, second)


def _cosine_distance(first: PyTree, second: PyTree) -> Array:
    """`1 - cos`, from the distance of the unit vectors: 1 minus a number near 1 would cancel."""
    return 0.5 * jnp.square(_norm(_difference(_unit(first), _unit(second))))


def _unit(tree: PyTree) -> PyTree:
    norm = _norm(tree)
    return jax.tree.map(lambda leaf: leaf / norm, tree)


def _require_alike(direction: PyTree, params: PyTree) -> None:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (direction, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"direction must have the structure and shapes of params, got {shapes[0]} for params "
            f"of {shapes[1]}"
        )

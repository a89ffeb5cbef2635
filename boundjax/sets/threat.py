"""Threat models: what an adversary may do to an input."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from boundjax.sets.ball import LpBall
from boundjax.sets.checks import as_float, require_clip, require_norm, require_radius


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["eps", "clip"],
    meta_fields=["norm", "outward"],
)
@dataclasses.dataclass(frozen=True)
class Threat:
    """Any perturbation within a radius that leaves the input valid: a function `x -> LpBall`.

    Attributes:
      eps: radius in the units of the input (for pixels in [0, 1]: 8 / 255, say), `>= 0`; a scalar,
        or an array that broadcasts to the input (one radius per feature; 0 keeps it fixed).
      norm: order of the norm, 1, 2 or `inf` (any order `>= 1` can be bounded).
      clip: `(low, high)`, the range of valid inputs, or None.
      outward: whether the ends of the sets are rounded outwards, see `LpBall`.

    Raises:
      ValueError: for a norm below 1, a radius that is negative or NaN, an empty clip range.
    """

    eps: ArrayLike
    norm: float = jnp.inf
    clip: tuple[ArrayLike, ArrayLike] | None = None
    outward: bool = False

    def __post_init__(self) -> None:
        require_norm("norm", self.norm)
        require_radius(self.eps)
        require_clip(self.clip)

    def __call__(self, x: Num[Array, "*shape"]) -> LpBall:
        """The set of all perturbed inputs of one example `x`."""
        return LpBall(x, self.eps, self.norm, self.clip, self.outward)

    def within(self, eps: ArrayLike) -> Threat:
        """The same threat with another radius."""
        return dataclasses.replace(self, eps=eps)

    def project(
        self, point: Num[Array, "*shape"], x: Num[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """Moves a point into the set around `x`, for attacks by projected gradients.

        Args:
          point: any point, of the shape of `x`.
          x: one example, inside the clip range.

        Returns:
          The point of the ball nearest to `point`, cut to the clip range. Cutting moves every
          feature towards `x`, so the result stays in the ball.

        Raises:
          ValueError: for a norm other than 1, 2 and inf, or a radius per feature with 1 or 2.
        """
        x = as_float(x)
        point = as_float(point, x)
        if self.norm == jnp.inf:
            # The same ends as the bounds start from: rounding cannot lead out of them.
            return jnp.clip(point, *self(x).interval())
        if self.norm not in (1, 2) or jnp.ndim(self.eps) != 0:
            raise ValueError(
                "project needs norm inf, or 1 or 2 with one radius for all features, got "
                f"norm={self.norm} and eps of shape {jnp.shape(self.eps)}"
            )
        eps, offset = as_float(self.eps, x), point - x
        if self.norm == 1:
            safe = jnp.where(eps > 0, eps, 1.0)  # optax divides by the radius
            with jax.numpy_dtype_promotion("standard"):  # and mixes integers and floats
                moved = optax.projections.projection_l1_ball(offset, safe)
            nearest = jnp.where(eps > 0, x + moved, x)
        else:
            length = jnp.sqrt(jnp.sum(offset * offset))
            scale = jnp.where(length > eps, eps / jnp.where(length > 0, length, 1.0), 1.0)
            nearest = x + scale * offset
        return nearest if self.clip is None else jnp.clip(nearest, *self.clip)

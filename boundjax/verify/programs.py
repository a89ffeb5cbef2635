"""The compiled parts of a search: attacks and bounds, with boxes and rows as arguments.

Nothing of a property is baked into them, so a network is compiled once for all properties whose
arrays have the same shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.certification.presets import LINEAR_OPTIONS
from boundjax.precision import training_precision
from boundjax.sets.box import Box
from boundjax.verify.rounded_walk import lower_bounds

# The presets that are tried one after another, cheap ones first, up to the one that is asked for.
_OPTIONS = {
    "interval": {"slopes": "constant"},
    **{name: LINEAR_OPTIONS[name] for name in ("crown-ibp", "crown", "alpha-crown")},
}
LADDER = tuple(_OPTIONS)

# Sub-boxes are bounded by the thousand, which optimised slopes are too slow for.
_SPLITTING = {**_OPTIONS, "alpha-crown": _OPTIONS["crown"]}

_STEPS = 25


class Programs:
    """Jitted functions of one network.

    Attributes:
      flat: the network as a function from ``[n]`` to ``[m]``.
      particles: points that one call of ``attack`` moves.
      boxes: sub-boxes that one call of ``split`` bounds at most.
      first_call: seconds that the first bounds of a method took, compilation included.
      failures: attacks that failed, with the reasons; they would fail again.
    """

    def __init__(
        self,
        single: Callable[[Array], Array],
        input_shape: Sequence[int],
        *,
        max_bytes: int = 2**30,
    ):
        """For a network that takes one example.

        Args:
          single: from ``[*input_shape]`` to an array of any shape, float32.
          input_shape: without the batch.
          max_bytes: budget for the intermediate linear bounds of one call.

        Raises:
          ValueError: for a network with several outputs or outputs that are not floating.
        """
        shape = tuple(input_shape)
        self.flat = lambda x: jnp.reshape(single(jnp.reshape(x, shape)), (-1,))
        self.input_size = math.prod(shape)
        self.first_call: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._max_bytes = max_bytes
        self._compiled: dict[tuple[str, str], Callable[..., tuple[Array, ...]]] = {}
        example = jax.ShapeDtypeStruct((self.input_size,), jnp.float32)
        traced = jax.make_jaxpr(self.flat)(example)
        self.output_size = traced.out_avals[0].shape[0]
        if not jnp.issubdtype(traced.out_avals[0].dtype, jnp.floating):
            raise ValueError(f"expected floating outputs, got {traced.out_avals[0].dtype}")
        sizes = [math.prod(v.aval.shape) for e in traced.eqns for v in e.outvars]
        largest = max([self.input_size, *sizes])
        self.particles = _power_below(2**18 // largest, 4, 64)
        self.boxes = _power_below(max_bytes // (16 * largest**2), 8, 1024)
        self.forward = jax.jit(self.flat)

    @functools.cached_property
    def attack(self) -> Callable[..., tuple[Array, Array]]:
        """``(lower, upper, start [P, n], weights [P, k, m], offset [P, k], scale)`` -> best points.

        Projected descent along the sign of the gradient of ``max_k (weights_k y + offset_k)``; the
        step is ``scale`` of the box's width and falls to a twentieth of that. Returns the best
        points ``[P, n]`` met, the start among them, and their values ``[P]``.
        """
        descent = jax.vmap(jax.value_and_grad(self._objective))

        def attack(lower, upper, start, weights, offset, scale):
            def step(carry, index):
                x, best_x, best = carry
                value, gradient = descent(x, weights, offset)
                better = value < best
                best_x = jnp.where(better[:, None], x, best_x)
                best = jnp.where(better, value, best)
                length = scale * 0.05 ** (index.astype(x.dtype) / _STEPS)
                x = jnp.clip(x - length * (upper - lower) * jnp.sign(gradient), lower, upper)
                return (x, best_x, best), None

            first = (start, start, jnp.full(start.shape[:1], jnp.inf, start.dtype))
            (_, best_x, best), _ = jax.lax.scan(step, first, jnp.arange(_STEPS + 1))
            return best_x, best

        return jax.jit(attack)

    @functools.cached_property
    def look(self) -> Callable[..., tuple[Array, Array]]:
        """``attack`` without moving the points, for networks that have no gradient."""
        values = jax.vmap(self._objective)
        return jax.jit(
            lambda lower, upper, start, weights, offset, scale: (
                start,
                values(start, weights, offset),
            )
        )

    def _objective(self, x: Array, weights: Array, offset: Array) -> Array:
        """How far a point ``[n]`` is from unsafe, of ``k`` rows at once: a scalar."""
        return jnp.max(weights @ self.flat(x) + offset)

    def bounds(self, method: str) -> Callable[[Array, Array, Array], tuple[Array, ...]]:
        """``(lower [n], upper [n], rows [R, m])`` -> lower bounds ``[R]`` of ``rows @ y``.

        They hold in whatever arithmetic, see ``rounded_walk``. With them the outputs ``[m]`` at
        the centre, and the largest magnitude ``[m]`` of each output on the box.
        """
        if ("bounds", method) in self._compiled:
            return self._compiled["bounds", method]
        bounded = lower_bounds(self.flat, max_bytes=self._max_bytes, **_OPTIONS[method])

        @training_precision("highest")  # a proof, whoever asks
        def bounds(lower: Array, upper: Array, rows: Array) -> tuple[Array, ...]:
            bound = bounded(Box(lower, upper), rows)
            return bound.lower, self.flat(_middle(lower, upper)), bound.largest

        return self._compiled.setdefault(("bounds", method), jax.jit(bounds))

    def split(self, method: str) -> Callable[..., tuple[Array, ...]]:
        """Bounds of many sub-boxes, and what says where to cut and to look.

        ``(lower [N, n], upper [N, n], rows [N, R, m], offset [N, R], member [N, R], open [N, R])``
        -> lower bounds ``[N, R]`` of ``rows @ y``, which hold in whatever arithmetic (see
        ``rounded_walk``); the largest magnitude ``[N, m]`` of each output on the sub-box; the
        influence ``[N, n]`` of every input on the best row of each open conjunction; points
        ``[N, 2, n]``, the centre and the corner where the relaxation is least; and their outputs
        ``[N, 2, m]``. ``member`` says which conjunction a row belongs to, ``open`` whether that is
        still unrefuted.
        """
        if ("split", method) in self._compiled:
            return self._compiled["split", method]
        max_bytes = max(2**20, self._max_bytes // self.boxes)
        bounded = lower_bounds(self.flat, max_bytes=max_bytes, **_SPLITTING[method])

        @training_precision("highest")
        def one(lower, upper, rows, offset, member, still_open):
            bound = bounded(Box(lower, upper), rows)
            value = bound.lower + offset
            together = member[:, None] == member[None, :]
            others = jnp.where(together, jnp.broadcast_to(value, together.shape), -jnp.inf)
            weight = (still_open & (value >= jnp.max(others, axis=1))).astype(value.dtype)
            coefficients = bound.coefficients.reshape(rows.shape[0], -1)
            influence = (weight @ jnp.abs(coefficients)) * (upper - lower)
            corner = jnp.where(weight @ coefficients > 0.0, lower, upper)
            points = jnp.stack([_middle(lower, upper), corner])
            outputs = jax.vmap(self.flat)(points)
            return bound.lower, bound.largest, influence, points, outputs

        return self._compiled.setdefault(("split", method), jax.jit(jax.vmap(one)))


def _middle(lower: Array, upper: Array) -> Array:
    return jnp.clip(0.5 * lower + 0.5 * upper, lower, upper)


def _power_below(value: int, least: int, most: int) -> int:
    """The largest power of two ``<= value``, between two others."""
    return min(most, max(least, 1 << max(0, value.bit_length() - 1)))


def power_above(value: int) -> int:
    """The least power of two ``>= value``."""
    return 1 << max(0, value - 1).bit_length()

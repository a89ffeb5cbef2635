"""The compiled parts of a search: attacks and bounds.

Boxes and rows of a property are arguments, not constants, so a network is compiled once for all
properties whose arrays have the same shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.precision import training_precision
from boundjax.search.domains import DomainPrograms
from boundjax.search.method import Method
from boundjax.sets.box import Box
from boundjax.sets.rounding import Rounding
from boundjax.transforms.linear import LinearOptions, RelaxOptions, relax
from boundjax.transforms.presets import LINEAR_OPTIONS
from boundjax.transforms.problem import require_plain_sums

_OPTIONS: Mapping[Method, LinearOptions] = {
    "interval": {"slopes": "constant"},
    "crown-ibp": LINEAR_OPTIONS["crown-ibp"],
    "crown": LINEAR_OPTIONS["crown"],
    "alpha-crown": LINEAR_OPTIONS["alpha-crown"],
}
# Optimised slopes are too slow for thousands of sub-boxes.
_SPLIT_OPTIONS: Mapping[Method, LinearOptions] = {
    **_OPTIONS,
    "alpha-crown": _OPTIONS["crown"],
}

_STEPS = 25  # of an attack


class _LowerBounds(NamedTuple):
    """Lower bounds of `R` rows over a box.

    Attributes:
      lower: `[R]`; infinite or NaN if there is no bound.
      coefficients: `[R, *input]`, of the linear functions in the input.
      largest: `[m]`, the largest magnitude of each output on the box.
    """

    lower: Array
    coefficients: Array
    largest: Array


class Programs:
    """Jitted functions of one network.

    Attributes:
      flat: the network as a function from `[n]` to `[m]`.
      input_size, output_size: `n` and `m`.
      rounding: what bounds hold for.
      forward: `flat`, jitted.
      particles: number of points that one call of `attack` moves.
      boxes: largest number of sub-boxes that one call of `split` bounds.
      first_call: for each method the seconds of its first bounds, including compilation.
      failures: the reasons why attacks failed, by name; a failed attack is not tried again.
    """

    def __init__(
        self,
        single: Callable[[Array], Array],
        input_shape: Sequence[int],
        *,
        rounding: Rounding = "float32",
        max_bytes: int = 2**30,
    ):
        """Traces the network.

        Args:
          single: the network as a function of one example `[*input_shape]`, float32; its output may
            have any shape.
          input_shape: the shape of one example, without the batch.
          rounding: what bounds hold for, see `boundjax.linear`.
          max_bytes: memory budget for the intermediate linear bounds of one call.

        Raises:
          ValueError: if the outputs are not floating-point.
          NoProofError: if the device has no proof for the rounding.
        """
        if rounding != "nearest":
            require_plain_sums(jax.default_backend())
        shape = tuple(input_shape)
        self.flat = lambda x: jnp.reshape(single(jnp.reshape(x, shape)), (-1,))
        self.input_size = math.prod(shape)
        self.first_call: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.rounding: Rounding = rounding
        self._max_bytes = max_bytes
        self._compiled: dict[tuple[str, str], Callable[..., tuple[Array, ...]]] = {}
        example = jax.ShapeDtypeStruct((self.input_size,), jnp.float32)
        traced = jax.make_jaxpr(self.flat)(example)
        self.output_size = traced.out_avals[0].shape[0]
        if not jnp.issubdtype(traced.out_avals[0].dtype, jnp.floating):
            raise ValueError(f"expected floating-point outputs, got {traced.out_avals[0].dtype}")
        sizes = [math.prod(v.aval.shape) for e in traced.eqns for v in e.outvars]
        largest = max([self.input_size, *sizes])
        self.particles = _power_below(2**18 // largest, 4, 64)
        self.boxes = _power_below(max_bytes // (16 * largest**2), 8, 1024)
        self.forward = jax.jit(self.flat)

    @functools.cached_property
    def domains(self) -> DomainPrograms:
        """Those of a search over domains."""
        return DomainPrograms(self.flat, self.input_size, self.rounding, self._max_bytes)

    @functools.cached_property
    def attack(self) -> Callable[..., tuple[Array, Array]]:
        """`(lower, upper, start [P, n], weights [P, k, m], offset [P, k], scale)` -> best points.

        Projected descent along the sign of the gradient of `max_k (weights_k y + offset_k)`. The
        step falls from `scale` times the width of the box to a twentieth of that. Returns the best
        points `[P, n]` on the way, the start included, and their values `[P]`.
        """
        descent = jax.vmap(jax.value_and_grad(self._objective))

        def attack(
            lower: Array, upper: Array, start: Array, weights: Array, offset: Array, scale: Array
        ) -> tuple[Array, Array]:
            def step(
                carry: tuple[Array, Array, Array], index: Array
            ) -> tuple[tuple[Array, Array, Array], None]:
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
        """Evaluates the points of `attack` without moving them, for networks without a gradient."""
        values = jax.vmap(self._objective)
        return jax.jit(
            lambda lower, upper, start, weights, offset, scale: (
                start,
                values(start, weights, offset),
            )
        )

    def _objective(self, x: Array, weights: Array, offset: Array) -> Array:
        """The largest of `k` rows at a point `[n]`, a scalar; the point is unsafe if it is <= 0."""
        return jnp.max(weights @ self.flat(x) + offset)

    def bounds(self, method: Method) -> Callable[[Array, Array, Array], tuple[Array, ...]]:
        """`(lower [n], upper [n], rows [R, m])` -> lower bounds `[R]` of `rows @ y`.

        The bounds hold for what `rounding` says. The function also returns the outputs
        `[m]` at the centre of the box, and the largest magnitude `[m]` of each output on the box.
        """
        if ("bounds", method) in self._compiled:
            return self._compiled["bounds", method]
        bounded = self._bounded(_OPTIONS[method], self._max_bytes)

        @training_precision("highest")  # a proof, whatever the caller's precision
        def bounds(lower: Array, upper: Array, rows: Array) -> tuple[Array, ...]:
            bound = bounded(Box(lower, upper), rows)
            return bound.lower, self.flat(_middle(lower, upper)), bound.largest

        return self._compiled.setdefault(("bounds", method), jax.jit(bounds))

    def _bounded(
        self, options: LinearOptions, max_bytes: int
    ) -> Callable[[Box, Array], _LowerBounds]:
        """Turns the network into a function from a box and rows `[R, m]` to lower bounds."""
        common: LinearOptions = {
            "sides": "lower",
            "max_bytes": max_bytes,
            "rounding": self.rounding,
        }
        merged: RelaxOptions = {**common, **options}
        relaxed = relax(self.flat, **merged)

        def bounds(box: Box, rows: Array) -> _LowerBounds:
            relaxation = relaxed(box)
            interval, aux = relaxation.bounds(rows, has_aux=True)
            coefficients = aux.coefficients.lower_coefficients
            assert coefficients is not None, "the lower side was asked for"
            return _LowerBounds(interval.lower, coefficients, relaxation.largest_output())

        return bounds

    def split(self, method: Method) -> Callable[..., tuple[Array, ...]]:
        """Bounds many sub-boxes, and says where to cut them and where to look for counterexamples.

        `(lower [N, n], upper [N, n], rows [N, R, m], offset [N, R], member [N, R], open [N, R])`
        -> lower bounds `[N, R]` of `rows @ y`, which hold for what `rounding` says; the largest
        magnitude `[N, m]` of each output on the sub-box; the influence `[N, n]` of each input on
        the best row of each open conjunction; two points `[N, 2, n]`, the centre and the corner
        where the relaxation is least; and their outputs `[N, 2, m]`. `member` is the index of the
        conjunction that a row belongs to, `open` says whether it is still unrefuted.
        """
        if ("split", method) in self._compiled:
            return self._compiled["split", method]
        max_bytes = max(2**20, self._max_bytes // self.boxes)
        bounded = self._bounded(_SPLIT_OPTIONS[method], max_bytes)

        @training_precision("highest")
        def one(
            lower: Array, upper: Array, rows: Array, offset: Array, member: Array, still_open: Array
        ) -> tuple[Array, ...]:
            bound = bounded(Box(lower, upper), rows)
            value = bound.lower + offset
            # A conjunction is refuted by one row, so only its best row counts.
            same = member[:, None] == member[None, :]
            in_conjunction = jnp.where(same, jnp.broadcast_to(value, same.shape), -jnp.inf)
            weight = (still_open & (value >= jnp.max(in_conjunction, axis=1))).astype(value.dtype)
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
    """The largest power of two `<= value`, clipped to `[least, most]`."""
    return min(most, max(least, 1 << max(0, value.bit_length() - 1)))


def power_above(value: int) -> int:
    """The least power of two `>= value`."""
    return 1 << max(0, value - 1).bit_length()

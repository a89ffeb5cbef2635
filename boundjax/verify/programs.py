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
from chex import Array

from boundjax.certification.presets import METHODS
from boundjax.precision import training_precision
from boundjax.sets.box import Box
from boundjax.tracing.trace import trace
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.linear import linear

# Methods that are tried one after another, cheap ones first, up to the one that is asked for.
LADDER = ("interval", "crown-ibp", "crown", "alpha-crown")

# Sub-boxes are bounded by the thousand, which optimised slopes are too slow for.
_SPLITTING = {
    "interval": {"slopes": "constant"},
    "crown-ibp": {},
    "crown": {"intermediate": "linear"},
    "alpha-crown": {"intermediate": "linear"},
}

_STEPS = 25


class Programs:
    """Jitted functions of one network.

    Attributes:
      flat: the network as a function from ``[n]`` to ``[m]``.
      particles: points that one call of ``attack`` moves.
      boxes: sub-boxes that one call of ``split`` bounds at most.
      first_call: seconds that the first bounds of a method took, compilation included.
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

        def objective(x: Array, weights: Array, offset: Array) -> Array:
            return jnp.max(weights @ self.flat(x) + offset)

        descent = jax.vmap(jax.value_and_grad(objective))

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

    def _largest(self, x: Array) -> Array:
        """The largest magnitude of a value inside the network at ``x``, a scalar."""
        values, found = [x], [jnp.max(jnp.abs(x))]
        for node in trace(self.flat, x).nodes[1:]:
            values.append(node.apply(*(values[i] for i in node.inputs)))
            if jnp.issubdtype(node.dtype, jnp.floating) and node.size:
                found.append(jnp.max(jnp.abs(values[-1])))
        return jnp.max(jnp.stack(found))

    def _reach(self, lower: Array, upper: Array) -> Array:
        """What no value inside the network exceeds in magnitude on the box, by intervals."""
        found = []
        for interval in intervals_of.forward(trace(self.flat, lower), Box(lower, upper)):
            if jnp.issubdtype(interval.lower.dtype, jnp.floating) and interval.lower.size:
                found += [jnp.max(jnp.abs(end)) for end in interval]
        return jnp.max(jnp.stack(found))

    def bounds(self, method: str) -> Callable[[Array, Array, Array], tuple[Array, ...]]:
        """``(lower [n], upper [n], rows [R, m])`` -> lower bounds ``[R]`` of ``rows @ y``.

        With them the outputs at the centre; and sizes by which rounding is judged, as large values
        may cancel in the outputs: the largest value inside the network at the centre and two
        corners, and what none exceeds on all of the box by intervals.
        """
        if ("bounds", method) in self._compiled:
            return self._compiled["bounds", method]
        transformed = METHODS[method](self.flat, self._max_bytes)

        @training_precision("highest")  # a proof, whoever asks
        def bounds(lower: Array, upper: Array, rows: Array) -> tuple[Array, ...]:
            found, middle = transformed(Box(lower, upper), rows).lower, _middle(lower, upper)
            points = jnp.stack([middle, lower, upper])
            largest = jnp.max(jax.vmap(self._largest)(points))
            return found, self.flat(middle), largest, self._reach(lower, upper)

        return self._compiled.setdefault(("bounds", method), jax.jit(bounds))

    def split(self, method: str) -> Callable[..., tuple[Array, ...]]:
        """Bounds of many sub-boxes, and what says where to cut and to look.

        ``(lower [N, n], upper [N, n], rows [N, R, m], offset [N, R], member [N, R], open [N, R])``
        -> lower bounds ``[N, R]`` of ``rows @ y``; the size ``[N, R]`` of their terms in the input,
        ``|coefficients| |x|``, or of the largest value inside the network that intervals allow, by
        which rounding is judged; the influence ``[N, n]`` of every input on the best row of each
        open conjunction; points ``[N, 2, n]``, the centre and the corner where the relaxation is
        least; and their outputs ``[N, 2, m]``. ``member`` says which conjunction a row belongs to,
        ``open`` whether that is still unrefuted.
        """
        if ("split", method) in self._compiled:
            return self._compiled["split", method]
        transformed = linear(
            self.flat,
            sides="lower",
            has_aux=True,
            max_bytes=max(2**20, self._max_bytes // self.boxes),
            **_SPLITTING[method],
        )

        @training_precision("highest")
        def one(lower, upper, rows, offset, member, still_open):
            found, aux = transformed(Box(lower, upper), rows)
            value = found.lower + offset
            together = member[:, None] == member[None, :]
            others = jnp.where(together, jnp.broadcast_to(value, together.shape), -jnp.inf)
            weight = (still_open & (value >= jnp.max(others, axis=1))).astype(value.dtype)
            coefficients = aux.coefficients.lower_coefficients.reshape(rows.shape[0], -1)
            influence = (weight @ jnp.abs(coefficients)) * (upper - lower)
            corner = jnp.where(weight @ coefficients > 0.0, lower, upper)
            size = jnp.abs(coefficients) @ jnp.maximum(jnp.abs(lower), jnp.abs(upper))
            points = jnp.stack([_middle(lower, upper), corner])
            size = jnp.maximum(size, self._reach(lower, upper))
            return found.lower, size, influence, points, jax.vmap(self.flat)(points)

        return self._compiled.setdefault(("split", method), jax.jit(jax.vmap(one)))


def _middle(lower: Array, upper: Array) -> Array:
    return jnp.clip(0.5 * lower + 0.5 * upper, lower, upper)


def _power_below(value: int, least: int, most: int) -> int:
    """The largest power of two ``<= value``, between two others."""
    return min(most, max(least, 1 << max(0, value.bit_length() - 1)))


def power_above(value: int) -> int:
    """The least power of two ``>= value``."""
    return 1 << max(0, value - 1).bit_length()

"""The compiled parts of a search: attacks and bounds.

Boxes and rows of a property are arguments, not constants, and so are the weights where they are
given. So a network is compiled once for all properties whose arrays have the same shapes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax import sharding
from boundjax.precision import training_precision
from boundjax.search.constraints import Constraints, SetOf
from boundjax.search.domains import DomainPrograms
from boundjax.search.limits import MAX_BYTES, checked_bytes
from boundjax.search.method import Method
from boundjax.search.network import Flat, FlatNetwork, Program
from boundjax.sets.box import Box
from boundjax.sets.input_set import InputSet
from boundjax.sets.rounding import Rounding
from boundjax.transforms.linear import LinearOptions, RelaxOptions, relax
from boundjax.transforms.presets import LINEAR_OPTIONS
from boundjax.transforms.problem import require_plain_sums
from boundjax.typing import Device, PyTree

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
_MIX_STEPS = 30
_FEW_BOXES = 16  # sub-boxes of a device while few are left


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


class SubBoxes(NamedTuple):
    """Bounds on `N` sub-boxes, which hold for what `Programs.rounding` says.

    Attributes:
      mix: `[N, C, R]`, for each conjunction weights of its rows that sum to 1 about: if all rows
        can be at most 0 together, so can each such mean of them.
      lower: `[N, C]`, lower bounds of `mix @ rows @ y`, where `mix @ rows` is computed in float32.
      largest: `[N, m]`, the largest magnitude of each output.
      influence: `[N, n]`, of each input on the means of the open conjunctions.
      points: `[N, 2, n]`, the centre and the corner where the relaxation is least.
      outputs: `[N, 2, m]`, at these points.
    """

    mix: Array
    lower: Array
    largest: Array
    influence: Array
    points: Array
    outputs: Array


class Programs:
    """Jitted functions of one network.

    Attributes:
      network: the network as a function from `[n]` to `[m]`.
      rounding: what bounds hold for.
      particles: number of points that one call of `attack` moves.
      samples: number of points for each of them that one call of `nearest` compares.
      few_boxes, boxes: the two numbers of sub-boxes that one call of `split` bounds.
      first_call: for each method the seconds of its first bounds, with compilation where it counts.
      constraints: between the inputs; None if there are none.
      failures: the reasons why attacks failed, by name; a failed attack is not tried again.
    """

    def __init__(
        self,
        single: Callable[..., Array],
        input_shape: Sequence[int],
        *,
        rounding: Rounding = "float32",
        max_bytes: int = MAX_BYTES,
        devices: Sequence[Device] | None = None,
        weights: PyTree = None,
        compiled: dict[Any, Any] | None = None,
        constraints: Constraints | None = None,
    ):
        """Traces the network.

        Args:
          single: the network as a function of one example `[*input_shape]`, float32, or of its
            weights and one example; its output may have any shape.
          input_shape: the shape of one example, without the batch.
          rounding: what bounds hold for, see `boundjax.linear`.
          max_bytes: memory that the linear bounds of one call may take on each device, estimated.
            Batches of domains and of sub-boxes become as small as that, to one on each device; a
            sub-box has 1 MiB, even if that is more.
          devices: local devices, such as `jax.local_devices()`, that divide batches of domains and
            of sub-boxes; by default JAX's default device. They do not communicate. Batches grow
            with their number, and what else is computed runs on the first of them.
          weights: a pytree of arrays; None if `single` takes an example alone.
          compiled: keeps compiled code, at first an empty dictionary. Networks that share one must
            have the same `single`, up to the values of the weights, and the same options.
          constraints: between the inputs; bounds hold for the inputs that satisfy them.

        Raises:
          ValueError: if the outputs are not floating-point, for `max_bytes` below 1, for no
            devices, the same one twice, or one of another process.
          NoProofError: if a device has no proof for the rounding.
        """
        mesh = sharding.mesh_of(devices, axis="domains")
        if rounding != "nearest":
            for platform in {_platform()} if mesh is None else sharding.platforms(mesh):
                require_plain_sums(platform)
        checked_bytes(max_bytes, "max_bytes")
        self.network = FlatNetwork(single, weights, input_shape, compiled, mesh)
        self.first_call: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.rounding: Rounding = rounding
        self.constraints = constraints
        self._set_of: SetOf = Box if constraints is None else constraints.cut
        self._max_bytes = max_bytes
        largest = self.network.largest
        self.particles = _power_below(2**18 // largest, 4, 64)
        self.samples = _power_below(2**22 // (largest * self.particles), 1, 256)
        boxes = _power_below(max_bytes // (16 * largest**2), 1, 1024)
        self.boxes = boxes * sharding.count(mesh)
        self.few_boxes = min(_FEW_BOXES, boxes) * sharding.count(mesh)

    @property
    def input_size(self) -> int:
        """`n`."""
        return self.network.input_size

    @property
    def output_size(self) -> int:
        """`m`."""
        return self.network.output_size

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, what no devices divide runs on the first of those that were named."""
        mesh = self.network.mesh
        return (
            contextlib.nullcontext() if mesh is None else jax.default_device(mesh.devices.flat[0])
        )

    def parts(self, array: np.ndarray) -> Array:
        """An array `[N, ...]` for `split`."""
        return sharding.parts(array, self.network.mesh)

    @functools.cached_property
    def domains(self) -> DomainPrograms:
        """Those of a search over domains."""
        return DomainPrograms(self.network, self.rounding, self._max_bytes, self._set_of)

    @property
    def forward(self) -> Program:
        """The network `[n] -> [m]`."""
        return self.network.program("forward", lambda flat: _at_full_precision(flat))

    @property
    def attack(self) -> Callable[..., tuple[Array, Array]]:
        """`(lower, upper, start [P, n], weights [P, k, m], offset [P, k], scale)` -> best points.

        Projected descent along the sign of the gradient of `max_k (weights_k y + offset_k)`. The
        step falls from `scale` times the width of the box to a twentieth of that. Returns the best
        points `[P, n]` on the way, the start included, and their values `[P]`.
        """
        return functools.partial(_attack, self.network.program("attack", _attack_step))

    @property
    def nearest(self) -> Program:
        """`(points [P, S, n], weights [P, k, m], offset [P, k])` -> the best of each `S`, `[P, n]`.

        Best is where the largest of the `k` rows is least; where that is NaN is worst.
        """
        return self.network.program("nearest", _nearest)

    @property
    def look(self) -> Program:
        """Evaluates the points of `attack` without moving them, for networks without a gradient."""
        return self.network.program("look", _look)

    def bounds(self, method: Method) -> Program:
        """`(lower [n], upper [n], rows [R, m])` -> lower bounds `[R]` of `rows @ y`.

        The bounds hold for what `rounding` says. The function also returns the outputs
        `[m]` at the centre of the box, and the largest magnitude `[m]` of each output on the box.
        """
        options = self._options(_OPTIONS[method], self._max_bytes)

        def make(flat: Flat) -> Callable[..., tuple[Array, ...]]:
            bounded = _bounded(flat, options)

            @training_precision("highest")  # a proof, whatever the caller's precision
            def bounds(lower: Array, upper: Array, rows: Array) -> tuple[Array, ...]:
                bound = bounded(self._set_of(lower, upper), rows)
                return bound.lower, flat(_middle(lower, upper)), bound.largest

            return bounds

        return self.network.program(("bounds", method), make)

    def split(self, method: Method, joint: bool = True) -> Program:
        """Bounds many sub-boxes, and says where to cut them and where to look for counterexamples.

        `(lower [N, n], upper [N, n], rows [N, R, m], offset [N, R], member [N, R], open [N, C]) ->
        SubBoxes`. `member` is the index of the conjunction that a row belongs to, `open` says
        whether that is still unrefuted. Unless `joint`, all rows of a conjunction are the same.
        """
        each = self._max_bytes * sharding.count(self.network.mesh) // self.boxes
        options = self._options(_SPLIT_OPTIONS[method], max(2**20, each))
        make = functools.partial(_split, options=options, joint=joint, set_of=self._set_of)
        return self.network.program(("split", method, joint), make, whole=0)

    def _options(self, options: LinearOptions, max_bytes: int) -> RelaxOptions:
        common: LinearOptions = {
            "sides": "lower",
            "max_bytes": max_bytes,
            "rounding": self.rounding,
        }
        return {**common, **options}


def _at_full_precision(flat: Flat) -> Flat:
    def forward(x: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return flat(x)

    return forward


def _objective(flat: Flat, x: Array, weights: Array, offset: Array) -> Array:
    """The largest of `k` rows at a point `[n]`, a scalar; the point is unsafe if it is <= 0."""
    return jnp.max(weights @ flat(x) + offset)


def _attack(
    step: Program,
    lower: Array,
    upper: Array,
    start: Array,
    weights: Array,
    offset: Array,
    scale: float,
) -> tuple[Array, Array]:
    """See `Programs.attack`.

    The loop is one of the host: XLA's CPU backend runs convolutions several times slower in a scan.
    """
    state = start, start, jnp.full(start.shape[:1], jnp.inf, start.dtype)
    for index in range(_STEPS + 1):
        length = jnp.asarray(scale * 0.05 ** (index / _STEPS), start.dtype)
        state = step(lower, upper, state, weights, offset, length)
    return state[1:]


def _attack_step(flat: Flat) -> Callable[..., tuple[Array, Array, Array]]:
    """One step of `_attack`, on points, the best points so far, and their values."""
    descent = jax.vmap(jax.value_and_grad(functools.partial(_objective, flat)))

    def step(
        lower: Array,
        upper: Array,
        state: tuple[Array, Array, Array],
        weights: Array,
        offset: Array,
        length: Array,
    ) -> tuple[Array, Array, Array]:
        x, best_x, best = state
        value, gradient = descent(x, weights, offset)
        better = value < best
        best_x = jnp.where(better[:, None], x, best_x)
        best = jnp.where(better, value, best)
        x = jnp.clip(x - length * (upper - lower) * jnp.sign(gradient), lower, upper)
        return x, best_x, best

    return step


def _nearest(flat: Flat) -> Callable[..., Array]:
    """See `Programs.nearest`."""
    values = jax.vmap(functools.partial(_objective, flat), (0, None, None))

    def nearest(points: Array, weights: Array, offset: Array) -> Array:
        value = values(points, weights, offset)
        return points[jnp.argmin(jnp.where(jnp.isnan(value), jnp.inf, value))]

    return jax.vmap(nearest)


def _look(flat: Flat) -> Callable[..., tuple[Array, Array]]:
    """See `Programs.look`."""
    values = jax.vmap(functools.partial(_objective, flat))
    return lambda lower, upper, start, weights, offset, scale: (
        start,
        values(start, weights, offset),
    )


def _bounded(flat: Flat, options: RelaxOptions) -> Callable[[InputSet, Array], _LowerBounds]:
    """Turns the network into a function from a box and rows `[R, m]` to lower bounds."""
    relaxed = relax(flat, **options)

    def bounds(input_set: InputSet, rows: Array) -> _LowerBounds:
        relaxation = relaxed(input_set)
        interval, aux = relaxation.bounds(rows, has_aux=True)
        coefficients = aux.coefficients.lower_coefficients
        assert coefficients is not None, "the lower side was asked for"
        return _LowerBounds(interval.lower, coefficients, relaxation.largest_output())

    return bounds


def _split(
    flat: Flat, options: RelaxOptions, joint: bool, set_of: SetOf
) -> Callable[..., SubBoxes]:
    """See `Programs.split`."""
    relaxed = relax(flat, **options)

    @training_precision("highest")
    def one(
        lower: Array, upper: Array, rows: Array, offset: Array, member: Array, still_open: Array
    ) -> SubBoxes:
        input_set = set_of(lower, upper)
        relaxation = relaxed(input_set)

        def bounds(rows: Array) -> tuple[Array, Array]:
            interval, aux = relaxation.bounds(rows, has_aux=True)
            coefficients = aux.coefficients.lower_coefficients
            assert coefficients is not None, "the lower side was asked for"
            return interval.lower, coefficients.reshape(rows.shape[0], -1)

        conjunctions = jnp.arange(still_open.shape[0], dtype=member.dtype)
        belongs = member[None, :] == conjunctions[:, None]  # [C, R]
        if joint:
            bound, coefficients = bounds(rows)
            mix = _best_mix(lower, upper, coefficients, bound + offset, belongs)
            means = mix @ rows
        else:
            first = jnp.argmax(belongs, axis=1)
            mix, means = jax.nn.one_hot(first, len(rows), dtype=rows.dtype), rows[first]
        bound, coefficients = bounds(means)
        weight = still_open.astype(bound.dtype)
        influence = (weight @ jnp.abs(coefficients)) * (upper - lower)
        slope = weight @ coefficients
        corner = jnp.where(slope > 0.0, lower, upper)
        if not input_set.is_box:
            # The gradient of a support function is the point that attains the maximum.
            corner = jnp.clip(jax.grad(input_set.support)(-slope), lower, upper)
        points = jnp.stack([_middle(lower, upper), corner])
        outputs = jax.vmap(flat)(points)
        largest = relaxation.largest_output()
        return SubBoxes(mix, bound, largest, influence, points, outputs)

    return jax.vmap(one)


def _best_mix(
    lower: Array, upper: Array, coefficients: Array, bound: Array, belongs: Array
) -> Array:
    """The weights of the rows of each conjunction whose mean has the largest lower bound, `[C, R]`.

    They maximise, by mirror ascent from the best row, the bound that follows from the linear bounds
    of the rows. Any weights prove something, so these need not be the best.

    Args:
      lower, upper: the box `[n]`.
      coefficients: `[R, n]`, of the linear lower bounds.
      bound: `[R]`, their least values on the box.
      belongs: bool `[C, R]`, which rows are of a conjunction.
    """
    radius = 0.5 * upper - 0.5 * lower
    at_middle = bound + jnp.abs(coefficients) @ radius  # of each linear bound
    of_row = jnp.where(belongs, bound, -jnp.inf)
    best_row = jax.nn.one_hot(jnp.argmax(of_row, axis=1), len(bound), dtype=bound.dtype)
    scale = jnp.max(jnp.abs(coefficients) @ radius) + 1e-30

    def step(state: tuple[Array, Array, Array], rate: Array) -> tuple[Any, None]:
        logits, best, best_value = state
        mix = jax.nn.softmax(logits, axis=1, where=belongs)
        slope = mix @ coefficients
        value = mix @ at_middle - jnp.abs(slope) @ radius  # [C]
        better = value > best_value
        best = jnp.where(better[:, None], mix, best)
        best_value = jnp.maximum(value, best_value)
        worst = -jnp.sign(slope) * radius[None, :]  # from the middle
        of_rows = at_middle[None, :] + worst @ coefficients.T
        return (logits + rate * of_rows / scale, best, best_value), None

    start = jnp.zeros_like(of_row), best_row, jnp.max(of_row, axis=1)
    rates = 8.0 * 0.75 ** jnp.arange(_MIX_STEPS, dtype=bound.dtype)
    (_, best, _), _ = jax.lax.scan(step, start, rates)
    return best


def _platform() -> str:
    """That of the device on which programs run."""
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def _middle(lower: Array, upper: Array) -> Array:
    return jnp.clip(0.5 * lower + 0.5 * upper, lower, upper)


def _power_below(value: int, least: int, most: int) -> int:
    """The largest power of two `<= value`, clipped to `[least, most]`."""
    return min(most, max(least, 1 << max(0, value.bit_length() - 1)))


def power_above(value: int) -> int:
    """The least power of two `>= value`."""
    return 1 << max(0, value - 1).bit_length()

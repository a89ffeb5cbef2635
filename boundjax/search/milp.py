"""Exact optima of piecewise linear networks, by mixed-integer programming (Tjeng et al. 2019).

Every unstable unit is a chain of segments, each of which may be used only behind a full one: for a
ReLU with pre-activation `x` in `[l, u]` around 0

    x = l + (0 - l) d_0 + (u - 0) d_1,   relu(x) = u d_1,   0 <= d_1 <= z <= d_0 <= 1,   z in {0, 1}

whose relaxation is the triangle of the two lines of CROWN and 0 <= relu(x). SciPy's HiGHS solves
the program in float64 with tolerances of 1e-6: a second opinion, not a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy import optimize, sparse

from boundjax.ir.families import Extremum, Scalar
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.sets.input_set import InputTree
from boundjax.sets.inputs import inputs_of
from boundjax.sets.interval import Interval
from boundjax.transforms import problem
from boundjax.transforms.interval import pre_activation_nodes
from boundjax.transforms.linear import relax
from boundjax.transforms.walk import by_node
from boundjax.typing import PyTree

_UNIT_ROWS = 256  # unit vectors that pass through a linear op at once
Status = Literal["optimal", "time limit", "failed"]
_STATUSES: Mapping[int, Status] = {0: "optimal", 1: "time limit"}
_Matrix = Any  # a `scipy.sparse.csr_array`, whose types are incomplete


class MilpOptimum(NamedTuple):
    """The least value of a row of outputs on a box.

    Attributes:
      lower: no value is less, according to the solver, whose tolerances are 1e-6.
      upper: the value at `input`, as the function computes it; inf without an input.
      input: the best input that the solver came to, `[*shape]` or a pytree, or None.
      status: `"optimal"`, `"time limit"`, or `"failed"` if the solver gave up; nothing is known of
        the optimum then.
    """

    lower: float
    upper: float
    input: Float[np.ndarray, "*shape"] | PyTree | None
    status: Status


def milp_optimum(
    function: Callable[[Any], Float[Array, "*out"]],
    input_set: InputTree,
    row: Float[ArrayLike, "*out"],
    *,
    pre_activations: Mapping[str, Interval] | None = None,
    time_limit: float = 60.0,
) -> MilpOptimum:
    """The minimum of `<row, f(x)>` over a box, by HiGHS: a second opinion for small networks.

    It proves nothing (arithmetic `"nearest"`): the solver's tolerances are 1e-6.

    Args:
      function: a piecewise linear function of one array, or of a pytree, with one output array:
        linear ops, ReLUs and other ops with kinks, maxima and minima.
      input_set: a box, such as a `boundjax.Box` or a ball of the norm inf; or a pytree of boxes and
        of arrays that are not perturbed.
      row: `[*out]`; for the minimum of a margin a row of `boundjax.margin_specification`, for a
        maximum the negative.
      pre_activations: bounds by label for every nonlinear op, as of a `boundjax.Relaxation`;
        tighter ones leave the solver less to do. By default those of CROWN.
      time_limit: seconds that the solver may take.

    Raises:
      ValueError: for a set that is not a box, a function that is not piecewise linear (the message
        names the op), or a row that does not fit.
      UnsupportedOpError: at an op that is not in `supported_ops()`.
    """
    return Encoding(function, input_set, pre_activations).minimum(row, time_limit)


class _Affine(NamedTuple):
    """An array `[k]` of affine functions of a program's variables: `matrix @ v + constant`."""

    matrix: _Matrix
    constant: np.ndarray

    def minus(self, other: _Affine) -> _Affine:
        """The elementwise difference."""
        columns = max(self.matrix.shape[1], other.matrix.shape[1])
        matrix = _widened(self.matrix, columns) - _widened(other.matrix, columns)
        return _Affine(sparse.csr_array(matrix), self.constant - other.constant)

    def times(self, factors: np.ndarray) -> _Affine:
        """The product with a factor `[k]` for every element."""
        scale = sparse.dia_array((factors[None], [0]), (len(factors), len(factors)))
        return _Affine(sparse.csr_array(scale @ self.matrix), factors * self.constant)

    def shifted(self, by: np.ndarray) -> _Affine:
        """The sum with constants."""
        return self._replace(constant=self.constant + by)

    def take(self, indices: np.ndarray) -> _Affine:
        """Some of the elements."""
        return _Affine(self.matrix[indices], self.constant[indices])

    def spread(self, places: np.ndarray, weights: np.ndarray, size: int) -> _Affine:
        """`[size]`, where weighted elements are added up at their places."""
        entries = weights, (places, np.arange(len(places)))
        matrix = sparse.csr_array(entries, (size, len(places)))
        return _Affine(sparse.csr_array(matrix @ self.matrix), matrix @ self.constant)


class _Constraints(NamedTuple):
    """`least <= matrix @ v <= most`."""

    matrix: _Matrix
    least: np.ndarray
    most: np.ndarray


class Encoding:
    """A network over a box as a mixed-integer program."""

    def __init__(
        self,
        function: Callable[[Any], Array],
        input_set: InputTree,
        pre_activations: Mapping[str, Interval] | None = None,
        *,
        integer: bool = True,
    ) -> None:
        """Encodes the network; see `milp_optimum`.

        Args:
          function, input_set, pre_activations: as of `milp_optimum`.
          integer: whether units are exact. Otherwise they are relaxed: the linear program that no
            relaxation of single units with these bounds can beat.
        """
        self._inputs = inputs_of(input_set)
        function, input_set = self._inputs.applied(function), self._inputs.input_set
        if not input_set.is_box:
            raise ValueError(
                "a MILP needs a box, a boundjax.Box or a ball of the norm inf, got "
                f"{type(input_set).__name__}"
            )
        self._function, self._integer = function, integer
        graph, _, _ = problem.traced(function, input_set, "nearest")
        if pre_activations is None:
            relaxed = relax(function, intermediate="linear")
            bounded = jax.jit(lambda ball: relaxed(ball).pre_activations)
            pre_activations = cast("Mapping[str, Interval]", bounded(input_set))
        missing = pre_activation_nodes(graph).keys() - pre_activations.keys()
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"pre_activations must bound every nonlinear op, it lacks {names}")
        bounds = by_node(graph, "pre_activations", pre_activations)
        self._ends = {index: _loosened(interval) for index, interval in bounds.items()}
        self._shapes = {node.index: node.shape for node in graph.nodes}
        self._lower: list[np.ndarray] = []
        self._upper: list[np.ndarray] = []
        self._is_integer: list[np.ndarray] = []
        self._count = 0
        self._constraints: list[_Constraints] = []
        lower, upper = map(_flat, input_set.interval())
        self._dtype = graph.nodes[0].dtype
        values = {0: self._variables(lower, upper)}
        for node in graph.nodes[1:]:
            values[node.index] = self._encoded(node, [values[i] for i in node.inputs])
        self._output, self._output_shape = _output_of(graph, values)

    def minimum(self, row: ArrayLike, time_limit: float = 60.0) -> MilpOptimum:
        """The least value of `<row, f(x)>`; see `milp_optimum`."""
        weights = np.asarray(row, np.float64)
        if weights.shape != self._output_shape:
            raise ValueError(
                f"row must have the output's shape {self._output_shape}, got {weights.shape}"
            )
        flat = weights.reshape(-1)
        cost = np.zeros(self._count)
        reduced = self._output.matrix.T @ flat
        cost[: len(reduced)] = reduced
        offset = float(self._output.constant @ flat)
        solved = self._solved(cost, time_limit)
        status = _STATUSES.get(solved.status, "failed")
        if status == "failed":
            return MilpOptimum(-np.inf, np.inf, None, "failed")
        bound = getattr(solved, "mip_dual_bound", None)
        if bound is None:  # a linear program
            bound = solved.fun if status == "optimal" else -np.inf
        if solved.x is None:
            return MilpOptimum(float(bound) + offset, np.inf, None, status)
        lower, upper = self._lower[0], self._upper[0]  # of the inputs
        point = np.clip(solved.x[: len(lower)], lower, upper)
        point = point.astype(self._dtype).reshape(self._shapes[0])
        value = flat @ _flat(self._function(jnp.asarray(point)))
        point = self._inputs.restored(point)
        return MilpOptimum(float(bound) + offset, float(value), point, status)

    def _solved(self, cost: np.ndarray, time_limit: float) -> Any:
        """SciPy's result.

        Raises:
          ValueError: for numbers that are not finite.
        """
        # SciPy's types say that ends are numbers.
        constraint: Any = optimize.LinearConstraint
        bounds: Any = optimize.Bounds
        constraints: list[Any] = []
        if self._constraints:
            matrices, least, most = zip(*self._constraints, strict=True)
            matrix = sparse.vstack([_widened(matrix, self._count) for matrix in matrices])
            constraints = [constraint(matrix, np.concatenate(least), np.concatenate(most))]
        lower, upper = np.concatenate(self._lower), np.concatenate(self._upper)
        numbers = [cost, lower, upper, *(part.matrix.data for part in self._constraints)]
        if not all(np.isfinite(array).all() for array in numbers):
            raise ValueError("a MILP needs finite weights and bounds, got NaN or an infinity")
        return optimize.milp(
            cost,
            constraints=constraints,
            bounds=bounds(lower, upper),
            integrality=np.concatenate(self._is_integer),
            options={"time_limit": float(time_limit), "mip_rel_gap": 0.0},
        )

    def _variables(self, lower: np.ndarray, upper: np.ndarray, integer: bool = False) -> _Affine:
        """New variables with these ends."""
        size, before = len(lower), self._count
        self._count += size
        self._lower.append(lower)
        self._upper.append(upper)
        self._is_integer.append(np.full(size, integer and self._integer, int))
        entries = np.ones(size), (np.arange(size), before + np.arange(size))
        return _Affine(sparse.csr_array(entries, (size, self._count)), np.zeros(size))

    def _constrain(self, value: _Affine, least: Any, most: Any) -> None:
        """Adds `least <= value <= most`."""
        part = _Constraints(value.matrix, least - value.constant, most - value.constant)
        self._constraints.append(part)

    def _encoded(self, node: Node, operands: Sequence[_Affine]) -> _Affine:
        if not jnp.issubdtype(node.dtype, jnp.floating):
            raise _refused(node)
        if node.is_linear:
            return _linear(node.apply, node, operands)
        op = node.op
        if isinstance(op, Scalar) and not op.jumps and op.kinks(node):
            return self._chained(node, operands[0], op.kinks(node))
        if isinstance(op, Extremum):
            return self._extremum(node, op, operands)
        raise _refused(node)

    def _chained(self, node: Node, x: _Affine, kinks: Sequence[Any]) -> _Affine:
        """A piecewise linear function of single elements: its units as chains of segments."""
        lower, upper = self._ends[node.inputs[0]]
        points = np.stack([_flat(jnp.broadcast_to(k, node.shape)) for k in kinks], axis=1)
        cuts = np.clip(np.sort(points, axis=1), lower[:, None], upper[:, None])
        ends = np.concatenate([lower[:, None], cuts, upper[:, None]], axis=1)  # [size, K + 2]
        values = np.stack([_flat(node.apply(self._shaped(end, node))) for end in ends.T], axis=1)
        widths, rises = np.diff(ends, axis=1), np.diff(values, axis=1)
        unit, segment = np.nonzero(widths > 0)
        shares = self._variables(np.zeros(len(unit)), np.ones(len(unit)))
        # A segment may be used if the one before it is full.
        first = np.flatnonzero(unit[1:] == unit[:-1])
        flags = self._variables(np.zeros(len(first)), np.ones(len(first)), integer=True)
        self._constrain(flags.minus(shares.take(first)), -np.inf, 0.0)
        self._constrain(shares.take(first + 1).minus(flags), -np.inf, 0.0)
        units = np.unique(unit)
        travelled = shares.spread(unit, widths[unit, segment], len(lower))
        self._constrain(x.minus(travelled).take(units), lower[units], lower[units])
        return shares.spread(unit, rises[unit, segment], len(lower)).shifted(values[:, 0])

    def _extremum(self, node: Node, op: Extremum, operands: Sequence[_Affine]) -> _Affine:
        """The largest (smallest) entries of windows: one entry is selected and attained."""
        entries = _linear(lambda *values: op.windows(node, *values), node, operands)
        sign = float(op.sign)
        entries = entries.times(np.full(len(entries.constant), sign))
        ends = [
            _flat(op.windows(node, *(self._shaped(self._ends[i][k], node, i) for i in node.inputs)))
            for k in (0, 1)
        ]
        lower, upper = ends if sign > 0 else (-ends[1], -ends[0])
        valid = op.valid(node)
        usable = np.ones(len(lower), bool) if valid is None else _flat(valid).astype(bool)
        count = len(lower) // max(1, node.size)
        usable = usable.reshape(node.size, count)
        if not usable.any(axis=1).all():
            raise _refused(node)
        low = np.where(usable, lower.reshape(usable.shape), -np.inf)
        high = np.where(usable, upper.reshape(usable.shape), -np.inf)
        least, most = low.max(axis=1), high.max(axis=1)
        window, entry = np.nonzero(high >= least[:, None])
        selected = entries.take(window * count + entry)
        value = self._variables(least, most)
        flags = self._variables(np.zeros(len(window)), np.ones(len(window)), integer=True)
        gap = value.take(window).minus(selected)
        slack = most[window] - low[window, entry]
        self._constrain(gap, 0.0, np.inf)
        self._constrain(gap.minus(flags.times(-slack)), -np.inf, slack)
        self._constrain(flags.spread(window, np.ones(len(window)), node.size), 1.0, 1.0)
        return value.times(np.full(node.size, sign))

    def _shaped(self, values: np.ndarray, node: Node, operand: int | None = None) -> Array:
        """Values of an operand, by default of one of the node's shape, as the network's arrays."""
        shape = node.shape if operand is None else self._shapes[operand]
        return jnp.asarray(values.astype(self._dtype)).reshape(shape)


def _linear(apply: Callable[..., Array], node: Node, operands: Sequence[_Affine]) -> _Affine:
    """A linear function of a node's operands; its matrices have the unit vectors' images."""
    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes]
    constant = _flat(apply(*zeros))
    total = _Affine(sparse.csr_array((len(constant), 1)), constant)
    for position, operand in enumerate(operands):

        def image(vector: Array, position: int = position) -> Array:
            """Of a unit vector; constants that the op adds do not matter."""
            tangents = [jnp.zeros_like(zero) for zero in zeros]
            tangents[position] = vector
            return jax.jvp(apply, tuple(zeros), tuple(tangents))[1]

        zero, blocks = zeros[position], []
        for start in range(0, zero.size, _UNIT_ROWS):
            index = jnp.arange(start, min(start + _UNIT_ROWS, zero.size))
            units = jax.nn.one_hot(index, zero.size, dtype=zero.dtype)
            images = jax.vmap(image)(units.reshape(-1, *zero.shape))
            blocks.append(sparse.csr_array(np.asarray(images, np.float64).reshape(len(units), -1)))
        if blocks:
            matrix = sparse.csr_array(sparse.vstack(blocks).T)
            part = _Affine(sparse.csr_array(matrix @ operand.matrix), matrix @ operand.constant)
            total = total.minus(part.times(np.full(len(constant), -1.0)))
    return total


def _output_of(graph: Graph, values: Mapping[int, _Affine]) -> tuple[_Affine, tuple[int, ...]]:
    """The one output array and its shape."""
    if len(graph.outputs) != 1:
        raise ValueError(f"a MILP needs one output array, got {len(graph.outputs)}")
    (output,) = graph.outputs
    if isinstance(output, Perturbed):
        return values[output.index], graph.nodes[output.index].shape
    constant = _flat(output)
    return _Affine(sparse.csr_array((len(constant), 1)), constant), tuple(output.shape)


def _refused(node: Node) -> ValueError:
    return ValueError(
        f"a MILP needs a piecewise linear function, got {node.primitive!r} at {node.location}"
    )


def _loosened(interval: Interval) -> tuple[np.ndarray, np.ndarray]:
    """Ends that hold although the bounds were rounded; a point stays one."""
    lower, upper = map(_flat, interval)
    share = 8.0 * float(jnp.finfo(interval.lower.dtype).eps)
    by = np.where(lower < upper, share * np.maximum(np.abs(lower), np.abs(upper)), 0.0)
    return lower - by, upper + by


def _flat(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64).reshape(-1)


def _widened(matrix: _Matrix, columns: int) -> _Matrix:
    """The matrix with zeros for the variables that came later."""
    return sparse.csr_array(
        (matrix.data, matrix.indices, matrix.indptr), (matrix.shape[0], columns)
    )

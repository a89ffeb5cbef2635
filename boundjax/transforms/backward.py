"""The backward walk: coefficients on a node's value become linear bounds in the input.

Rows of coefficients `[m, *shape]` start at a node and are pulled back through one equation after
another (CROWN, Zhang et al. 2018). All rows bound from *below*: at a nonlinear op a positive
coefficient takes the lower line and a negative one the upper line. An upper bound on `g` is minus a
lower bound on `-g`. If both sides are wanted, the rows are therefore doubled to `[g; -g]` at the
first relaxation, and both sides share the walk up to there.

Values are written as deviations from *references*, one value per node: the middle of the interval
at the input and after every nonlinear op, and its affine image in between. Affine ops then act on
deviations without an offset (biases need no pass over the rows), a line `y >= s x + t` becomes
`dy >= s dx + (s x_ref + t - y_ref)`, and less cancels in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax import windows
from boundjax.ir.families import Extremum, Lines, Planes, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.numerics import signed_parts
from boundjax.ops import affine, local, matmul
from boundjax.sets.input_set import InputSet
from boundjax.sets.inputs import Inputs
from boundjax.sets.interval import Interval
from boundjax.transforms.errors import ErrorAnalysis
from boundjax.typing import PyTree
from boundjax.windows import Rows, Windowed

Sides: TypeAlias = Literal["lower", "upper", "both"]


class LinearBounds(NamedTuple):
    """`lower_coefficients x + lower_bias <= rows . value <= upper_coefficients x + upper_bias`.

    Coefficients are `[m, *input]`, biases `[m]`; both are None on a side that was not asked for.
    For an input that is a pytree so are the coefficients; those of constant leaves are 0.
    """

    lower_coefficients: Float[Array, " m *input"] | PyTree | None
    lower_bias: Float[Array, " m"] | None
    upper_coefficients: Float[Array, " m *input"] | PyTree | None
    upper_bias: Float[Array, " m"] | None

    def of_inputs(self, inputs: Inputs) -> LinearBounds:
        """The functions of one array as functions of the argument that it stands for."""
        lower, upper = (
            None if rows is None else inputs.coefficients(rows)
            for rows in (self.lower_coefficients, self.upper_coefficients)
        )
        return self._replace(lower_coefficients=lower, upper_coefficients=upper)


class PerRow(NamedTuple):
    """Separate lines for every row, on the row's window only: `[m, *window]`."""

    lines: Lines


@dataclasses.dataclass(frozen=True)
class Side:
    """Linear lower bounds, one function per row: `coefficients (x - x_ref) + constant`.

    Attributes:
      coefficients: of the rows.
      constant: `[m]`, already reduced by what rounding may have changed on the way.
      errors: what rounding may do; None if bounds are not rounded.
    """

    coefficients: Rows
    constant: Array
    errors: ErrorAnalysis | None = None

    def least(self, input_set: InputSet) -> Array:
        """The smallest values `[m]` over the input set."""
        rows, errors = self.coefficients, self.errors
        if not input_set.is_box:
            spread = jax.vmap(input_set.spread)(-windows.dense(rows))
        elif errors is None:
            spread = _contract(_absolute(rows), input_set.interval().radius)
        else:
            deviation = errors.errors[0].deviation
            gamma = errors.arithmetic.gamma(_count(rows))
            spread = _contract(_absolute(rows), deviation) * (1.0 + 2.0 * gamma)
        least = self.constant - spread
        return least if errors is None else errors.outward(Interval(least, least)).lower

    def in_input(self, reference: Array) -> tuple[Array, Array]:
        """Coefficients `[m, *input]` and biases `[m]` of these functions of the input itself."""
        coefficients = windows.dense(self.coefficients)
        axes = tuple(range(1, coefficients.ndim))
        bias = self.constant - jnp.sum(coefficients * reference[None], axis=axes)
        if self.errors is not None:
            gamma = self.errors.arithmetic.gamma(_count(coefficients) + 2)
            terms = jnp.sum(jnp.abs(coefficients * reference[None]), axis=axes)
            by = gamma * (terms + jnp.abs(self.constant)) * (1.0 + 2.0 * gamma)
            bias = self.errors.outward(Interval(bias, bias), by).lower
        return coefficients, bias


@dataclasses.dataclass(frozen=True)
class Result:
    """Lower bounds on the rows and on minus the rows; None for a side that was not asked for.

    Coefficients are complete if the rows at the start of the walk are.
    """

    below: Side | None
    above: Side | None

    def concretize(self, input_set: InputSet) -> tuple[Array | None, Array | None]:
        """The smallest lower and the largest upper values `[m]` over the input set."""
        lower = None if self.below is None else self.below.least(input_set)
        upper = None if self.above is None else -self.above.least(input_set)
        return lower, upper

    def in_input(self, reference: Array) -> LinearBounds:
        """The bounds as linear functions of the input itself; `reference` is the input's."""
        lower = upper = (None, None)
        if self.below is not None:
            lower = self.below.in_input(reference)
        if self.above is not None:
            coefficients, bias = self.above.in_input(reference)
            upper = (-coefficients, -bias)
        return LinearBounds(*lower, *upper)


def extend_references(references: list[Array], node: Node, interval: Interval | None) -> None:
    """Appends the next node's reference: the affine image, or the middle of its interval."""
    if node.is_linear:
        references.append(node.apply(*(references[i] for i in node.inputs)))
        return
    assert interval is not None, "the reference of a nonlinear node comes from its interval"
    if not jnp.issubdtype(node.dtype, jnp.floating):
        references.append(interval.lower)  # a predicate, which no coefficient reaches
        return
    # Any value is sound, but an infinite one would turn every coefficient of 0 into NaN. Only an
    # unknown interval stays NaN, which its ends show: the middle of (-inf, inf) is NaN, too, and
    # the middle of two ends near the largest number is infinite.
    unknown = jnp.isnan(interval.lower) | jnp.isnan(interval.upper)
    usable = jnp.isfinite(interval.middle) | unknown
    references.append(jnp.where(usable, interval.middle, 0.0))


def pull_back(
    graph: Graph,
    references: Sequence[Array],
    starts: Mapping[int, Rows],
    lines_of: Callable[[Node, Rows], Lines | Planes | PerRow],
    sides: Sides,
    errors: ErrorAnalysis | None = None,
) -> Result:
    """Linear bounds in the input of `sum_i <starts[i]_k, value of node i>`.

    Args:
      graph: the traced function.
      references: one value per node, see above.
      starts: node index -> coefficients `[m, *shape]`, complete or in windows; at least one node.
      lines_of: gives the relaxation of a nonlinear node for the rows that meet it: planes, or lines
        between deviations (`around`). It is called once for every such node on the way. Arrays have
        a leading axis, 1 or one entry per row (after doubling, for both sides). Lines on the rows'
        windows only are given as `PerRow`.
      sides: which bounds are wanted.
      errors: what rounding may do, which has moved the relaxations; the rest of it is subtracted
        from the bounds. None leaves the bounds as they are.
    """
    sign = -1.0 if sides == "upper" else 1.0
    pending = {
        index: windows.with_values(rows, sign * windows.values_of(rows))
        for index, rows in starts.items()
    }
    constants = [_at_reference(rows, references[index]) for index, rows in pending.items()]
    constant = sum(constants[1:], constants[0])
    loss: Array | float = 0.0
    if errors is not None:
        losses = [loss_at_start(rows, index, errors) for index, rows in pending.items()]
        loss = sum(losses[1:], losses[0])
    doubled = False
    for node in reversed(graph.nodes[1:]):
        rows = pending.pop(node.index, None)
        if rows is None:
            continue
        if node.is_linear:
            operands = affine.pull_back(node, rows)
        else:
            if sides == "both" and not doubled:
                rows, constant = windows.double(rows), jnp.concatenate([constant, -constant])
                pending = {index: windows.double(value) for index, value in pending.items()}
                doubled = True
            if not isinstance(node.op, Scalar):
                rows = windows.dense(rows)
            relaxation = lines_of(node, rows)
            if isinstance(relaxation, Planes):
                dense = windows.dense(rows)
                operands, offset = relax_planes(node, dense, relaxation, references)
            else:
                operands, offset = _relax(node, rows, relaxation)
            constant = constant + offset
        for index, operand in zip(node.inputs, operands, strict=True):
            if operand is not None:
                total = pending.get(index)
                pending[index] = operand if total is None else windows.add(total, operand)
    coefficients = pending.get(0)
    if coefficients is None:
        coefficients = jnp.zeros((constant.shape[0], *graph.nodes[0].shape), constant.dtype)

    def side(coefficients: Rows, constant: Array) -> Side:
        return Side(coefficients, constant if errors is None else constant - loss, errors)

    if sides == "lower":
        return Result(side(coefficients, constant), None)
    if sides == "upper":
        return Result(None, side(coefficients, constant))
    if not doubled:
        return Result(side(coefficients, constant), side(windows.negative(coefficients), -constant))
    below, above = windows.halves(coefficients)
    count = len(constant) // 2
    return Result(side(below, constant[:count]), side(above, constant[count:]))


def loss_at_start(rows: Rows, index: int, errors: ErrorAnalysis) -> Array:
    """What rounding may take from rows `[m]` before they meet a nonlinear node."""
    count = _count(rows)
    factor = errors.more + 2.0 * errors.arithmetic.gamma(count)
    # Twice the rounding of the constant from which it is subtracted.
    loss = _contract(_absolute(rows), errors.of_rows(index, count + 4)) * factor
    return loss + errors.of_underflow(index)


def _absolute(rows: Rows) -> Rows:
    return windows.with_values(rows, jnp.abs(windows.values_of(rows)))


def _count(rows: Rows) -> int:
    """The number of coefficients of a row."""
    return math.prod(windows.values_of(rows).shape[1:])


def _contract(rows: Rows, value: Array) -> Array:
    """`<rows_k, value>` for every row, `[m]`; `value` is `[*shape]`."""
    if isinstance(rows, Windowed):
        return _sum_per_row(rows.values * rows.crop(value))
    return matmul.rows_matmul(rows.reshape(len(rows), value.size), value.reshape(-1, 1))[:, 0]


def _at_reference(rows: Rows, value: Array) -> Array:
    """`_contract` with a reference, whose infinite elements count only under a coefficient.

    References are infinite where constants are: in a mask of -inf.
    """
    finite = jnp.where(jnp.isinf(value), 0.0, value)
    return _contract(rows, finite) + _infinite_part(rows, value)


def _infinite_part(rows: Rows, value: Array) -> Array:
    """The infinite terms of `<rows_k, value>`, `[m]`; a coefficient of 0 gives 0, not NaN."""
    coefficients = windows.values_of(rows)
    value = windows.crop(rows, value)
    infinite = jnp.isinf(value) & (coefficients != 0)
    return _sum_per_row(coefficients * jnp.where(infinite, value, 0.0))


def _sum_per_row(terms: Array) -> Array:
    """`[m, ...] -> [m]`, as a matrix product because XLA's CPU backend is far slower at sums."""
    terms = terms.reshape(len(terms), math.prod(terms.shape[1:]))  # -1 fails for empty rows
    return matmul.rows_matmul(terms, jnp.ones((terms.shape[1], 1), terms.dtype))[:, 0]


def around(node: Node, lines: Lines, sources: Sequence[Array], target: Array) -> Lines:
    """The same lines between deviations from the references of the node and its operands.

    All arrays have a leading axis, 1 or one entry per row. Every intercept of the result is an
    array.
    """

    def intercept(slope: Array | None, value: Array | None) -> Array:
        constant = -target if value is None else value - target
        if slope is None:
            return constant
        if isinstance(node.op, Extremum):
            entries = node.op.windows(node, *(source[0] for source in sources))[None]
            return constant + jnp.sum(_product(slope, entries), axis=-1)
        return constant + _product(slope, sources[0])

    return Lines(
        lines.lower_slope,
        intercept(lines.lower_slope, lines.lower_intercept),
        lines.upper_slope,
        intercept(lines.upper_slope, lines.upper_intercept),
    )


def _product(slope: Array, reference: Array) -> Array:
    """`slope reference`; a slope of 0 gives 0 even if a constant made the reference infinite."""
    return slope * jnp.where((slope == 0) & jnp.isinf(reference), 0.0, reference)


def _relax(node: Node, rows: Rows, lines: Lines | PerRow) -> tuple[tuple[Rows | None, ...], Array]:
    """Pulls lower-bounding rows back through a nonlinear op: new coefficients and the constants."""
    coefficients = windows.values_of(rows)
    if isinstance(lines, PerRow):
        (lines,) = lines
    elif isinstance(rows, Windowed):
        lines = Lines(*(None if a is None else rows.crop(a[0]) for a in lines))
    positive = coefficients > 0
    assert lines.lower_intercept is not None, "`around` makes every intercept an array"
    assert lines.upper_intercept is not None, "`around` makes every intercept an array"
    intercepts = jnp.where(positive, lines.lower_intercept, lines.upper_intercept)
    terms = coefficients * intercepts
    if getattr(node.op, "partial", False):
        # An intercept may be infinite; a coefficient of 0 must not make it NaN.
        terms = jnp.where(coefficients == 0, 0.0, terms)
    constant = _sum_per_row(terms)
    lower_slope, upper_slope = lines.lower_slope, lines.upper_slope
    if lower_slope is None or upper_slope is None:
        assert lower_slope is upper_slope, "a relaxation has two slopes or none"
        return (None,) * len(node.inputs), constant
    op = node.op
    if not isinstance(op, Extremum):
        slopes = jnp.where(positive, lower_slope, upper_slope)
        return (windows.with_values(rows, coefficients * slopes),), constant
    slopes = jnp.where(positive[..., None], lower_slope, upper_slope)
    transposed = jax.linear_transpose(functools.partial(op.windows, node), *node.input_shapes)
    return tuple(jax.vmap(transposed)(coefficients[..., None] * slopes)), constant


def relax_planes(
    node: Node, rows: Array, planes: Planes, references: Sequence[Array]
) -> tuple[tuple[Array | None, ...], Array]:
    """Pulls lower-bounding rows back through a joint op, whose planes are linear in its operands.

    Returns:
      The coefficients per operand (None for predicates), and the constants `[m]`.
    """
    floating = [jnp.issubdtype(shape.dtype, jnp.floating) for shape in node.input_shapes]
    shapes = [s for s, f in zip(node.input_shapes, floating, strict=True) if f]
    sources = [references[i] for i, f in zip(node.inputs, floating, strict=True) if f]
    finite = [jnp.where(jnp.isinf(source), 0.0, source) for source in sources]
    target = references[node.index]

    def through(weights: PyTree, offset: Array, part: Array) -> tuple[tuple[Array, ...], Array]:
        """Pulls rows back through one plane, whose arrays have a leading axis, 1 or per row."""

        def one(weights: PyTree, offset: Array, row: Array) -> tuple[tuple[Array, ...], Array]:
            linear = functools.partial(planes.product, weights)
            terms = row * (linear(*finite) + offset - target)
            constant = jnp.sum(jnp.where(row == 0, 0.0, terms))  # an offset may be infinite
            return tuple(jax.linear_transpose(linear, *shapes)(row)), constant

        leaves, tree = jax.tree.flatten((weights, offset))
        axes = jax.tree.unflatten(tree, [0 if len(leaf) > 1 else None for leaf in leaves])
        leaves = [leaf if len(leaf) > 1 else leaf[0] for leaf in leaves]
        weights, offset = jax.tree.unflatten(tree, leaves)
        return jax.vmap(one, in_axes=(*axes, 0))(weights, offset, part)

    negative, positive = signed_parts(rows)
    if planes.lower_weights is planes.upper_weights:
        zero = jnp.zeros((1, *node.shape), rows.dtype)
        operands, constant = through(planes.lower_weights, zero, rows)
        for part, offset in ((positive, planes.lower_offset), (negative, planes.upper_offset)):
            terms = jnp.where(part == 0, 0.0, part * offset)
            constant = constant + _sum_per_row(terms)
    else:
        operands, constant = through(planes.lower_weights, planes.lower_offset, positive)
        of_upper, offset = through(planes.upper_weights, planes.upper_offset, negative)
        operands = jax.tree.map(jnp.add, operands, of_upper)
        constant = constant + offset
    for operand, source in zip(operands, sources, strict=True):
        constant = constant + _infinite_part(operand, source)
    remaining = iter(operands)
    return tuple(next(remaining) if f else None for f in floating), constant


def frames_of(graph: Graph, index: int) -> dict[int, windows.Frame]:
    """The windows of a node's unit rows on every node that they meet, by the node's index."""
    frames = {index: windows.unit_frame(graph.nodes[index].shape)}
    for node in reversed(graph.nodes[1 : index + 1]):
        frame = frames.get(node.index)
        if frame is None:
            continue
        operand_frames = None
        if node.is_linear:
            operand_frames = local.operand_frames(node, frame)
        elif isinstance(node.op, Scalar):
            operand_frames = (frame,)
        if operand_frames is None:
            operand_frames = tuple(windows.whole(shape.shape) for shape in node.input_shapes)
        for operand, new in zip(node.inputs, operand_frames, strict=True):
            old = frames.get(operand)
            union = new if old is None else windows.united(old, new)
            if union is None or not windows.smaller(union):
                union = windows.whole(graph.nodes[operand].shape)
            frames[operand] = union
    return frames

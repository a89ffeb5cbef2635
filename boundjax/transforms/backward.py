"""The backward walk: coefficients on a node's value become linear bounds in the input.

Rows of coefficients `[m, *shape]` start at a node and are pulled back through one equation after
the other (CROWN, Zhang et al. 2018). All rows bound from *below*: at a nonlinear op a positive
coefficient takes the lower line, a negative one the upper line. An upper bound on `g` is minus a
lower bound on `-g`; so when both sides are wanted, the rows are doubled to `[g; -g]` at the
first relaxation, and everything up to there is shared.

Values are written as deviations from *references*, one value per node: the middle of the interval
at the input and after every nonlinear op, and their affine image in between. Then affine ops act on
deviations without any offset (biases need no pass over the rows), a line `y >= s x + t` becomes
`dy >= s dx + (s x_ref + t - y_ref)`, and less cancels in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import windows
from boundjax.ir.families import Extremum, Lines, Planes, Scalar
from boundjax.ir.node import Graph, Node
from boundjax.numerics import larger, signed_parts, smaller
from boundjax.ops import affine, local, matmul
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.typing import PyTree
from boundjax.windows import Rows, Windowed

Sides = Literal["lower", "upper", "both"]


class LinearBounds(NamedTuple):
    """`lower_coefficients x + lower_bias <= rows . value <= upper_coefficients x + upper_bias`.

    Coefficients `[m, *input]`, biases `[m]`; a side that was not asked for is None.
    """

    lower_coefficients: Array | None
    lower_bias: Array | None
    upper_coefficients: Array | None
    upper_bias: Array | None


class PerRow(NamedTuple):
    """Lines of every row of its own, where the row has coefficients: `[m, *window]`."""

    lines: Lines


@dataclasses.dataclass(frozen=True)
class Side:
    """A linear function per row that bounds from below: `coefficients (x - x_ref) + constant`."""

    coefficients: Rows
    constant: Array

    def least(self, input_set: InputSet) -> Array:
        """The least value `[m]` over the input set."""
        rows = self.coefficients
        if not input_set.is_box:
            return self.constant - jax.vmap(input_set.spread)(-windows.dense(rows))
        sizes = windows.with_values(rows, jnp.abs(windows.values_of(rows)))
        return self.constant - _contract(sizes, input_set.interval().radius)


@dataclasses.dataclass(frozen=True)
class Result:
    """Bounds of the rows from below, and of minus the rows from below; None where not asked for.

    Coefficients are complete where the rows that the walk started with are.
    """

    below: Side | None
    above: Side | None

    def concretize(self, input_set: InputSet) -> tuple[Array | None, Array | None]:
        """The least lower and the largest upper value `[m]` over the input set."""
        lower = None if self.below is None else self.below.least(input_set)
        upper = None if self.above is None else -self.above.least(input_set)
        return lower, upper

    def in_input(self, reference: Array) -> LinearBounds:
        """The same as linear functions of the input itself; `reference` is the input's."""

        def bias(side: Side) -> Array:
            axes = tuple(range(1, side.coefficients.ndim))
            return side.constant - jnp.sum(side.coefficients * reference[None], axis=axes)

        lower = upper = (None, None)
        if self.below is not None:
            lower = (self.below.coefficients, bias(self.below))
        if self.above is not None:
            upper = (-self.above.coefficients, -bias(self.above))
        return LinearBounds(*lower, *upper)


def extend_references(references: list[Array], node: Node, interval: Interval | None) -> None:
    """Appends the reference of the next node: the affine image, or the middle of its interval."""
    if node.is_linear:
        references.append(node.apply(*(references[i] for i in node.inputs)))
    elif not jnp.issubdtype(node.dtype, jnp.floating):
        references.append(interval.lower)  # a predicate; no coefficient ever reaches it
    else:
        # Any value serves; an infinite one would turn every coefficient of 0 into NaN. An unknown
        # end is told from the ends: the middle of (-inf, inf) is NaN too, and that of two ends near
        # the largest number is infinite.
        unknown = jnp.isnan(interval.lower) | jnp.isnan(interval.upper)
        usable = jnp.isfinite(interval.middle) | unknown
        references.append(jnp.where(usable, interval.middle, 0.0))


def pull_back(
    graph: Graph,
    references: list[Array],
    starts: dict[int, Rows],
    lines_of: Callable[[Node, Rows], Lines | Planes | PerRow],
    sides: Sides,
) -> Result:
    """Linear bounds in the input of `sum_i <starts[i]_k, value of node i>`.

    Args:
      graph: the traced function.
      references: one value per node, see above.
      starts: node index -> coefficients `[m, *shape]`, complete or in windows.
      lines_of: the relaxation of a nonlinear node for the rows that meet it, asked once for every
        such node on the way: planes, or lines between deviations (`around`). Its arrays have a
        leading axis, 1 or one entry per row (after doubling, for both sides). `PerRow` if they
        are those of the rows' windows only.
      sides: which bounds are wanted.
    """
    sign = -1.0 if sides == "upper" else 1.0
    pending = {
        index: windows.with_values(rows, sign * windows.values_of(rows))
        for index, rows in starts.items()
    }
    constant = sum(_at_reference(rows, references[index]) for index, rows in pending.items())
    doubled = False
    for node in reversed(graph.nodes[1:]):
        rows = pending.pop(node.index, None)
        if rows is None:
            continue
        if node.is_linear:
            operands = affine.pull_back(node, rows)
        else:
            if sides == "both" and not doubled:
                rows, constant = windows.double(rows), windows.double(constant)
                pending = {index: windows.double(value) for index, value in pending.items()}
                doubled = True
            if not isinstance(node.op, Scalar):
                rows = windows.dense(rows)
            relaxation = lines_of(node, rows)
            if isinstance(relaxation, Planes):
                operands, offset = _relax_planes(node, rows, relaxation, references)
            else:
                operands, offset = _relax(node, rows, relaxation)
            constant = constant + offset
        for index, operand in zip(node.inputs, operands, strict=True):
            if operand is not None:
                known = pending.get(index)
                pending[index] = operand if known is None else windows.add(known, operand)
    coefficients = pending.get(0)
    if coefficients is None:
        coefficients = jnp.zeros((constant.shape[0], *graph.nodes[0].shape), constant.dtype)
    if sides == "lower":
        return Result(Side(coefficients, constant), None)
    if sides == "upper":
        return Result(None, Side(coefficients, constant))
    if not doubled:
        return Result(Side(coefficients, constant), Side(windows.negative(coefficients), -constant))
    sides_of = zip(windows.halves(coefficients), windows.halves(constant), strict=True)
    return Result(*(Side(*side) for side in sides_of))


def _contract(rows: Rows, value: Array) -> Array:
    """`<rows_k, value>` for every row, `[m]`; `value` is `[*shape]`."""
    if isinstance(rows, Windowed):
        return _sum_per_row(rows.values * rows.crop(value))
    return matmul.rows_matmul(rows.reshape(len(rows), value.size), value.reshape(-1, 1))[:, 0]


def _at_reference(rows: Rows, value: Array) -> Array:
    """`_contract` with a reference; what is infinite counts where the row has a coefficient.

    References are infinite where constants are: a mask of -inf.
    """
    finite = jnp.where(jnp.isinf(value), 0.0, value)
    return _contract(rows, finite) + _infinite_part(rows, value)


def _infinite_part(rows: Rows, value: Array) -> Array:
    """The terms of `<rows_k, value>` in which `value` is infinite, `[m]`; not 0 times it."""
    values = windows.values_of(rows)
    value = rows.crop(value) if isinstance(rows, Windowed) else value[None]
    return _sum_per_row(values * jnp.where(jnp.isinf(value) & (values != 0), value, 0.0))


def _sum_per_row(terms: Array) -> Array:
    """`[m, ...] -> [m]`, as a matrix product: XLA's CPU backend is far slower at sums."""
    terms = terms.reshape(len(terms), math.prod(terms.shape[1:]))  # there may be none
    return matmul.rows_matmul(terms, jnp.ones((terms.shape[1], 1), terms.dtype))[:, 0]


def around(node: Node, lines: Lines, sources: Sequence[Array], target: Array) -> Lines:
    """The same lines between deviations from the references of the node and its operands.

    All arrays have a leading axis, 1 or one entry per row.
    """

    def intercept(slope: Array | None, value: Array | None) -> Array:
        constant = -target if value is None else value - target
        if slope is None:
            return constant
        if isinstance(node.op, Extremum):
            chosen = node.op.windows(node, *(source[0] for source in sources))[None]
            return constant + jnp.sum(_product(slope, chosen), axis=-1)
        return constant + _product(slope, sources[0])

    return Lines(
        lines.lower_slope,
        intercept(lines.lower_slope, lines.lower_intercept),
        lines.upper_slope,
        intercept(lines.upper_slope, lines.upper_intercept),
    )


def _product(slope: Array, reference: Array) -> Array:
    """`slope reference`, 0 for a slope of 0 on an infinite reference, which is a constant's."""
    return slope * jnp.where((slope == 0) & jnp.isinf(reference), 0.0, reference)


def _relax(node: Node, rows: Rows, lines: Lines | PerRow) -> tuple[tuple[Rows | None, ...], Array]:
    """Pulls lower-bounding rows back through a nonlinear op: new coefficients and the constants."""
    values = windows.values_of(rows)
    if isinstance(lines, PerRow):
        (lines,) = lines
    elif isinstance(rows, Windowed):
        lines = Lines(*(None if a is None else rows.crop(a[0]) for a in lines))
    positive = values > 0
    intercepts = jnp.where(positive, lines.lower_intercept, lines.upper_intercept)
    terms = values * intercepts
    if getattr(node.op, "partial", False):
        terms = jnp.where(values == 0, 0.0, terms)  # not 0 times an infinite intercept
    constant = _sum_per_row(terms)
    if lines.lower_slope is None and lines.upper_slope is None:
        return (None,) * len(node.inputs), constant
    if not isinstance(node.op, Extremum):
        slopes = jnp.where(positive, lines.lower_slope, lines.upper_slope)
        return (windows.with_values(rows, values * slopes),), constant
    slopes = jnp.where(positive[..., None], lines.lower_slope, lines.upper_slope)
    pooled = jax.linear_transpose(
        lambda *values: node.op.windows(node, *values), *node.input_shapes
    )
    return tuple(jax.vmap(pooled)(values[..., None] * slopes)), constant


def _relax_planes(
    node: Node, rows: Array, planes: Planes, references: list[Array]
) -> tuple[tuple[Array | None, ...], Array]:
    """The same through a joint op, whose planes are linear in all its operands."""
    floating = [jnp.issubdtype(shape.dtype, jnp.floating) for shape in node.input_shapes]
    shapes = [s for s, f in zip(node.input_shapes, floating, strict=True) if f]
    given = [references[i] for i, f in zip(node.inputs, floating, strict=True) if f]
    sources = [jnp.where(jnp.isinf(source), 0.0, source) for source in given]
    target = references[node.index]

    def through(weights: PyTree, offset: Array, part: Array) -> tuple[tuple[Array, ...], Array]:
        """Each weight and offset has a leading axis, 1 or one entry per row."""

        def one(weights: PyTree, offset: Array, row: Array) -> tuple[tuple[Array, ...], Array]:
            linear = functools.partial(planes.product, weights)
            terms = row * (linear(*sources) + offset - target)
            constant = jnp.sum(jnp.where(row == 0, 0.0, terms))  # an offset may be infinite
            return tuple(jax.linear_transpose(linear, *shapes)(row)), constant

        leaves, tree = jax.tree.flatten((weights, offset))
        axes = jax.tree.unflatten(tree, [0 if len(leaf) > 1 else None for leaf in leaves])
        leaves = [leaf if len(leaf) > 1 else leaf[0] for leaf in leaves]
        return jax.vmap(one, in_axes=(*axes, 0))(*jax.tree.unflatten(tree, leaves), part)

    above, below = signed_parts(rows)
    if planes.lower_weights is planes.upper_weights:
        none = jnp.zeros((1, *node.shape), rows.dtype)
        operands, constant = through(planes.lower_weights, none, rows)
        for part, offset in ((below, planes.lower_offset), (above, planes.upper_offset)):
            terms = jnp.where(part == 0, 0.0, part * offset)
            constant = constant + _sum_per_row(terms)
    else:
        operands, constant = through(planes.lower_weights, planes.lower_offset, below)
        others, offset = through(planes.upper_weights, planes.upper_offset, above)
        operands = jax.tree.map(jnp.add, operands, others)
        constant = constant + offset
    for operand, source in zip(operands, given, strict=True):
        constant = constant + _infinite_part(operand, source)
    found = iter(operands)
    return tuple(next(found) if f else None for f in floating), constant


def intersect(first: Interval, second: Interval) -> Interval:
    """The tighter end of two valid intervals each.

    Ends that cross by rounding are exchanged. Two intervals that contradict each other are a sign
    of a wrong bound; both ends are NaN then, which never certifies.
    """
    lower = larger(first.lower, second.lower)
    upper = smaller(first.upper, second.upper)
    size = functools.reduce(jnp.maximum, [jnp.abs(end) for end in (*first, *second)])
    contradiction = lower - upper > 1e-3 * (1.0 + size)
    lower, upper = smaller(lower, upper), larger(lower, upper)
    return poisoned(Interval(jnp.where(contradiction, jnp.nan, lower), upper))


def poisoned(bounds: Interval) -> Interval:
    """Both ends NaN where either is: an unknown end must pass neither for a bound nor a sign."""
    if not jnp.issubdtype(bounds.lower.dtype, jnp.floating):
        return bounds
    bad = jnp.isnan(bounds.lower) | jnp.isnan(bounds.upper)
    return Interval(jnp.where(bad, jnp.nan, bounds.lower), jnp.where(bad, jnp.nan, bounds.upper))


def frames_of(graph: Graph, index: int) -> dict[int, windows.Frame]:
    """Where the rows of a node's units have coefficients, for every node that they meet."""
    frames = {index: windows.unit_frame(graph.nodes[index].shape)}
    for node in reversed(graph.nodes[1 : index + 1]):
        frame = frames.get(node.index)
        if frame is None:
            continue
        found = None
        if node.is_linear:
            found = local.operand_frames(node, frame)
        elif isinstance(node.op, Scalar):
            found = (frame,)
        if found is None:
            found = [windows.whole(shape.shape) for shape in node.input_shapes]
        for operand, new in zip(node.inputs, found, strict=True):
            known = frames.get(operand)
            new = new if known is None else windows.united(known, new)
            if new is None or not windows.smaller(new):
                new = windows.whole(graph.nodes[operand].shape)
            frames[operand] = new
    return frames

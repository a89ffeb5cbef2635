"""Values between two linear functions of the input, and what rounding may do to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Extremum, Lines, Planes
from boundjax.ir.node import Node
from boundjax.ops import matmul
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.transforms.errors import ErrorAnalysis, absolute
from boundjax.typing import PyTree


class LinearFunction(NamedTuple):
    """`value + sum_i coefficients_i (x - m)_i`, a linear function of the flattened input.

    For an input of `d` elements `coefficients` is `[d, *shape]` and `value` is `[*shape]`.
    """

    coefficients: Array
    value: Array

    def spread(self, input_set: InputSet, sign: float) -> Array:
        """`max sign <coefficients, x - m>` over the input set, `[*shape]`."""
        shape = input_set.interval().lower.shape
        columns = sign * self.coefficients.reshape(self.coefficients.shape[0], -1)
        spreads = jax.vmap(lambda c: input_set.spread(c.reshape(shape)), in_axes=1)(columns)
        return spreads.reshape(self.value.shape)


class LinearEnclosure(NamedTuple):
    """A linear function below a value and one above; the same object before any relaxation.

    Attributes:
      lower, upper: the functions.
      slack: `[*shape]`, how far rounding may have moved the value beyond them; None for nothing.
    """

    lower: LinearFunction
    upper: LinearFunction
    slack: Array | None = None

    @property
    def functions(self) -> tuple[LinearFunction, LinearFunction]:
        """The lower and the upper function."""
        return self.lower, self.upper

    @property
    def exact(self) -> bool:
        """Whether both functions are the value itself; decided while tracing."""
        return self.lower is self.upper

    def concretize(self, input_set: InputSet, errors: ErrorAnalysis | None = None) -> Interval:
        """The smallest value of the lower and the largest value of the upper function."""
        bounds = Interval(
            self.lower.value - self.lower.spread(input_set, -1.0),
            self.upper.value + self.upper.spread(input_set, 1.0),
        )
        if errors is None:
            return bounds
        assert self.slack is not None, "a rounded enclosure has a slack"
        inputs = len(self.lower.coefficients)
        gamma = 2.0 * errors.arithmetic.gamma(inputs + 4)
        return errors.outward(bounds, self.slack + gamma * largest(self, errors))


def planes_of(node: Node, relaxation: Lines | Planes) -> Planes:
    """A relaxation that all rows share as planes, without the leading axis.

    Lines become planes of one operand, or of the entries of a window. `product` increases with
    every operand whose weight is positive, and takes no boolean operands.
    """
    if isinstance(relaxation, Planes):
        parts = [jax.tree.map(lambda array: array[0], part) for part in relaxation[1:]]
        if relaxation.lower_weights is relaxation.upper_weights:
            parts[2] = parts[0]
        return Planes(relaxation.product, *parts)
    lower_slope, lower_intercept, upper_slope, upper_intercept = relaxation
    zero = jnp.zeros(node.shape, node.dtype)

    def constant_product(weights: tuple[()], *operands: Array) -> Array:
        return zero

    def product(weights: Array, *operands: Array) -> Array:
        if isinstance(node.op, Extremum):
            return jnp.sum(weights * node.op.windows(node, *operands), axis=-1)
        (value,) = operands
        return weights * value

    below = zero if lower_intercept is None else lower_intercept[0]
    above = zero if upper_intercept is None else upper_intercept[0]
    slope = upper_slope if lower_slope is None else lower_slope
    if slope is None:
        return Planes(constant_product, (), below, (), above)
    level = jnp.zeros_like(slope[0])
    return Planes(
        product,
        level if lower_slope is None else lower_slope[0],
        below,
        level if upper_slope is None else upper_slope[0],
        above,
    )


def apply_planes(
    planes: Planes, weights: PyTree, operands: Sequence[Array], rows: bool = False
) -> Array:
    """`product(weights, *operands)`; with `rows`, for every row of the operands."""
    if rows and operands:
        return jax.vmap(lambda *values: planes.product(weights, *values))(*operands)
    return planes.product(weights, *operands)


def largest(enclosure: LinearEnclosure, errors: ErrorAnalysis) -> Array:
    """The largest sum of the absolute terms of either function over the input set, `[*shape]`."""
    deviation = errors.errors[0].deviation.reshape(1, -1)
    largest = None
    for function in enclosure.functions[: 1 if enclosure.exact else 2]:
        rows = jnp.abs(function.coefficients).reshape(deviation.size, -1)
        terms = matmul.rows_matmul(deviation, rows).reshape(function.value.shape)
        terms = terms * errors.more + jnp.abs(function.value)
        largest = terms if largest is None else jnp.maximum(largest, terms)
    assert largest is not None
    return largest


def slack_of_linear(
    node: Node, operands: Sequence[LinearEnclosure], errors: ErrorAnalysis
) -> Array:
    """What rounding may do behind a linear op: to the value, and to the functions around it."""
    assert node.op is not None
    # Two products, of the middle and of half the difference of the functions.
    gamma = 3.0 * errors.arithmetic.gamma(node.op.terms(node) + 8)
    moved = []
    for enclosure in operands:
        assert enclosure.slack is not None, "a rounded enclosure has a slack"
        moved.append(enclosure.slack + gamma * largest(enclosure, errors))
    constants = jnp.abs(node.apply(*(jnp.zeros(s.shape, s.dtype) for s in node.input_shapes)))
    constants = jnp.where(jnp.isinf(constants), 0.0, constants)
    slack = absolute(node, moved) * (1.0 + 2.0 * gamma) + gamma * constants
    return (slack + errors.errors[node.index].op_error) * errors.more


def slack_of_planes(
    node: Node, planes: Planes, operands: Sequence[LinearEnclosure], errors: ErrorAnalysis
) -> Array:
    """What rounding may do behind a nonlinear op."""
    assert node.op is not None
    gamma = 2.0 * errors.arithmetic.gamma(node.op.terms(node) + 16)
    unit = errors.arithmetic.unit
    floating = [i for i in node.inputs if i in errors.errors]
    moved = []
    for index, enclosure in zip(floating, operands, strict=True):
        assert enclosure.slack is not None, "a rounded enclosure has a slack"
        lines = 16.0 * unit * errors.errors[index].size
        moved.append(enclosure.slack + gamma * largest(enclosure, errors) + lines)
    sides = []
    for weights, offset in (planes[1:3], planes[3:5]):
        absolute_weights = jax.tree.map(jnp.abs, weights)
        offset = jnp.where(jnp.isinf(offset), 0.0, jnp.abs(offset))
        sides.append(apply_planes(planes, absolute_weights, moved) + gamma * offset)
    slack = jnp.maximum(*sides) + errors.of_value(node)
    # An end of the interval replaces an infinite line.
    slack = jnp.where(jnp.isnan(slack), jnp.inf, slack)
    return slack * errors.more

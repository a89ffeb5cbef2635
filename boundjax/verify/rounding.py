"""Bounds what float32 rounding may change: an error analysis that runs beside a backward walk.

A *computed network* is the traced graph in which every op is off by at most its own rounding. Real
arithmetic is one of them; so is every float32 program that adds the terms of a product or a sum in
any order, with or without fused multiply-add, and keeps or flushes subnormal numbers. The analysis
bounds two things over a whole box: how far computed networks are apart, and what the walk that
bounds them loses by its own rounding. `rounded_walk` subtracts both from its lower bounds.

With `u = 2^-24`, a sum of `n` products is off by at most `gamma(n) = (n + 4) u / (1 - (n + 4) u)`
times *the sum of their absolute values*, in any order. The analysis charges:

* for a product with weights `W`: `gamma(n) |W| |v|`, once for the network and once for the walk's
  reference value, with the largest `|v|` on the box; and `gamma(t) |W| |v - reference|` for
  coefficients, which the transposed product makes of `t` terms each. Terms that cancel inside one
  product are counted before they cancel;
* for sums: the same with everything that is added, as a program may begin a product with its bias;
* for a nonlinear op: its own error, the error of its lines, and their slopes times whatever the
  linear ops before it were charged.

`_terms` reads the number of terms of an op off its shapes. A linear op that it does not list is
assumed to sum all elements of its operands, which no row of it can exceed. An op without a stated
error (loops that are not unrolled, and joint ops that `_joint_error` does not list) gets an
infinite one, so that nothing behind it is ever proved.

Not guaranteed:

* that a runtime computes the graph that was traced. Folding constants into one another (batch
  normalisation with a large mean and a large bias) adds terms that this graph does not show;
* the accuracy of functions such as `exp`. `_function_error` assumes it, for every runtime;
* that a device computes products as plain sums. CPUs do; a GPU's convolutions may go through
  transforms (Winograd, FFT) that round more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Extremum, Scalar, Structural, Weighted
from boundjax.ir.node import Graph, Node
from boundjax.sets.interval import Interval

UNIT = 2.0**-24
UNDERFLOW = 2.0**-126
# Added to every size: `UNIT` times this pays for operations on an element that underflow.
_LEAST_SIZE = 2.0**-100
# Factor on sums of positive numbers that are themselves computed in float32.
MORE = 1.0 + 2.0**-17

# Structural ops that move numbers and never add any.
_MOVES = frozenset(
    (
        *("reshape", "squeeze", "broadcast_in_dim", "transpose", "slice", "rev", "split"),
        *("unstack", "concatenate", "pad", "copy", "stop_gradient", "neg", "tile", "stack"),
        *("convert_element_type", "select_n", "gather", "dynamic_slice", "dynamic_update_slice"),
        "scatter",
    )
)
# Linear ops in which an element of an operand reaches at most one element of the result.
_ONE_TO_ONE = (_MOVES - {"broadcast_in_dim", "gather", "tile"}) | {
    *("add", "sub", "add_any", "mul", "div", "reduce_sum")
}
_POWERS = frozenset(("integer_pow", "pow"))
# Functions that are accurate relative to their value, even a tiny one.
_RELATIVE = frozenset(("exp", "exp2", "square", "sqrt", "rsqrt", "log")) | _POWERS


def gamma(terms: float) -> float:
    """The relative error of a sum of this many products; infinite if it could be anything."""
    share = (terms + 4) * UNIT
    return share / (1.0 - share) if share < 0.25 else math.inf


def outward(interval: Interval, by: Array | float, share: float = 4.0 * UNIT) -> Interval:
    """Moves both ends outward by `by` and by a share of their size."""

    def distance(end: Array) -> Array:
        return by * MORE + share * jnp.where(jnp.isinf(end), 0.0, jnp.abs(end))

    return Interval(
        interval.lower - distance(interval.lower), interval.upper + distance(interval.upper)
    )


class NodeErrors(NamedTuple):
    """What rounding may do to the value of one node, in arrays of its shape.

    Attributes:
      deviation: at least `|value - reference|`.
      size: at least `|value|` and `|reference|`.
      mass: at least the sum of the absolute terms that a program may add up to make the value.
      loss: of a linear node, what rounding may take from a row with coefficient 1 on an element,
        until the row reaches nonlinear nodes or the input. None for nothing.
      terms: how many terms the mass has, at most.
      charged: for how many terms of the mass losses have been charged, at least.
    """

    deviation: Array
    size: Array
    mass: Array
    loss: Array | None = None
    terms: int = 0
    charged: int = 0

    @classmethod
    def of(cls, interval: Interval, reference: Array, **fields: Any) -> NodeErrors:
        """The errors of a node with this interval; its mass is its size unless `fields` has it."""
        # An infinite constant (a mask) is exact, and no coefficient reaches it.
        constant = (interval.lower == interval.upper) & jnp.isinf(interval.lower)
        lower, upper, reference = (jnp.where(constant, 0.0, a) for a in (*interval, reference))
        size = jnp.maximum(jnp.maximum(-lower, upper), jnp.abs(reference)) + _LEAST_SIZE
        farthest = jnp.maximum(jnp.maximum(upper - reference, reference - lower), 0.0)
        # XLA may compute a reference several times, and its last digits then differ.
        deviation = farthest * (1.0 + 4.0 * UNIT) + 8.0 * UNIT * size
        return cls(deviation, size, fields.pop("mass", size), **fields)

    def with_interval(self, interval: Interval, reference: Array) -> NodeErrors:
        """The same node with a tighter interval."""
        tighter = NodeErrors.of(interval, reference)
        return self._replace(deviation=tighter.deviation, size=tighter.size)


class ErrorAnalysis:
    """The errors of the nodes of one graph over one box, in the order of the graph.

    Attributes:
      errors: by the index of the node; floating-point nodes only.
      additions: number of terms that a row's constant sums, besides those of single nodes.
    """

    def __init__(self, graph: Graph) -> None:
        self.errors: dict[int, NodeErrors] = {}
        self.additions = sum(node.is_nonlinear for node in graph.nodes) + 4
        self._consumers = [0] * len(graph.nodes)
        for node in graph.nodes:
            for index in node.inputs:
                self._consumers[index] += 1

    def note(self, node: Node, interval: Interval, reference: Array) -> Interval:
        """Records the errors of the next node; returns an interval that holds computed values.

        Args:
          node: its operands have been noted.
          interval: computed from the intervals that `note` returned for them.
          reference: the walk's reference value of the node.
        """
        if not node.inputs:
            self.errors[node.index] = NodeErrors.of(interval, reference)
            return interval
        if isinstance(node.op, Weighted) and not node.op.diagonal:
            interval, loss, fields = self._product(node, interval)
        elif node.is_linear:
            interval, loss, fields = self._sum(node, interval)
        else:
            interval, loss, fields = outward(interval, *self._op_error(node)), None, {}
        errors = NodeErrors.of(interval, reference, **fields)
        if loss is not None:
            errors = errors._replace(loss=loss * MORE + 4.0 * UNIT * errors.size)
        self.errors[node.index] = errors
        return interval

    def tighten(self, node: Node, interval: Interval, reference: Array) -> None:
        """Replaces the interval of a node whose errors have been recorded."""
        self.errors[node.index] = self.errors[node.index].with_interval(interval, reference)

    def of_rows(self, index: int, outputs: int) -> Array:
        """What a coefficient of 1 on a node loses if rows of this many coefficients begin there."""
        errors = self.errors[index]
        loss = gamma(outputs + self.additions) * errors.size
        return loss if errors.loss is None else loss + errors.loss

    def of_slopes(self, node: Node) -> list[Array | None]:
        """What a line of slope 1 loses, per operand of a nonlinear node; None for predicates."""
        terms = _overlap(node)
        losses: list[Array | None] = []
        for index in node.inputs:
            errors = self.errors.get(index)
            if errors is None:
                losses.append(None)
                continue
            loss = gamma(terms + self._consumers[index] + 4) * errors.deviation
            loss = loss + 16.0 * UNIT * errors.size
            losses.append(loss if errors.loss is None else loss + errors.loss)
        return losses

    def of_value(self, node: Node) -> Array:
        """What the value of a nonlinear node and lines of slope 0 lose."""
        errors = self.errors[node.index]
        by, share = self._op_error(node)
        return by + (share + 16.0 * UNIT) * errors.size

    def of_sum(self, node: Node) -> float:
        """The relative error of the sum of a row's intercepts at one nonlinear node."""
        return gamma(node.size + self.additions) + 8.0 * UNIT

    def _product(self, node: Node, interval: Interval) -> tuple[Interval, Array, dict[str, Any]]:
        """The interval, loss and further fields of an op that sums products with weights."""
        op = node.op
        assert isinstance(op, Weighted)
        (index,) = node.inputs
        operand, terms = self.errors[index], _terms(node)
        lost = gamma(_transposed_terms(node) + self._consumers[index]) * operand.deviation
        lost = lost if operand.loss is None else lost + operand.loss
        # Both at once, so that the weights are read and compiled only once.
        of_both = jax.vmap(lambda value: op.magnitude(node, value))
        exact = 1.0 + 2.0 * gamma(terms)  # of sums of positive products
        mass, loss = of_both(jnp.stack([operand.size, lost])) * exact
        # A subnormal weight may be taken for 0.
        flushed = UNDERFLOW * (terms + jnp.sum(operand.size))
        error = gamma(terms + 4) * mass + flushed
        loss = loss + 2.0 * error
        fields = {"mass": mass, "terms": terms, "charged": terms}
        return outward(interval, 2.0 * error), loss, fields

    def _sum(
        self, node: Node, interval: Interval
    ) -> tuple[Interval, Array | float | None, dict[str, Any]]:
        """The same of a linear op that moves numbers, adds them or scales each by a constant."""
        operands = [self.errors[i] for i in node.inputs]
        several = max(self._consumers[i] for i in node.inputs)
        transposed, scales = _transposed_terms(node), isinstance(node.op, Weighted)
        constant: Array | float = 0.0
        if not scales:
            zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes]
            constant = jnp.abs(node.apply(*zeros))
            constant = jnp.where(jnp.isinf(constant), 0.0, constant)
        local = _terms(node)
        exact = 1.0 + 2.0 * gamma(local)
        mass = _absolute(node, [o.mass for o in operands]) * exact + constant
        loss: Array | float | None = None
        if any(o.loss is not None for o in operands):
            losses = [jnp.zeros_like(o.size) if o.loss is None else o.loss for o in operands]
            loss = _absolute(node, losses) * exact
        if scales or transposed > 1 or several > 1:
            rounded = gamma(transposed + several) * _absolute(node, [o.deviation for o in operands])
            loss = rounded * exact if loss is None else loss + rounded * exact
        charged = min(o.charged for o in operands)
        if not scales and node.primitive in _MOVES:
            terms = max(o.terms for o in operands)
            return interval, loss, {"mass": mass, "terms": terms, "charged": charged}
        if node.primitive in ("add", "sub", "add_any"):
            terms = 1 + sum(max(1, o.terms) for o in operands)
        else:
            terms = local + max(o.terms for o in operands) + 1
        error: Array | float = gamma(terms) * constant + UNDERFLOW * terms
        if scales:  # a subnormal factor may be taken for 0
            error = error + UNDERFLOW * jnp.max(operands[0].size, initial=0.0)
        for position, operand in enumerate(operands):
            share = gamma(terms) - gamma(operand.charged) * (operand.charged > 0)
            alone = [o.mass if k == position else 0.0 * o.size for k, o in enumerate(operands)]
            error = error + share * _absolute(node, alone) * exact
        fields = {"mass": mass, "terms": terms, "charged": terms}
        loss = 2.0 * error if loss is None else loss + 2.0 * error
        return outward(interval, 2.0 * error), loss, fields

    def _op_error(self, node: Node) -> tuple[Array | float, float]:
        """A nonlinear op's own error: absolute, and relative to its value."""
        if isinstance(node.op, Extremum):
            return 0.0, 0.0
        sizes = [self.errors[i].size for i in node.inputs if i in self.errors]
        if isinstance(node.op, Scalar):
            return _function_error(node, sizes)
        return _joint_error(node, sizes)


def _function_error(node: Node, operands: list[Array]) -> tuple[Array | float, float]:
    """The error of an elementwise function: absolute, and relative to its value.

    A piecewise linear function rounds a product. Others are assumed to be off by 16 ulp of the
    value (64 for powers), and by 8 ulp of the operand if a formula subtracts numbers of that size.
    """
    assert isinstance(node.op, Scalar)
    if node.op.pieces or not operands:
        return 0.0, 4.0 * UNIT
    if node.primitive in _RELATIVE:
        return 0.0, (128.0 if node.primitive in _POWERS else 32.0) * UNIT
    return 16.0 * UNIT * operands[0], 32.0 * UNIT


def _joint_error(node: Node, operands: list[Array]) -> tuple[Array | float, float]:
    """The error of an op of several perturbed values: absolute, and relative to its value."""
    count = sum(math.prod(shape.shape) for shape in node.input_shapes)
    match node.primitive:
        case "select_n":
            return 0.0, 0.0
        case "mul":
            return 0.0, 8.0 * UNIT
        case "dot_general":
            terms = _contracted(node)
            return 2.0 * gamma(terms + 4) * node.apply(*operands) * (1.0 + 2.0 * gamma(terms)), 0.0
        case "log_softmax" | "logsumexp":
            share = 2.0 * gamma(count + 32)
            return share * jnp.max(operands[0], initial=0.0), share
        case "normalize":
            return 0.0, 2.0 * gamma(count + 32)
    return math.inf, 0.0


def _contracted(node: Node) -> int:
    """The number of products that each element of a matrix product sums."""
    contract, _ = node.params["dimension_numbers"]
    first_perturbed = next(k for k, perturbed in enumerate(node.perturbed) if perturbed)
    shape = node.input_shapes[0].shape
    return math.prod(shape[axis] for axis in contract[first_perturbed])


def _terms(node: Node) -> int:
    """The largest number of products, or terms, that an element of a linear node sums."""
    operands = sum(math.prod(shape.shape) for shape in node.input_shapes)
    match node.primitive:
        case "dot_general":
            return _contracted(node)
        case "conv_general_dilated":
            (kernel,) = node.constants
            outputs = kernel.shape[node.params["dimension_numbers"].rhs_spec[0]]
            return kernel.size // max(1, outputs)
        case "reduce_sum":
            return operands // max(1, node.size)
        case "reduce_window_sum":
            return math.prod(node.params["window_dimensions"])
        case "cumsum":
            return node.shape[node.params["axis"]]
        case "add" | "sub" | "add_any":
            return 2
        case "mul" | "div":
            return 1
    moves = isinstance(node.op, Structural) and node.primitive in _MOVES
    return 1 if moves else operands + 1


def _transposed_terms(node: Node) -> int:
    """The largest number of elements of a linear node that an element of an operand reaches."""
    operands = min(math.prod(shape.shape) for shape in node.input_shapes)
    match node.primitive:
        case "dot_general":
            return node.constants[0].size // max(1, _contracted(node))
        case "conv_general_dilated":
            (kernel,) = node.constants
            inputs = kernel.shape[node.params["dimension_numbers"].rhs_spec[1]]
            return kernel.size // max(1, inputs)
        case "reduce_window_sum":
            return math.prod(node.params["window_dimensions"])
        case "broadcast_in_dim" | "tile":
            return node.size // max(1, operands)
    return 1 if node.primitive in _ONE_TO_ONE else node.size


def terms_of_planes(node: Node) -> int:
    """The largest number of products that an element of a joint op's planes sums."""
    match node.primitive:
        case "mul" | "select_n":
            return 8
        case "dot_general":
            return 3 * _contracted(node) + 8
    return 8 + sum(math.prod(shape.shape) for shape in node.input_shapes)


def _overlap(node: Node) -> int:
    """The largest number of elements of a nonlinear node that an element of an operand reaches."""
    operands = min((math.prod(shape.shape) for shape in node.input_shapes), default=1)
    match node.primitive:
        case "reduce_window_max" | "reduce_window_min":
            return math.prod(node.params["window_dimensions"])
        case "dot_general":
            return node.size
        case "mul" | "select_n" | "max" | "min":
            return node.size // max(1, operands)
    return 1 if isinstance(node.op, (Scalar, Extremum)) else node.size


def _absolute(node: Node, values: list[Array]) -> Array:
    """The linear part of a node with the absolute values of its weights."""
    if isinstance(node.op, Weighted):
        return node.op.magnitude(node, *values)
    assert isinstance(node.op, Structural)
    signs = node.op.sign(node)
    return node.apply(
        *(v if s >= 0 else -v for s, v in zip(signs, values, strict=True)), constants=_no_numbers
    )


def _no_numbers(constant: Array) -> Array:
    """Replaces numbers by zeros; indices and predicates stay."""
    floating = jnp.issubdtype(jnp.result_type(constant), jnp.floating)
    return jnp.zeros_like(constant) if floating else constant

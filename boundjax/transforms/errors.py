"""Bounds what rounding may change: an error analysis that runs beside a walk.

A *computed network* is the traced graph in which every op is off by at most its own rounding. Real
arithmetic is one of them; so is every floating-point program that adds the terms of a product or a
sum in any order, with or without fused multiply-add, and keeps or flushes subnormal numbers. The
analysis bounds two things over a whole input set: how far computed networks are apart (under
`"float32"`; under `"real"` there is only the exact one), and what the walk that bounds them loses
by its own rounding. `outward` moves the lines of nonlinear ops by both, so that every error is
weighed by the actual coefficients of the rows.

With the unit `u` of the arithmetic, a sum of `n` products is off by at most `gamma(n)` times *the
sum of their absolute values*, in any order (`sets.rounding.Arithmetic`). The analysis charges:

* for a product with weights `W`: `gamma(n) |W| |v|` for the walk's reference value, once more for
  the network's program, with the largest `|v|` on the set; and `gamma(t) |W| |v - reference|` for
  coefficients, which the transposed product makes of `t` terms each. Terms that cancel inside one
  product are counted before they cancel;
* for sums: the same with everything that is added, as a program may begin a product with its bias;
* for a nonlinear op: its own error, the error of its lines, and their slopes times whatever the
  linear ops before it were charged.

* for a constant that is itself computed from weights: how far its exact value, and what a program
  computes, may be from the number in the graph. The bounds of its formula say so.

How many terms an op sums, and how accurate a function is, its entry in the table says. An op
without a stated error has no rigorous mode.

Not guaranteed:

* the accuracy of functions such as `exp`, which is stated and assumed for every runtime;
* that a device computes products as plain sums. CPUs do; a GPU's convolutions may go through
  transforms (Winograd, FFT) that round more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Joint, Scalar, Structural, Weighted, no_error
from boundjax.ir.node import Node, NoProofError, Perturbed
from boundjax.ops import accuracy_cases
from boundjax.ops.accuracy import EXACT, accuracy
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic, Rounding


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
      op_error: of a linear node, the rounding of its op alone.
      interval: of the values.
    """

    deviation: Array
    size: Array
    mass: Array
    loss: Array | None = None
    terms: int = 0
    charged: int = 0
    op_error: Array | float = 0.0
    interval: Interval | None = None


def _require_stated(node: Node) -> None:
    """Checks that somebody states how a node rounds, and what rounded constants change there.

    Raises:
      NoProofError: naming the op, also if this machine does not keep within what is stated.
    """
    op = node.op
    advice = "state error= in its entry in the table of ops, or take rounding='nearest'"
    joint = isinstance(op, Joint) and op.error is None and op.planes is not None
    if joint or (isinstance(op, Scalar) and accuracy(node) is None):
        raise NoProofError(
            f"nobody states how much '{node.primitive}' at {node.location} rounds; {advice}"
        )
    if isinstance(op, Scalar | Joint):
        accuracy_cases.require_kept(node)
    if not node.formulas:
        return
    numbers = all(
        jnp.issubdtype(jnp.result_type(node.constant(position)), jnp.floating)
        for position in node.formulas
    )
    stated = (
        isinstance(op, Structural)
        or (isinstance(op, Weighted) and op.change is not None)
        or (isinstance(op, Scalar) and accuracy(node) == EXACT)
        or (isinstance(op, Scalar) and all(op.change(node, k) for k in node.formulas))
    )
    if not (numbers and stated):
        raise NoProofError(
            f"nobody states what a rounded constant changes in '{node.primitive}' at "
            f"{node.location}; compute the constant beforehand, or take rounding='nearest'"
        )


class _Sum(NamedTuple):
    """A linear node whose interval has been computed, until its reference is: see `NodeErrors`."""

    loss: Array | float | None
    mass: Array
    terms: int
    charged: int
    op_error: Array | float


class ErrorAnalysis:
    """The errors of the nodes of one graph over one input set, in the order of the graph.

    Attributes:
      rounding: what bounds are to hold for.
      arithmetic: the floating-point format of the walk and of programs.
      errors: by the index of the node; floating-point nodes only.
      additions: number of terms that a row's constant sums, besides those of single nodes.
    """

    def __init__(
        self, nodes: Sequence[Node], rounding: Rounding, constants: Sequence[Interval] = ()
    ) -> None:
        """Begins the analysis of a graph's nodes; nothing is recorded yet.

        Args:
          nodes: of the graph.
          rounding: not `"nearest"`.
          constants: bounds on the nodes of `Graph.constants`.

        Raises:
          NoProofError: at the first op for which nobody states how it rounds.
        """
        assert rounding != "nearest", "nothing is charged for bounds that are not rounded"
        for node in nodes:
            _require_stated(node)
        self._constants = constants
        self.rounding: Rounding = rounding
        floating = [n.dtype for n in nodes if jnp.issubdtype(n.dtype, jnp.floating)]
        formats = [Arithmetic.of(dtype) for dtype in floating]
        self.arithmetic = max(formats, key=lambda arithmetic: arithmetic.unit)
        self.errors: dict[int, NodeErrors] = {}
        self.additions = sum(node.is_nonlinear for node in nodes) + 4
        # How often an error counts: for the walk, and for a program that it bounds.
        self._times = 2.0 if rounding == "float32" else 1.0
        self._sums: dict[int, _Sum] = {}
        self._elements: dict[int, int] = {}
        self._consumers = [0] * len(nodes)
        for node in nodes:
            for index in node.inputs:
                self._consumers[index] += 1
        self._later_terms = _later_terms(nodes)

    @property
    def more(self) -> float:
        """A factor on sums of positive numbers that are themselves rounded."""
        return 1.0 + 128.0 * self.arithmetic.unit

    @property
    def least_size(self) -> float:
        """Added to every size: a unit of this pays for operations on an element that underflow."""
        return 4.0 * self.arithmetic.underflow / self.arithmetic.unit

    @property
    def largest(self) -> float:
        """The largest magnitude of a value that has bounds, about 1e19 in float32.

        Beyond it, losses by underflow would have to be added up element by element.
        """
        return self.arithmetic.underflow**-0.5

    def outward(self, interval: Interval, by: Array | float = 0.0) -> Interval:
        """Moves both ends outward by `by` and by four units of their size."""
        share, least = 4.0 * self.arithmetic.unit, self.arithmetic.underflow

        def distance(end: Array) -> Array:
            return by * self.more + (share * jnp.where(jnp.isinf(end), 0.0, jnp.abs(end)) + least)

        return Interval(
            interval.lower - distance(interval.lower), interval.upper + distance(interval.upper)
        )

    def enclose(self, node: Node, interval: Interval) -> Interval:
        """An interval that holds the node's values in every computed network.

        Args:
          node: its operands have been recorded.
          interval: computed from the intervals that were recorded for them.
        """
        if isinstance(node.op, Weighted) and not node.op.diagonal:
            error, self._sums[node.index] = self._product(node)
            interval = self.outward(interval, error)
        elif node.is_linear:
            interval, self._sums[node.index] = self._sum(node, interval)
            interval = self._without_overflow(node, interval)
        elif isinstance(node.op, Scalar | Joint):
            size = jnp.maximum(jnp.abs(interval.lower), jnp.abs(interval.upper))
            error = self._op_error(node, size)
            if error is not None:
                # An entry that a mask holds at -inf is exact; one that overflows is unknown.
                exact = self._masked(node) & (interval.lower == interval.upper)
                exact = exact & (interval.lower == -jnp.inf)
                interval = self.outward(interval, jnp.where(exact, 0.0, error))
        return interval  # an extremum is exact, and a loop's interval has been enclosed already

    def _without_overflow(self, node: Node, interval: Interval) -> Interval:
        """An interval that is unknown where it is one infinity that no operand has."""
        ends = [a for a in node.constants if jnp.issubdtype(jnp.result_type(a), jnp.floating)]
        for index in node.inputs:
            operand = self.errors[index].interval if index in self.errors else None
            ends += [] if operand is None else list(operand)
        masks = functools.reduce(jnp.logical_or, [jnp.any(jnp.isinf(end)) for end in ends])
        overflows = (interval.lower == interval.upper) & jnp.isinf(interval.lower) & ~masks
        return Interval(
            jnp.where(overflows, -jnp.inf, interval.lower),
            jnp.where(overflows, jnp.inf, interval.upper),
        )

    def _masked(self, node: Node) -> Array:
        """The elements of a nonlinear node that an operand of its shape masks by -inf."""
        masked = jnp.zeros(node.shape, bool)
        for index in node.inputs:
            operand = self.errors[index].interval if index in self.errors else None
            if operand is not None and operand.lower.shape == node.shape:
                masked = masked | ((operand.lower == -jnp.inf) & (operand.upper == -jnp.inf))
        return masked

    def enclose_product(self, node: Node, operand: Interval, center: Array) -> Interval:
        """`enclose` for a product with weights, at the cost of one product with their magnitudes.

        Args:
          node: of a `Weighted` op that is not diagonal.
          operand: the interval of its operand, as recorded.
          center: the image of its middle.
        """
        op = node.op
        assert isinstance(op, Weighted)
        (index,) = node.inputs
        _, self._sums[node.index] = self._product(node)
        gamma = self.arithmetic.gamma(op.terms(node) + self._later_terms[node.index])
        radius = operand.radius + self._times * gamma * self.errors[index].size
        radius = op.magnitude(node, radius) * (1.0 + 2.0 * gamma) + self._flushed(op.terms(node))
        radius = radius + self._of_constants(node)
        return self.outward(Interval(center - radius, center + radius))

    def record(self, node: Node, interval: Interval, reference: Array) -> None:
        """Records the errors of a node, or those of the same node with a tighter interval.

        Args:
          node: the input, or a node whose interval `enclose` has seen.
          interval: holds its values in every computed network.
          reference: the walk's reference value of the node.
        """
        unit, earlier = self.arithmetic.unit, self.errors.get(node.index)
        # An infinite constant (a mask) is exact, and no coefficient reaches it.
        constant = (interval.lower == interval.upper) & jnp.isinf(interval.lower)
        lower, upper, reference = (jnp.where(constant, 0.0, a) for a in (*interval, reference))
        size = jnp.maximum(jnp.maximum(-lower, upper), jnp.abs(reference)) + self.least_size
        farthest = jnp.maximum(jnp.maximum(upper - reference, reference - lower), 0.0)
        # XLA may compute a reference several times, and its last digits then differ. That of the
        # input is the middle of a set whose middle is exact, unless it is tiny.
        again = 8.0 * unit * size if node.inputs else self.least_size
        deviation = farthest * (1.0 + 4.0 * unit) + again
        small = size <= self.largest
        size, deviation = (jnp.where(small, array, jnp.inf) for array in (size, deviation))
        if earlier is not None:
            self.errors[node.index] = earlier._replace(
                deviation=deviation, size=size, interval=interval
            )
            return
        self._elements[node.index] = node.size
        summed = self._sums.pop(node.index, None)
        if summed is None:
            self.errors[node.index] = NodeErrors(deviation, size, size, interval=interval)
            return
        loss = summed.loss
        loss = None if loss is None else loss * self.more + 4.0 * unit * size
        op_error = summed.op_error * self.more + 4.0 * unit * size
        self.errors[node.index] = NodeErrors(
            deviation, size, summed.mass, loss, summed.terms, summed.charged, op_error, interval
        )

    def of_rows(self, index: int, outputs: int) -> Array:
        """What a coefficient of 1 on a node loses if rows of this many coefficients begin there."""
        errors = self.errors[index]
        loss = self.arithmetic.gamma(outputs + self.additions) * errors.size
        return loss if errors.loss is None else loss + errors.loss

    def of_underflow(self, index: int) -> float:
        """What a row that starts at a node may lose because coefficients underflow on the way."""
        elements = sum(size for earlier, size in self._elements.items() if earlier <= index)
        return 3.0 * self._flushed(elements)

    def of_slopes(self, node: Node) -> list[Array | None]:
        """What a line of slope 1 loses, per operand of a nonlinear node; None for predicates."""
        assert node.op is not None
        terms = node.op.reach(node)
        losses: list[Array | None] = []
        for index in node.inputs:
            errors = self.errors.get(index)
            if errors is None:
                losses.append(None)
                continue
            loss = self.arithmetic.gamma(terms + self._consumers[index] + 4) * errors.deviation
            loss = loss + 16.0 * self.arithmetic.unit * errors.size
            losses.append(loss if errors.loss is None else loss + errors.loss)
        return losses

    def of_value(self, node: Node) -> Array:
        """What the value of a nonlinear node and lines of slope 0 lose."""
        size = self.errors[node.index].size
        error, rounded = self._op_error(node, size), 16.0 * self.arithmetic.unit * size
        return rounded if error is None else rounded + error

    def of_sum(self, node: Node) -> float:
        """The relative error of the sum of a row's intercepts at one nonlinear node."""
        return self.arithmetic.gamma(node.size + self.additions) + 8.0 * self.arithmetic.unit

    def _flushed(self, terms: int) -> float:
        """What a sum of products may lose because subnormal factors may be taken for 0.

        The other factors are at most `largest`, so no sum over them is needed.
        """
        return 2.0 * terms * self.arithmetic.underflow * (1.0 + self.largest)

    def _product(self, node: Node) -> tuple[Array, _Sum]:
        """The error and the losses of an op that sums products with weights."""
        op, gamma = node.op, self.arithmetic.gamma
        assert isinstance(op, Weighted)
        (index,) = node.inputs
        operand, terms = self.errors[index], op.terms(node)
        charged = terms + self._later_terms[node.index]
        # Whatever of these products nobody uses, XLA drops: mostly the first.
        exact = 1.0 + 2.0 * gamma(charged)  # of sums of positive products
        mass = op.magnitude(node, operand.size) * exact
        lost = gamma(op.reach(node) + self._consumers[index]) * operand.deviation
        lost = lost if operand.loss is None else lost + operand.loss
        loss = op.magnitude(node, lost + self._times * gamma(charged) * operand.size) * exact
        flushed = self._flushed(terms)
        changed = self._of_constants(node)
        error = self._times * gamma(charged) * mass + flushed + changed
        return error, _Sum(loss + flushed + changed, mass, terms, charged, error)

    def _sum(self, node: Node, interval: Interval) -> tuple[Interval, _Sum]:
        """The same of a linear op that moves numbers, adds them or scales each by a constant."""
        op, gamma = node.op, self.arithmetic.gamma
        assert isinstance(op, Structural | Weighted)
        operands = [self.errors[i] for i in node.inputs]
        several = max(self._consumers[i] for i in node.inputs)
        local, reach, scales = op.terms(node), op.reach(node), isinstance(op, Weighted)
        exact = 1.0 + 2.0 * gamma(local)
        constant: Array | float = 0.0
        if not scales:
            zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes]
            constant = jnp.abs(node.apply(*zeros))
            constant = jnp.where(jnp.isinf(constant), 0.0, constant)
        mass = absolute(node, [o.mass for o in operands]) * exact + constant
        loss: Array | float | None = None
        if any(o.loss is not None for o in operands):
            losses = [jnp.zeros_like(o.size) if o.loss is None else o.loss for o in operands]
            loss = absolute(node, losses) * exact
        if scales or reach > 1 or several > 1:
            rounded = gamma(reach + several) * absolute(node, [o.deviation for o in operands])
            loss = rounded * exact if loss is None else loss + rounded * exact
        charged = min(o.charged for o in operands)
        changed = self._of_constants(node)
        if not scales and local == 1:
            if not node.formulas:
                return interval, _Sum(loss, mass, max(o.terms for o in operands), charged, 0.0)
            loss = changed if loss is None else loss + changed
            terms = max(o.terms for o in operands)
            return self.outward(interval, changed), _Sum(loss, mass, terms, charged, changed)
        # A program that adds results may sum the terms of all of them at once.
        terms = local + sum(max(1, o.terms) for o in operands)
        if charged < terms:
            charged = terms + self._later_terms[node.index]
        error: Array | float = gamma(charged) * constant + self._flushed(terms)
        for position, operand in enumerate(operands):
            share = gamma(charged) - gamma(operand.charged) * (operand.charged > 0)
            if share <= 0.0:
                continue
            alone = [o.mass if k == position else 0.0 * o.size for k, o in enumerate(operands)]
            error = error + share * absolute(node, alone) * exact
        error = self._times * error + changed
        loss = error if loss is None else loss + error
        return self.outward(interval, error), _Sum(loss, mass, terms, charged, error)

    def _of_constants(self, node: Node) -> Array | float:
        """By how much a linear node's value may change because its constants are rounded."""
        if not node.formulas:
            return 0.0
        errors = {k: self._of_constant(node, k) for k in node.formulas}
        if isinstance(node.op, Weighted):
            assert node.op.change is not None, "`_require_stated` refuses ops without one"
            (index,) = node.inputs
            change = node.op.change(node, self.errors[index].size, errors)
            return change * (self.more + 2.0 * self.arithmetic.gamma(node.op.terms(node)))
        zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes]
        without_numbers = {
            k: _no_numbers(operand)
            for k, operand in enumerate(node.operands)
            if not isinstance(operand, Perturbed)
        }
        return jnp.abs(node.with_constants(without_numbers | errors).apply(*zeros)) * self.more

    def _of_constant(self, node: Node, position: int) -> Array:
        """How far exact and computed values of a constant may be from the number in the graph."""
        value, bounds = node.constant(position), self._constants[node.formulas[position]]
        fixed = (bounds.lower == value) & (bounds.upper == value)  # perhaps infinite
        error = jnp.maximum(bounds.upper - value, value - bounds.lower)
        error = jnp.where(fixed, 0.0, jnp.maximum(error, 0.0) * self.more)
        return jax.lax.stop_gradient(error)

    def _op_error(self, node: Node, size: Array) -> Array | None:
        """The error of a nonlinear op's value, of the walk and of a program together.

        Args:
          node: the node.
          size: the largest magnitude of its value.

        Returns:
          Infinite where no error is stated; None if the op is exact.
        """
        operands = [self.errors[i] for i in node.inputs if i in self.errors]
        stated = accuracy(node) if isinstance(node.op, Scalar) else None
        if stated == EXACT or (isinstance(node.op, Joint) and node.op.error is no_error):
            # A selection between its operands: it changes by no more than any of them.
            errors = [self._of_constant(node, k) for k in node.formulas]
            return functools.reduce(jnp.maximum, errors) if errors else None
        if isinstance(node.op, Scalar):
            assert stated is not None, "`_require_stated` refuses ops without a stated error"
            if not operands:
                return None
            (operand,) = operands
            assert operand.interval is not None
            # A program's value may be slightly larger than the exact ones.
            larger = size * (1.0 + 2.0**-10)
            error = stated.error(operand.size, larger, self.arithmetic)
            where = stated.holds(*operand.interval, larger, self.arithmetic)
            error = self._times * jnp.where(where, error, jnp.inf)
            for position in node.formulas:
                relative, fixed = node.op.change(node, position) or (jnp.inf, jnp.inf)
                weight = (relative * operand.size + fixed) * self.more
                error = error + self._of_constant(node, position) * weight
            return error
        if isinstance(node.op, Joint):
            assert node.op.error is not None, "`_require_stated` refuses ops without one"
            stated = node.op.error(node, [o.size for o in operands], self.arithmetic)
            return self._times * (stated.absolute + stated.relative * size)
        return None


def _later_terms(nodes: Sequence[Node]) -> list[int]:
    """How many terms the elementwise sums and scales after a node add to its sum, by its index.

    A product that is charged for them at once spares each of them the masses of the product, which
    take another product to compute: batch normalisation after a convolution has four of them.
    """
    later = [0] * len(nodes)
    for node in reversed(nodes):
        op = node.op
        if not isinstance(op, Structural | Weighted) or len(node.inputs) != 1:
            continue
        (index,) = node.inputs
        terms = op.terms(node)
        if isinstance(op, Structural) and terms == 1:
            terms = 0
        elif terms > 2 or (isinstance(op, Weighted) and not op.diagonal):
            continue
        later[index] = max(later[index], terms + later[node.index])
    return later


def absolute(node: Node, values: list[Array]) -> Array:
    """The linear part of a node with the absolute values of its weights, of one value each."""
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

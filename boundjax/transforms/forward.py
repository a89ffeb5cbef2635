"""Forward linear bounds: every node's value between two linear functions of the input.

The bounds of a node are `A_lower (x - m) + v_lower <= z <= A_upper (x - m) + v_upper`, where `m` is
the middle of the input set. A value passes every op once, with as many coefficients as the input
has elements (in the backward walk, with as many rows as there are units to bound), so forward
bounds are cheap for functions of few inputs. The rules are those of the backward walk in the other
direction: linear ops go by the sign of their weights, nonlinear ops by one line or plane on either
side. Because signs are resolved at every op instead of once at the end, these bounds are looser
than backward ones from the second nonlinear op on (Xu et al. 2020, "Automatic Perturbation
Analysis", section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import precision
from boundjax import slopes as slope_policies
from boundjax.ir.families import Planes, Structural, Weighted
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.numerics import signed_parts
from boundjax.ops import affine
from boundjax.sets.input_set import InputTree
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.slopes import Optimized, Slopes
from boundjax.transforms import backward
from boundjax.transforms import problem as problems
from boundjax.transforms.backward import LinearBounds
from boundjax.transforms.enclosures import (
    LinearEnclosure,
    LinearFunction,
    apply_planes,
    largest,
    planes_of,
    slack_of_linear,
    slack_of_planes,
)
from boundjax.transforms.errors import ErrorAnalysis
from boundjax.transforms.signatures import ArrayFunction, BoundsFunction, TreeFunction
from boundjax.transforms.walk import Walk
from boundjax.typing import PyTree
from boundjax.windows import dense


class Forward:
    """The walk of forward linear bounds beside the interval walk, a `walk.Companion`.

    Attributes:
      enclosures: the enclosure of every node by its index; booleans have none.
    """

    def __init__(self) -> None:
        self.enclosures: dict[int, LinearEnclosure] = {}
        self._concretized: frozenset[int] = frozenset()

    def advance(self, node: Node, walk: Walk) -> Interval:
        """The next node's bounds, intersected with those of the interval walk."""
        interval = walk.intervals[node.index]
        if not node.inputs:
            self._concretized = concretized(walk.graph)
            identity = LinearFunction(node.unit_rows(), walk.references[0])
            slack = None if walk.errors is None else jnp.zeros(node.shape, node.dtype)
            self.enclosures[node.index] = LinearEnclosure(identity, identity, slack)
            return interval
        operands = tuple(self.enclosures[i] for i in node.inputs if i in self.enclosures)
        if node.is_linear:
            enclosure = _through_linear(node, operands)
        else:
            planes = planes_of(node, walk.relaxations.relaxation(node))
            inputs = self.enclosures[0].lower.coefficients.shape[0]
            enclosure = _relaxed(node, planes, operands, inputs, interval)
            if walk.errors is not None:
                slack = slack_of_planes(node, planes, operands, walk.errors)
                enclosure = enclosure._replace(slack=slack)
        if walk.errors is not None and node.is_linear:
            enclosure = enclosure._replace(slack=slack_of_linear(node, operands, walk.errors))
        self.enclosures[node.index] = enclosure
        if node.index not in self._concretized:
            return interval
        bounds = enclosure.concretize(walk.input_set, walk.errors)
        return walk.intersect(interval, _finite_or(bounds, interval))


def concretized(graph: Graph) -> frozenset[int]:
    """The nodes whose bounds are used: operands of nonlinear ops, and outputs."""
    relaxed = {i for n in graph.nodes if n.is_nonlinear for i in n.inputs}
    outputs = {o.index for o in graph.outputs if isinstance(o, Perturbed)}
    return frozenset(relaxed | outputs)


def _finite_or(bounds: Interval, interval: Interval) -> Interval:
    """The finite ends of `bounds`, and elsewhere those of the interval walk, which may be NaN.

    An infinite line leaves `0 * inf` in the bounds, which says nothing about the value.
    """
    ends = zip(bounds, interval, strict=True)
    return Interval(*(jnp.where(jnp.isfinite(new), new, old) for new, old in ends))


# --- one rule per family --------------------------------------------------------------------------


def linear_part(node: Node, *rows: Array) -> Array:
    """A linear op without its constant terms: `[d, *shape]` per operand -> `[d, *node.shape]`.

    A `Structural` op adds its floating-point constants; the other constants are indices and
    predicates. Constants to be added are replaced by 0, because subtracting them afterwards would
    cost digits (all of them for a mask's -1e38). The value at 0 is then a parameter, a gather's
    fill value in elements without an operand, and is subtracted.
    """
    if isinstance(node.op, Weighted):
        return jax.vmap(node.apply)(*rows)

    def without_constants(*operands: Array) -> Array:
        return node.apply(*operands, constants=_zero_if_floating)

    zeros = (jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes)
    return jax.vmap(without_constants)(*rows) - without_constants(*zeros)[None]


def _zero_if_floating(constant: Array) -> Array:
    floating = jnp.issubdtype(jnp.result_type(constant), jnp.floating)
    return jnp.zeros_like(constant) if floating else constant


def _through_linear(node: Node, operands: tuple[LinearEnclosure, ...]) -> LinearEnclosure:
    if all(enclosure.exact for enclosure in operands):
        function = _mapped(node, [enclosure.lower for enclosure in operands])
        return LinearEnclosure(function, function)
    if isinstance(node.op, Structural):
        # A 0/1 matrix is monotone; a minus sign swaps the sides of that operand.
        signs = node.op.sign(node)
        sides = [
            enclosure.functions[::sign] for enclosure, sign in zip(operands, signs, strict=True)
        ]
        lowers, uppers = zip(*sides, strict=True)
        return LinearEnclosure(_mapped(node, lowers), _mapped(node, uppers))
    assert isinstance(node.op, Weighted), "linear ops are structural or weighted"
    (enclosure,) = operands
    if node.op.diagonal:
        positive = affine.rises(node)
        lower, upper = (_mapped(node, [function]) for function in enclosure.functions)
        return LinearEnclosure(_where(positive, lower, upper), _where(positive, upper, lower))
    center = _mapped(node, [_blend(enclosure, 0.5)])
    half = _blend(enclosure, -0.5)
    radius = LinearFunction(
        _absolute(node, half.coefficients, rows=True), _absolute(node, half.value)
    )
    return LinearEnclosure(_add(center, radius, -1.0), _add(center, radius, 1.0))


def _mapped(node: Node, operands: Sequence[LinearFunction]) -> LinearFunction:
    """Applies a linear op to one function per operand, each on the side that the result needs."""
    rows = linear_part(node, *(function.coefficients for function in operands))
    return LinearFunction(rows, node.apply(*(function.value for function in operands)))


def _absolute(node: Node, value: Array, rows: bool = False) -> Array:
    """The product of the absolute weights with a value, or with every row of an array of rows."""

    def product(value: Array) -> Array:
        return node.apply(value, constants=jnp.abs)

    return jax.vmap(product)(value) if rows else product(value)


def _blend(enclosure: LinearEnclosure, weight: float) -> LinearFunction:
    """`upper / 2 + weight lower`: half the sum (weight 0.5) or half the difference (-0.5)."""
    parts = zip(*enclosure.functions, strict=True)
    return LinearFunction(*(0.5 * high + weight * low for low, high in parts))


def _add(first: LinearFunction, second: LinearFunction, sign: float) -> LinearFunction:
    return LinearFunction(*(a + sign * b for a, b in zip(first, second, strict=True)))


def _where(mask: Array, first: LinearFunction, second: LinearFunction) -> LinearFunction:
    return LinearFunction(
        jnp.where(mask[None], first.coefficients, second.coefficients),
        jnp.where(mask, first.value, second.value),
    )


def _relaxed(
    node: Node,
    planes: Planes,
    operands: tuple[LinearEnclosure, ...],
    inputs: int,
    interval: Interval,
) -> LinearEnclosure:
    """Passes a nonlinear op: a positive weight takes the operand's function on the same side."""

    def side(
        weights: PyTree,
        offset: Array,
        same: Sequence[LinearFunction],
        opposite: Sequence[LinearFunction],
    ) -> LinearFunction:
        if not operands:  # a selection of constants
            rows = jnp.zeros((inputs, *node.shape), node.dtype)
            return LinearFunction(rows, planes.product(weights) + offset)
        negative = jax.tree.map(lambda w: signed_parts(w)[0], weights)
        positive = jax.tree.map(lambda w: signed_parts(w)[1], weights)
        parts = []
        for k in range(2):  # coefficients, value
            part = apply_planes(planes, positive, [f[k] for f in same], k == 0)
            parts.append(part + apply_planes(planes, negative, [f[k] for f in opposite], k == 0))
        return LinearFunction(parts[0], parts[1] + offset)

    lowers, uppers = ([o.functions[k] for o in operands] for k in range(2))
    lower = side(planes.lower_weights, planes.lower_offset, lowers, uppers)
    upper = side(planes.upper_weights, planes.upper_offset, uppers, lowers)
    return LinearEnclosure(_or_constant(lower, interval.lower), _or_constant(upper, interval.upper))


def _or_constant(function: LinearFunction, end: Array) -> LinearFunction:
    """The function, or the interval's end as a constant where the function is not finite."""
    finite = jnp.isfinite(function.value) & jnp.isfinite(function.coefficients).all(axis=0)
    constant = LinearFunction(jnp.zeros_like(function.coefficients), end)
    return _where(finite, function, constant)


# --- specifications -------------------------------------------------------------------------------


def _frontier(graph: Graph, starts: Mapping[int, Array]) -> dict[int, Array]:
    """A specification's rows at the nearest nonlinear nodes (or the input).

    Merging a specification with the affine layers before it is never looser than bounding the
    outputs first and combining them afterwards.
    """
    pending = dict(starts)
    for node in reversed(graph.nodes):
        if node.index not in pending or not node.is_linear:
            continue
        rows = pending.pop(node.index)
        for index, operand in zip(node.inputs, affine.pull_back(node, rows), strict=True):
            operand = dense(operand)
            pending[index] = pending[index] + operand if index in pending else operand
    return pending


def _contract(rows: Array, value: Array) -> Array:
    """`[m, *shape]` and `[..., *shape]` -> `[..., m]`."""
    flat = rows.reshape(rows.shape[0], -1)
    lead = value.shape[: value.ndim - rows.ndim + 1]
    return jnp.matmul(
        value.reshape(*lead, flat.shape[1]), flat.T, precision=precision.of_products()
    )


def _specified(
    walk: Walk, forward: Forward, starts: Mapping[int, Array], constant: Array
) -> LinearEnclosure:
    """Linear functions below and above every row of a specification; values `[m]`."""
    references = walk.references
    # Between the frontier and the specification everything is affine: deviations need no bias.
    constant = constant + sum(_contract(rows, references[i]) for i, rows in starts.items())
    inputs = forward.enclosures[0].lower.coefficients.shape[0]
    zero = LinearFunction(jnp.zeros((inputs, *constant.shape), constant.dtype), constant)
    lower = upper = zero
    for index, rows in _frontier(walk.graph, starts).items():
        enclosure = forward.enclosures[index]
        center = enclosure.lower if enclosure.exact else _blend(enclosure, 0.5)
        center = center._replace(value=center.value - references[index])
        middle = LinearFunction(*(_contract(rows, part) for part in center))
        lower, upper = _add(lower, middle, 1.0), _add(upper, middle, 1.0)
        if not enclosure.exact:
            half = _blend(enclosure, -0.5)
            radius = LinearFunction(*(_contract(jnp.abs(rows), part) for part in half))
            lower, upper = _add(lower, radius, -1.0), _add(upper, radius, 1.0)
    if walk.errors is None:
        return LinearEnclosure(lower, upper)
    return LinearEnclosure(lower, upper, _slack_of_rows(walk, walk.errors, forward, starts))


def _slack_of_rows(
    walk: Walk, errors: ErrorAnalysis, forward: Forward, starts: Mapping[int, Array]
) -> Array:
    """What rounding may do to the functions `[m]` around a specification."""
    losses = [backward.loss_at_start(rows, index, errors) for index, rows in starts.items()]
    slack = sum(losses[1:], losses[0])
    for index, rows in _frontier(walk.graph, starts).items():
        enclosure = forward.enclosures[index]
        assert enclosure.slack is not None, "a rounded enclosure has a slack"
        gamma = 3.0 * errors.arithmetic.gamma(enclosure.slack.size + errors.additions + 8)
        reference = walk.references[index]
        terms = largest(enclosure, errors) + jnp.where(jnp.isinf(reference), 0.0, abs(reference))
        # A coefficient of 0 meets no slack, even an infinite one.
        moved = jnp.minimum(enclosure.slack + gamma * terms, jnp.finfo(terms.dtype).max)
        slack = slack + _contract(jnp.abs(rows), moved) * (1.0 + 2.0 * gamma)
    return slack * errors.more


def _in_input(
    enclosure: LinearEnclosure, reference: Array, errors: ErrorAnalysis | None
) -> LinearBounds:
    """The functions `[m]` of the input itself instead of its deviation from the reference."""

    def side(function: LinearFunction, sign: float) -> tuple[Array, Array]:
        rows = function.coefficients.T
        bias = function.value - jnp.sum(rows * reference.reshape(1, -1), axis=1)
        if errors is not None:
            assert enclosure.slack is not None, "a rounded enclosure has a slack"
            gamma = 2.0 * errors.arithmetic.gamma(rows.shape[1] + 4)
            terms = jnp.sum(jnp.abs(rows * reference.reshape(1, -1)), axis=1)
            by = enclosure.slack + gamma * (terms + jnp.abs(function.value))
            bias = errors.outward(Interval(bias, bias), by)[sign > 0]
        return rows.reshape(rows.shape[0], *reference.shape), bias

    return LinearBounds(*side(enclosure.lower, -1.0), *side(enclosure.upper, 1.0))


def _flat(function: LinearFunction) -> LinearFunction:
    """The same function of a flattened value."""
    coefficients, value = function
    return LinearFunction(coefficients.reshape(coefficients.shape[0], -1), value.reshape(-1))


@overload
def forward_linear(
    function: ArrayFunction,
    *,
    slopes: Slopes = "adaptive",
    rounding: Rounding = "nearest",
    has_aux: Literal[False] = False,
) -> BoundsFunction[Interval, Interval]: ...


@overload
def forward_linear(
    function: TreeFunction,
    *,
    slopes: Slopes = "adaptive",
    rounding: Rounding = "nearest",
    has_aux: Literal[False] = False,
) -> BoundsFunction[Any, Interval]: ...


@overload
def forward_linear(
    function: TreeFunction,
    *,
    slopes: Slopes = "adaptive",
    rounding: Rounding = "nearest",
    has_aux: Literal[True],
) -> BoundsFunction[tuple[Interval, LinearBounds], tuple[Interval, LinearBounds]]: ...


def forward_linear(
    function: TreeFunction,
    *,
    slopes: Slopes = "adaptive",
    rounding: Rounding = "nearest",
    has_aux: bool = False,
) -> BoundsFunction[Any, Any]:
    """Turns a function of one example into a function from an input set to forward linear bounds.

    It is cheaper than `linear(..., intermediate="linear")` for functions of few inputs, because
    time and memory grow with the size of the input instead of the widths of the layers, and looser
    from the second nonlinear op on. Pre-activations are bounded by the same walk and intersected
    with interval bounds.

    Args:
      function: any JAX function of one array, or of one pytree of arrays; it may close over
        weights.
      slopes: as in `linear`, except `optimized`.
      rounding: what the bounds hold for, see `linear`.
      has_aux: also return the linear functions; needs a single output array.

    Returns:
      `bounds(input_set, specification=None)`: an `Interval` per output leaf, or bounds `[m]`
      on `<specification_k, f(x)>` for a specification `[m, *out]`, merged with the last affine
      layers. They are intersected with the interval bounds. With `has_aux` a pair of bounds and
      `LinearBounds`: coefficients `[m, *input]` and biases `[m]` of the specification's rows,
      or of the flattened output.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      NoProofError: at an op whose rounding nobody states, unless `rounding` is `"nearest"`.
      ValueError: for optimised slopes, or a specification that does not fit the output.

    Source: Xu et al. 2020, "Automatic Perturbation Analysis for Scalable Certified Robustness and
    Beyond" (forward mode LiRPA).
    """
    if isinstance(slopes, Optimized):
        raise ValueError("forward_linear takes no optimized slopes; linear(slopes=...) does")
    policy_of = slope_policies.resolve(slopes)

    def bounds(input_set: InputTree, specification: Array | None = None) -> Any:
        graph, input_set, inputs = problems.traced(function, input_set, rounding)
        if isinstance(slopes, Mapping):
            slope_policies.require_known(slopes, graph.nonlinear_labels)
        forward = Forward()
        walk = Walk(graph, input_set, policy_of, companion=forward, rounding=rounding)
        if specification is not None:
            starts, constant = problems.starts_of(graph, specification)
            enclosure = _specified(walk, forward, starts, constant)
            merged = walk.merged(starts, constant)
            result = _finite_or(enclosure.concretize(input_set, walk.errors), merged)
            result = walk.intersect(merged, result)
            if not has_aux:
                return result
            functions = _in_input(enclosure, walk.references[0], walk.errors)
            return result, functions.of_inputs(inputs)
        leaves = [
            walk.intervals[o.index] if isinstance(o, Perturbed) else Interval(o, o)
            for o in graph.outputs
        ]
        result = jax.tree.unflatten(graph.output_tree, leaves)
        if not has_aux:
            return result
        node = problems.node_of_output(graph)
        enclosure = forward.enclosures[node.index]
        slack = None if enclosure.slack is None else enclosure.slack.reshape(-1)
        enclosure = LinearEnclosure(_flat(enclosure.lower), _flat(enclosure.upper), slack)
        functions = _in_input(enclosure, walk.references[0], walk.errors)
        return result, functions.of_inputs(inputs)

    return bounds

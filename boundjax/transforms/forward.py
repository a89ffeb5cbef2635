"""Forward linear bounds: every node's value between two linear functions of the input.

Node by node `A_lower (x - m) + v_lower <= z <= A_upper (x - m) + v_upper`, with `m` the middle
of the input set. A value is passed once with as many coefficients as the input has elements (the
backward walk: as many rows as there are units to bound), so forward bounds are cheap for functions
of few inputs. The rules are those of the backward walk read the other way: linear ops by the sign
of their weights, nonlinear ops by one line or plane on either side. The signs are resolved at every
op and not once at the end, which is why these bounds are looser than backward ones from two
nonlinear ops on (Xu et al. 2020, "Automatic Perturbation Analysis", section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import precision
from boundjax import slopes as slope_policies
from boundjax.ir.families import Extremum, Lines, Planes, Structural, Weighted
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.numerics import signed_parts
from boundjax.ops import affine
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.slopes import Optimized
from boundjax.tracing.trace import trace
from boundjax.transforms import backward
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.backward import LinearBounds
from boundjax.transforms.walk import Walk
from boundjax.typing import PyTree


class Linear(NamedTuple):
    """`value + sum_i coefficients_i (x - m)_i`, a linear function of the flattened input.

    `coefficients` is `[d, *shape]` for an input of `d` elements, `value` `[*shape]`.
    """

    coefficients: Array
    value: Array

    def spread(self, input_set: InputSet, sign: float) -> Array:
        """`max sign <coefficients, x - m>` over the input set, `[*shape]`."""
        shape = input_set.interval().lower.shape
        columns = sign * self.coefficients.reshape(self.coefficients.shape[0], -1)
        found = jax.vmap(lambda c: input_set.spread(c.reshape(shape)), in_axes=1)(columns)
        return found.reshape(self.value.shape)


class Pair(NamedTuple):
    """A linear function below a value and one above; the same object before any relaxation."""

    lower: Linear
    upper: Linear

    @property
    def exact(self) -> bool:
        """Whether both are the value itself, known while tracing."""
        return self.lower is self.upper

    def concretize(self, input_set: InputSet) -> Interval:
        """The least and the largest value over the input set."""
        return Interval(
            self.lower.value - self.lower.spread(input_set, -1.0),
            self.upper.value + self.upper.spread(input_set, 1.0),
        )


class Forward:
    """The walk of forward linear bounds beside the interval walk, a `walk.Companion`.

    Attributes:
      pairs: per node index its two linear functions; none for booleans.
    """

    def __init__(self) -> None:
        self.pairs: dict[int, Pair] = {}
        self.wanted: frozenset[int] = frozenset()

    def advance(self, node: Node, walk: Walk) -> Interval:
        """The next node's bounds, intersected with those of the interval walk."""
        known = walk.intervals[node.index]
        if not node.inputs:
            self.wanted = concretized(walk.graph)
            rows = node.unit_rows()
            function = Linear(rows, walk.references[0])
            self.pairs[node.index] = Pair(function, function)
            return known
        operands = tuple(self.pairs[i] for i in node.inputs if i in self.pairs)
        if node.is_linear:
            self.pairs[node.index] = _through_linear(node, operands)
        else:
            relaxation = planes_of(node, walk.relaxations.relaxation(node))
            inputs = self.pairs[0].lower.coefficients.shape[0]
            self.pairs[node.index] = _relaxed(node, relaxation, operands, inputs, known)
        if node.index not in self.wanted:
            return known
        found = self.pairs[node.index].concretize(walk.input_set)
        return backward.intersect(known, _finite_or(found, known))


def concretized(graph: Graph) -> frozenset[int]:
    """The nodes whose bounds are used: operands of nonlinear ops, and outputs."""
    relaxed = {i for n in graph.nodes if n.is_nonlinear for i in n.inputs}
    outputs = {o.index for o in graph.outputs if isinstance(o, Perturbed)}
    return frozenset(relaxed | outputs)


def _finite_or(found: Interval, known: Interval) -> Interval:
    """Ends that are numbers; the interval walk's, which may be NaN, where they are not.

    An infinite line leaves `0 * inf` behind, which says nothing about the value.
    """
    ends = zip(found, known, strict=True)
    return Interval(*(jnp.where(jnp.isfinite(new), new, old) for new, old in ends))


# --- one rule per family --------------------------------------------------------------------------


def linear_part(node: Node, *rows: Array) -> Array:
    """A linear op without its constant terms: `[d, *shape]` per operand -> `[d, *node.shape]`.

    The floating-point constants of a `Structural` op are added, its others are indices and
    predicates. A constant is replaced by 0, as subtracting it again would cost digits (a mask's
    -1e38 all of them); what then is left of the value at 0 is a parameter, a gather's fill value,
    which stands where no operand does.
    """
    if isinstance(node.op, Weighted):
        return jax.vmap(node.apply)(*rows)

    def without(*operands: Array) -> Array:
        return node.apply(*operands, constants=_without)

    filled = without(*(jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes))
    return jax.vmap(without)(*rows) - filled[None]


def _without(constant: Array) -> Array:
    floating = jnp.issubdtype(jnp.result_type(constant), jnp.floating)
    return jnp.zeros_like(constant) if floating else constant


def _through_linear(node: Node, operands: tuple[Pair, ...]) -> Pair:
    if all(pair.exact for pair in operands):
        function = _mapped(node, [pair.lower for pair in operands])
        return Pair(function, function)
    if isinstance(node.op, Structural):
        # A 0/1 matrix is monotone; a minus sign swaps the sides of that operand.
        signs = node.op.sign(node)
        sides = [pair[::sign] for pair, sign in zip(operands, signs, strict=True)]
        return Pair(*(_mapped(node, list(side)) for side in zip(*sides, strict=True)))
    (pair,) = operands
    if node.op.diagonal:
        positive = affine.rises(node)
        lower, upper = (_mapped(node, [function]) for function in pair)
        return Pair(_where(positive, lower, upper), _where(positive, upper, lower))
    center = _mapped(node, [_blend(pair, 0.5)])
    half = _blend(pair, -0.5)
    radius = Linear(_absolute(node, half.coefficients, rows=True), _absolute(node, half.value))
    return Pair(_add(center, radius, -1.0), _add(center, radius, 1.0))


def _mapped(node: Node, operands: list[Linear]) -> Linear:
    """The op on linear functions, all of them on the side that its result is on."""
    rows = linear_part(node, *(function.coefficients for function in operands))
    return Linear(rows, node.apply(*(function.value for function in operands)))


def _absolute(node: Node, value: Array, rows: bool = False) -> Array:
    """The product with the absolute weights, of every row of an array that has rows."""

    def product(value: Array) -> Array:
        return node.apply(value, constants=jnp.abs)

    return jax.vmap(product)(value) if rows else product(value)


def _blend(pair: Pair, weight: float) -> Linear:
    """`upper / 2 + weight lower`: half of the sum or of the difference."""
    return Linear(*(0.5 * high + weight * low for low, high in zip(*pair, strict=True)))


def _add(first: Linear, second: Linear, sign: float) -> Linear:
    return Linear(*(a + sign * b for a, b in zip(first, second, strict=True)))


def _where(mask: Array, first: Linear, second: Linear) -> Linear:
    return Linear(
        jnp.where(mask[None], first.coefficients, second.coefficients),
        jnp.where(mask, first.value, second.value),
    )


def planes_of(node: Node, relaxation: Lines | Planes) -> Planes:
    """A shared relaxation as planes, without the leading axis; `product` grows with operands.

    Lines are planes of one operand, or of the entries of a window. Booleans are no operands.
    """
    if isinstance(relaxation, Planes):
        made = [jax.tree.map(lambda array: array[0], part) for part in relaxation[1:]]
        if relaxation.lower_weights is relaxation.upper_weights:
            made[2] = made[0]
        return Planes(relaxation.product, *made)
    slopes = [relaxation.lower_slope, relaxation.upper_slope]
    zero = jnp.zeros((1, *node.shape), node.dtype)
    offsets = [
        zero if offset is None else offset
        for offset in (relaxation.lower_intercept, relaxation.upper_intercept)
    ]
    if slopes[0] is None and slopes[1] is None:
        below = above = ()

        def product(weights: tuple[()], *operands: Array) -> Array:
            return zero[0]

    else:
        given = [slope for slope in slopes if slope is not None]
        below, above = (jnp.zeros_like(given[0][0]) if s is None else s[0] for s in slopes)

        def product(weights: Array, *operands: Array) -> Array:
            if isinstance(node.op, Extremum):
                return jnp.sum(weights * node.op.windows(node, *operands), axis=-1)
            (value,) = operands
            return weights * value

    return Planes(product, below, offsets[0][0], above, offsets[1][0])


def apply_planes(
    planes: Planes, weights: PyTree, operands: list[Array], rows: bool = False
) -> Array:
    """`product(weights, *operands)`, of every row of the operands where they have rows."""
    if rows and operands:
        return jax.vmap(lambda *values: planes.product(weights, *values))(*operands)
    return planes.product(weights, *operands)


def _relaxed(
    node: Node, planes: Planes, operands: tuple[Pair, ...], inputs: int, known: Interval
) -> Pair:
    """Through a nonlinear op: a positive weight takes the operand's function on its own side."""

    def side(weights: PyTree, offset: Array, own: list[Linear], other: list[Linear]) -> Linear:
        if not operands:  # a selection of constants
            rows = jnp.zeros((inputs, *node.shape), node.dtype)
            return Linear(rows, planes.product(weights) + offset)
        negative = jax.tree.map(lambda w: signed_parts(w)[0], weights)
        positive = jax.tree.map(lambda w: signed_parts(w)[1], weights)
        parts = []
        for k in range(2):  # coefficients, value
            part = apply_planes(planes, positive, [f[k] for f in own], k == 0)
            if own is not other:
                part = part + apply_planes(planes, negative, [f[k] for f in other], k == 0)
            parts.append(part)
        return Linear(parts[0], parts[1] + offset)

    lowers, uppers = ([pair[k] for pair in operands] for k in range(2))
    lower = side(planes.lower_weights, planes.lower_offset, lowers, uppers)
    upper = side(planes.upper_weights, planes.upper_offset, uppers, lowers)
    return Pair(_or_constant(lower, known.lower), _or_constant(upper, known.upper))


def _or_constant(function: Linear, end: Array) -> Linear:
    """The interval's end as a constant function where a line is infinite or no number."""
    finite = jnp.isfinite(function.value) & jnp.isfinite(function.coefficients).all(axis=0)
    return _where(finite, function, Linear(jnp.zeros_like(function.coefficients), end))


# --- specifications -------------------------------------------------------------------------------


def _frontier(graph: Graph, starts: dict[int, Array]) -> dict[int, Array]:
    """Rows at the nearest nonlinear nodes (or the input): a specification merged with its layers.

    Merging is never looser than bounding the outputs first and combining them then.
    """
    pending = dict(starts)
    for node in reversed(graph.nodes):
        if node.index not in pending or not node.is_linear:
            continue
        rows = pending.pop(node.index)
        for index, operand in zip(node.inputs, affine.pull_back(node, rows), strict=True):
            pending[index] = pending[index] + operand if index in pending else operand
    return pending


def _contract(rows: Array, value: Array) -> Array:
    """`[m, *shape]` and `[..., *shape]` -> `[..., m]`."""
    flat = rows.reshape(rows.shape[0], -1)
    lead = value.shape[: value.ndim - rows.ndim + 1]
    return jnp.matmul(
        value.reshape(*lead, flat.shape[1]), flat.T, precision=precision.of_products()
    )


def _specified(walk: Walk, forward: Forward, starts: dict[int, Array], constant: Array) -> Pair:
    """Linear functions below and above every row of a specification; values `[m]`."""
    references = walk.references
    # Between the frontier and the specification everything is affine: deviations need no bias.
    constant = constant + sum(_contract(rows, references[i]) for i, rows in starts.items())
    inputs = forward.pairs[0].lower.coefficients.shape[0]
    zero = Linear(jnp.zeros((inputs, *constant.shape), constant.dtype), constant)
    lower = upper = zero
    for index, rows in _frontier(walk.graph, starts).items():
        pair = forward.pairs[index]
        center = pair.lower if pair.exact else _blend(pair, 0.5)
        center = center._replace(value=center.value - references[index])
        middle = Linear(*(_contract(rows, part) for part in center))
        lower, upper = _add(lower, middle, 1.0), _add(upper, middle, 1.0)
        if not pair.exact:
            radius = Linear(*(_contract(jnp.abs(rows), part) for part in _blend(pair, -0.5)))
            lower, upper = _add(lower, radius, -1.0), _add(upper, radius, 1.0)
    return Pair(lower, upper)


def _in_input(pair: Pair, reference: Array) -> LinearBounds:
    """The functions `[m]` in the input itself instead of its deviation from the reference."""

    def side(function: Linear) -> tuple[Array, Array]:
        rows = function.coefficients.T
        bias = function.value - jnp.sum(rows * reference.reshape(1, -1), axis=1)
        return rows.reshape(rows.shape[0], *reference.shape), bias

    return LinearBounds(*side(pair.lower), *side(pair.upper))


def forward_linear(
    function: Callable[[Array], Any],
    *,
    slopes: slope_policies.Slopes = "adaptive",
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Turns a function of one example into one from an input set to forward linear bounds.

    Cheaper than `linear(..., intermediate="linear")` for functions of few inputs (time and memory
    grow with the input's size and not with the layers' widths), and looser from two nonlinear ops
    on. Pre-activations are bounded by the same walk and intersected with interval bounds.

    Args:
      function: any JAX function of one array; it may close over weights.
      slopes: as in `linear`, but for `optimized`.
      has_aux: also return the linear functions; needs a single output array.

    Returns:
      `bounds(input_set, specification=None)`: an `Interval` per output leaf, or bounds `[m]`
      on `<specification_k, f(x)>` for a specification `[m, *out]`, merged with the last affine
      layers. They are intersected with the interval bounds. With `has_aux` a pair of bounds and
      `LinearBounds`: coefficients `[m, *input]` and biases `[m]` of the specification's rows,
      or of the flattened output.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for optimised slopes, or a specification that does not fit the output.

    Source: Xu et al. 2020, "Automatic Perturbation Analysis for Scalable Certified Robustness and
    Beyond" (forward mode LiRPA).
    """
    if isinstance(slopes, Optimized):
        raise ValueError("forward_linear takes no optimized slopes; linear(slopes=...) does")
    policy_of = slope_policies.resolve(slopes)

    def bounds(input_set: InputSet, specification: Array | None = None) -> Any:
        graph = trace(function, intervals_of.example_of(input_set))
        if isinstance(slopes, Mapping):
            slope_policies.require_known(slopes, graph.nonlinear_labels)
        forward = Forward()
        walk = Walk(graph, input_set, policy_of, companion=forward)
        if specification is not None:
            starts, constant = intervals_of.starts_of(graph, specification)
            pair = _specified(walk, forward, starts, constant)
            merged = walk.merged(starts, constant)
            found = _finite_or(pair.concretize(input_set), merged)
            result = backward.intersect(merged, found)
            return (result, _in_input(pair, walk.references[0])) if has_aux else result
        leaves = [
            walk.intervals[o.index] if isinstance(o, Perturbed) else Interval(o, o)
            for o in graph.outputs
        ]
        result = jax.tree.unflatten(graph.output_tree, leaves)
        if not has_aux:
            return result
        if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Perturbed):
            raise ValueError("has_aux needs a function with one output array")
        flat = Pair(
            *(
                Linear(f.coefficients.reshape(f.coefficients.shape[0], -1), f.value.reshape(-1))
                for f in forward.pairs[graph.outputs[0].index]
            )
        )
        return result, _in_input(flat, walk.references[0])

    return bounds

"""Ball and box: a center, an l2 radius and an interval, carried through the network together.

Every linear op multiplies the radius by its spectral norm, every nonlinear op by its largest slope.
The box is propagated as an interval and cut with the box around the ball, whose half-widths after a
linear op are the radius times the l2 norms of its rows. Linear functions of the output are bounded
exactly over the intersection of the last ball and box (BCP; Lee, Lee and Park 2020,
"Lipschitz-Certifiable Training with a Tight Outer Bound"). Without the box, the bound is that of
Lipschitz-margin training (LMT; Tsuzuku et al. 2018).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from boundjax.ir.families import Extremum, Joint, Lines, Scalar
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.numerics import length, quick_larger, quick_smaller
from boundjax.ops import norms as norms_of
from boundjax.sets.ball_box import BallBox
from boundjax.sets.input_set import InputSet, InputTree, enclosing_ball
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic, Rounding
from boundjax.tracing.trace import trace
from boundjax.transforms import backward, constants
from boundjax.transforms import interval as intervals_of
from boundjax.transforms import problem as problems
from boundjax.transforms.ball_bounds import BallBoxBounds, length_above
from boundjax.transforms.balls import CutBalls, cut
from boundjax.transforms.errors import ErrorAnalysis
from boundjax.transforms.signatures import ArrayFunction, BoundsFunction, TreeFunction
from boundjax.windows import Rows, dense

# Spectral norms by the label of their layer.
Norms: TypeAlias = Mapping[str, Float[Array, ""]]


class LipschitzAuxiliary(NamedTuple):
    """Intermediate results that `lipschitz(..., has_aux=True)` returns.

    Attributes:
      output: bounds on the function's output; its `center` is the output at the input's center.
      pre_activations: label -> bounds on the input of the nonlinear op.
    """

    output: BallBox
    pre_activations: dict[str, BallBox]


@overload
def lipschitz(
    function: ArrayFunction,
    *,
    box: bool = True,
    norms: Norms | None = None,
    rounding: Rounding = "nearest",
    has_aux: Literal[False] = False,
) -> BoundsFunction[BallBox, Interval]: ...


@overload
def lipschitz(
    function: TreeFunction,
    *,
    box: bool = True,
    norms: Norms | None = None,
    rounding: Rounding = "nearest",
    has_aux: Literal[False] = False,
) -> BoundsFunction[Any, Interval]: ...


@overload
def lipschitz(
    function: TreeFunction,
    *,
    box: bool = True,
    norms: Norms | None = None,
    rounding: Rounding = "nearest",
    has_aux: Literal[True],
) -> BoundsFunction[tuple[BallBox, LipschitzAuxiliary], tuple[Interval, LipschitzAuxiliary]]: ...


def lipschitz(
    function: TreeFunction,
    *,
    box: bool = True,
    norms: Norms | None = None,
    rounding: Rounding = "nearest",
    has_aux: bool = False,
) -> BoundsFunction[Any, Any]:
    """Turns a function of one example into a function from an input set to l2 balls and boxes.

    Args:
      function: any JAX function of one array, or of one pytree of arrays; it may close over
        weights.
      box: whether to carry a box beside the ball (BCP); without it the bounds are those of
        Lipschitz constants alone (LMT).
      norms: spectral norms of the linear layers by label, as `power_iteration` estimates them
        in training. Unless they are upper bounds, the result proves nothing. The default is
        `spectral_norms`, and `certify` uses no others.
      rounding: what the bounds hold for, see `linear`.
      has_aux: also return `LipschitzAuxiliary`; needs a single output array.

    Returns:
      `bounds(input_set, specification=None)`: a `BallBox` per output leaf, or an `Interval`
      `[m]` on `<specification_k, f(x)>` for a specification `[m, *out]`, which is exact for
      the ball and the box of the last nonlinear ops. Any input set is allowed: the ball encloses
      it, the box is its interval. With `has_aux` a pair.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for a specification that does not fit the output, a layer without units, or norms
        that do not match the function's layers; without the box also at an op that has no Lipschitz
        constant (a product of perturbed values).
    """

    def bounds(input_set: InputTree, specification: Array | None = None) -> Any:
        graph, input_set, _ = problems.traced(function, input_set, rounding)
        errors = intervals_of.analysis_of(graph, rounding)
        sizes = _spectral_bounds(graph) if norms is None else _checked(graph, norms)
        nodes = _walk(graph, input_set, sizes, box, errors)
        if specification is None:
            leaves = [
                nodes[o.index].as_set() if isinstance(o, Perturbed) else _point(o)
                for o in graph.outputs
            ]
            result = jax.tree.unflatten(graph.output_tree, leaves)
        else:
            result = _specification(graph, input_set, nodes, specification, errors)
        if not has_aux:
            return result
        output = nodes[problems.node_of_output(graph).index].as_set()
        pre_activations = {
            node.label: nodes[node.inputs[0]].as_set()
            for node in graph.nodes
            if node.is_nonlinear
            and len(node.inputs) == 1
            and jnp.issubdtype(node.input_shapes[0].dtype, jnp.floating)
        }
        return result, LipschitzAuxiliary(output, pre_activations)

    return bounds


def spectral_norms(
    function: TreeFunction, example: Array | jax.ShapeDtypeStruct | InputTree
) -> dict[str, Float[Array, ""]]:
    """Provable upper bounds on the spectral norms of a function's linear layers, by label.

    Args:
      function: any JAX function of one array, or of a pytree.
      example: an input, or a `jax.ShapeDtypeStruct`; for a function of a pytree its input sets.

    Returns:
      `{label: scalar}`; NaN for weights that are not finite.
    """
    return _spectral_bounds(_graph_at(function, example))


def power_vectors(
    function: TreeFunction, example: Array | jax.ShapeDtypeStruct | InputTree, key: Array
) -> dict[str, Float[Array, " ..."]]:
    """Random unit vectors to start `power_iteration` with, one per linear layer.

    Args:
      function: any JAX function of one array, or of a pytree.
      example: an input, or a `jax.ShapeDtypeStruct`; for a function of a pytree its input sets.
      key: PRNG key.
    """
    layers = _layers(_graph_at(function, example))
    vectors = {}
    for node, part in zip(layers, jax.random.split(key, max(1, len(layers))), strict=False):
        (shape,) = node.input_shapes
        vector = jax.random.normal(part, shape.shape, shape.dtype)
        vectors[node.label] = vector / length(vector)
    return vectors


def power_iteration(
    function: TreeFunction,
    example: Array | jax.ShapeDtypeStruct | InputTree,
    vectors: Mapping[str, Float[Array, " ..."]],
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, " ..."]]]:
    """One power iteration on every linear layer and its transpose.

    It approaches the norms from *below*, for training; a certificate needs `spectral_norms`.

    Args:
      function: any JAX function of one array, or of a pytree.
      example: an input, or a `jax.ShapeDtypeStruct`; for a function of a pytree its input sets.
      vectors: those of the previous iteration, or `power_vectors`.

    Returns:
      Norms and vectors by label. The norms are differentiable in the weights.

    Raises:
      ValueError: if the vectors do not match the function's layers.
    """
    graph = _graph_at(function, example)
    _checked(graph, vectors)
    steps = {n.label: norms_of.power_step(n, vectors[n.label]) for n in _layers(graph)}
    return {k: v[0] for k, v in steps.items()}, {k: v[1] for k, v in steps.items()}


def global_lipschitz(
    function: ArrayFunction,
    example: Array | jax.ShapeDtypeStruct | InputTree,
    norms: Norms | None = None,
) -> Float[Array, ""]:
    """A Lipschitz constant of a function between l2 norms, valid everywhere.

    Args:
      function: any JAX function of one array, or of a pytree, with one output array.
      example: an input, or a `jax.ShapeDtypeStruct`; for a function of a pytree its input sets.
      norms: see `lipschitz`; provable upper bounds by default.

    Returns:
      A scalar `L` with `||f(x) - f(y)||_2 <= L ||x - y||_2` for all `x`, `y`.

    Raises:
      ValueError: at an op without a Lipschitz constant (`exp`, a product of perturbed values).
    """
    graph = _graph_at(function, example)
    sizes = _spectral_bounds(graph) if norms is None else _checked(graph, norms)
    if len(graph.outputs) != 1:
        raise ValueError(f"a Lipschitz constant needs one output array, got {len(graph.outputs)}")
    radii = [jnp.ones((), graph.nodes[0].dtype)]
    for node in graph.nodes[1:]:
        operands = [radii[i] for i in node.inputs]
        together = constants.together(graph.nodes, node)
        if together is not None:
            source, constant = together
            radii.append(constant * radii[source])
        elif isinstance(node.op, Scalar):
            ends = jnp.full(node.shape, jnp.inf, node.dtype)
            radii.append(jnp.max(node.op.lipschitz(node, -ends, ends)) * operands[0])
        elif isinstance(node.op, Joint):
            radius = constants.joint_radius(node, operands)
            radii.append(jnp.full_like(radii[0], jnp.inf) if radius is None else radius)
        else:
            radii.append(constants.radius(node, operands, sizes))
    (output,) = graph.outputs
    if not isinstance(output, Perturbed):
        return jnp.zeros((), radii[0].dtype)
    if constants.is_unbounded(radii[output.index]):
        raise ValueError(
            constants.without_constant(constants.first_unbounded(graph, radii, output.index))
        )
    return radii[output.index]


def _walk(
    graph: Graph,
    input_set: InputSet,
    norms: Norms,
    box: bool,
    errors: ErrorAnalysis | None,
) -> list[BallBoxBounds]:
    """Ball and box of every node, in order."""
    center, radius = enclosing_ball(input_set)
    start = None
    if box:
        lower, upper = input_set.interval()
        # The center may lie outside the clip range; extend the box to it.
        start = Interval(quick_smaller(lower, center), quick_larger(upper, center))
    nodes = [BallBoxBounds(center, radius, start)]
    cuts = CutBalls(input_set, errors is not None)
    if errors is not None:
        errors.record(graph.nodes[0], nodes[0].around(errors.arithmetic), center)
    for node in graph.nodes[1:]:
        operands = [nodes[i] for i in node.inputs]
        if 0 in node.inputs:
            part = nodes[0]._replace(radius=cuts.radius_at(node, radius))
            operands = [part if i == 0 else nodes[i] for i in node.inputs]
        together = constants.together(graph.nodes, node)
        least = None if together is None else together[1] * nodes[together[0]].radius
        bounds = _advance(node, tuple(operands), norms, box, errors, least)
        if errors is not None and jnp.issubdtype(node.dtype, jnp.floating):
            errors.record(node, bounds.around(errors.arithmetic), bounds.center)
        nodes.append(bounds)
    return nodes


def _advance(
    node: Node,
    operands: tuple[BallBoxBounds, ...],
    norms: Norms,
    with_box: bool,
    errors: ErrorAnalysis | None,
    least: Array | None,
) -> BallBoxBounds:
    """The ball and the box of a node's value, from those of its operands.

    `least` is another radius of the ball, if one is known.

    The box need not be cut with the box around the new ball: a row of a matrix is no longer than
    its spectral norm, and no element's slope exceeds the largest one.
    """
    center = node.apply(*(o.center for o in operands))
    bounds = _advance_exactly(node, operands, norms, with_box, errors, center)
    if least is not None:
        least = least if errors is None else least * (1.0 + 64.0 * errors.arithmetic.unit)
        bounds = bounds._replace(radius=jnp.minimum(bounds.radius, least))
    if errors is None or not jnp.issubdtype(node.dtype, jnp.floating):
        return bounds
    # How far the center and a program's value may lie from the exact ones.
    exact = bounds.around(errors.arithmetic)
    enclosing = errors.enclose(node, exact)
    moved = jnp.maximum(enclosing.upper - exact.upper, exact.lower - enclosing.lower)
    moved = jnp.where(jnp.isinf(center), 0.0, moved)  # a mask's constant is exact
    radius = (bounds.radius + length_above(moved, errors.arithmetic)) * errors.more
    return BallBoxBounds(center, radius, None if bounds.box is None else enclosing)


def _advance_exactly(
    node: Node,
    operands: tuple[BallBoxBounds, ...],
    norms: Norms,
    with_box: bool,
    errors: ErrorAnalysis | None,
    center: Array,
) -> BallBoxBounds:
    """`_advance` around a center, before anything is charged for the rounding of values.

    With an error analysis the radius is rounded up, and the box contains what the walk's own
    intervals contain.
    """
    arithmetic = None if errors is None else errors.arithmetic
    radii = [o.radius for o in operands]
    intervals = tuple(o.interval() for o in operands)
    rounding = "nearest" if errors is None else errors.rounding
    box = intervals_of.propagate(node, intervals, rounding=rounding) if with_box else None
    if not jnp.issubdtype(node.dtype, jnp.floating):  # a predicate
        if box is None:
            raise ValueError(constants.without_constant(node))
        return BallBoxBounds(center, jnp.full_like(radii[0], jnp.inf), box)
    if node.is_linear or isinstance(node.op, Extremum):
        radius = constants.radius(node, radii, norms)
        if arithmetic is not None:
            radius = radius * (1.0 + _relative_error(node, arithmetic))
            if isinstance(node.op, Extremum):  # small squares underflow
                radius = radius + math.sqrt(16.0 * node.op.reach(node) * arithmetic.underflow)
        if box is not None and node.is_linear:
            box = cut(node, box, center, radii, arithmetic)
        return BallBoxBounds(center, radius, box)
    if isinstance(node.op, Scalar):
        slope = jnp.max(node.op.lipschitz(node, *intervals[0]))
        if arithmetic is not None and not node.op.pieces:
            # Formulas of slopes take differences of numbers up to 1 and up to the slope.
            slope = slope + 64.0 * arithmetic.unit * (1.0 + slope)
        # If the operand or the op is constant, the radius is 0, even where the other factor is
        # infinite (the radius of a predicate, the slope of a step).
        constant = (radii[0] == 0) | (slope == 0)
        radius = jnp.where(constant, 0.0, slope * radii[0])
        if node.op.pieces and not node.op.jumps:
            return BallBoxBounds(center, radius, box)
    else:
        joint = constants.joint_radius(node, radii) if isinstance(node.op, Joint) else None
        if joint is None and box is None:
            raise ValueError(constants.without_constant(node))
        # A function without a known slope still has a known range.
        radius = jnp.asarray(jnp.inf, node.dtype) if joint is None else joint
        if arithmetic is not None:
            radius = radius * (1.0 + 64.0 * arithmetic.unit)
    if box is not None:
        # Slopes may be large or unbounded, but no value is further away than a corner of the box.
        fixed = box.lower == box.upper  # perhaps a mask's -inf
        ends = (jnp.where(fixed, 0.0, end - jnp.where(fixed, 0.0, center)) for end in box)
        corner = quick_larger(*(jnp.abs(end) for end in ends))
        distance = length(corner) if arithmetic is None else length_above(corner, arithmetic)
        radius = jnp.minimum(radius, distance)
    return BallBoxBounds(center, radius, box)


def _relative_error(node: Node, arithmetic: Arithmetic) -> float:
    """By how much the computed norm of a linear op or an extremum may be too small."""
    assert node.op is not None
    terms = node.op.terms(node) + node.op.reach(node) + 32
    if not norms_of.has_spectrum(node.op):
        return 2.0 * arithmetic.gamma(terms)
    return norms_of.relative_error(node, arithmetic)


def _specification(
    graph: Graph,
    input_set: InputSet,
    nodes: list[BallBoxBounds],
    specification: Array,
    errors: ErrorAnalysis | None,
) -> Interval:
    """Bounds `[m]`: rows pulled back to the last nonlinear ops, and their exact extrema there."""
    starts, constant = problems.starts_of(graph, specification)
    stops: dict[int, Array] = {}

    def stop(node: Node, rows: Rows) -> Lines:
        stops[node.index] = dense(rows)
        zero = jnp.zeros((1, *node.shape), node.dtype)
        return Lines(None, zero, None, zero)

    centers = [node.center for node in nodes]
    below = backward.pull_back(graph, centers, starts, stop, "lower").below
    assert below is not None, "the lower side was asked for"
    value = below.constant + constant
    arithmetic = None if errors is None else errors.arithmetic
    loss: Array | float = 0.0
    if errors is not None:
        losses = [backward.loss_at_start(rows, index, errors) for index, rows in starts.items()]
        loss = sum(losses[1:], losses[0])
    ends = []
    for sign in (-1.0, 1.0):
        reach = jnp.zeros_like(value)
        for index, rows in stops.items():
            spread = functools.partial(nodes[index].spread, arithmetic=arithmetic)
            reach = reach + jax.vmap(spread)(sign * rows)
        if _meets_input(graph, starts):
            rows = sign * dense(below.coefficients)
            offset = (input_set.interval().middle - centers[0])[None]
            axes = tuple(range(1, rows.ndim))
            shift = jnp.sum(rows * offset, axis=axes)
            if arithmetic is not None:
                terms = jnp.sum(jnp.abs(rows * offset), axis=axes)
                shift = shift + 2.0 * arithmetic.gamma(rows[0].size + 4) * terms
            reach = reach + jax.vmap(input_set.spread)(rows) + shift
        if errors is not None:
            # Sums of a few numbers, whose errors are relative to their sizes.
            size = jnp.abs(value) + jnp.abs(reach) + loss
            reach = reach + loss + 8.0 * (len(stops) + 2) * errors.arithmetic.unit * size
        ends.append(value + sign * reach)
    # A NaN on one side is one on the other as well, because `spread` reads all of its arguments. So
    # the ends need no comparison, and the upper end costs nothing where only the lower one is used.
    return Interval(*ends)


def _meets_input(graph: Graph, starts: Iterable[int]) -> bool:
    """Whether rows at these nodes reach the input through linear ops alone."""
    stack = list(starts)
    while stack:
        node = graph.nodes[stack.pop()]
        if node.index == 0:
            return True
        if node.is_linear:
            stack.extend(node.inputs)
    return False


def _point(output: Array) -> BallBox:
    """The bounds of an output that does not depend on the input."""
    output = jnp.asarray(output)
    return BallBox(output, jnp.zeros(()), output, output)


def _graph_at(function: TreeFunction, example: Array | jax.ShapeDtypeStruct | InputTree) -> Graph:
    """The graph of a function of arrays like this one, or of a pytree of input sets."""
    if isinstance(example, (Array, np.ndarray, jax.ShapeDtypeStruct)):
        return trace(function, jnp.zeros(example.shape, example.dtype))
    return problems.traced(function, example, "nearest").graph


def _layers(graph: Graph) -> list[Node]:
    """The linear layers: ops whose spectral norm takes work to compute."""
    empty = next((node for node in graph.nodes if not node.size), None)
    if empty is not None:
        raise ValueError(
            f"no l2 bounds for a layer without units: '{empty.primitive}' at {empty.location} "
            f"has shape {empty.shape}"
        )
    return [node for node in graph.nodes if norms_of.has_spectrum(node.op)]


def _spectral_bounds(graph: Graph) -> dict[str, Array]:
    return {node.label: norms_of.spectral_bound(node) for node in _layers(graph)}


def _checked(graph: Graph, by_label: Mapping[str, Array]) -> Mapping[str, Array]:
    labels = {node.label for node in _layers(graph)}
    if labels != set(by_label):
        raise ValueError(
            f"expected one entry per linear layer ({', '.join(sorted(labels))}), "
            f"got {', '.join(sorted(by_label)) or 'none'}"
        )
    return by_label

"""Ball and box: a centre, an l2 radius and an interval, carried through the network together.

The ball grows by the spectral norm of every linear op and by the largest slope of every nonlinear
one; the box is propagated as an interval and cut with the box around the ball, whose half-widths
after a linear op are the radius times the l2 norms of its rows. At the end linear functions of the
output are bounded over the intersection of the last ball and box, exactly (BCP; Lee, Lee and Park
2020, "Lipschitz-Certifiable Training with a Tight Outer Bound"). Without the box that is
Lipschitz-margin training's bound (LMT; Tsuzuku et al. 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.families import Extremum, Lines, Scalar
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.numerics import length, quick_larger, quick_smaller, root
from boundjax.ops import norms as norms_of
from boundjax.sets import ball_box
from boundjax.sets.ball_box import BallBox
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.tracing.trace import trace
from boundjax.transforms import backward
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.balls import cut, enclosing_ball
from boundjax.windows import Rows, dense

# Spectral norms by the label of their layer.
Norms = Mapping[str, Array]


class Reached(NamedTuple):
    """What is known of a value: within `radius` of the centre in l2, and within the box.

    A `BallBox` that is not checked, and may be of predicates. A box of `None` is all there is.
    """

    center: Array
    radius: Array
    box: Interval | None

    def interval(self) -> Interval:
        """The box, which lies in the box around the ball; or that."""
        if self.box is None:
            return Interval(self.center - self.radius, self.center + self.radius)
        return self.box

    def as_set(self) -> BallBox:
        """The same as a set.

        Raises:
          ValueError: for a predicate.
        """
        if not jnp.issubdtype(self.center.dtype, jnp.floating):
            raise ValueError(f"l2 bounds are of floating-point values, got {self.center.dtype}")
        ends = jnp.full(self.center.shape, jnp.inf, self.center.dtype)
        lower, upper = (-ends, ends) if self.box is None else self.box
        # Rounding may have left the centre outside, and what does not meet is empty.
        return BallBox(
            self.center,
            self.radius,
            quick_smaller(lower, self.center),
            quick_larger(upper, self.center),
        )

    def spread(self, coefficients: Array) -> Array:
        """`max <c, x - center>`, a scalar."""
        if self.box is None:
            return self.radius * length(coefficients)
        below, above = self.center - self.box.lower, self.box.upper - self.center
        return ball_box.spread(coefficients, self.radius, below, above)


class Auxiliary(NamedTuple):
    """What `lipschitz(..., has_aux=True)` met on the way.

    Attributes:
      output: bounds on the function's output; its `center` is the output itself.
      pre_activations: label -> bounds on the input of the nonlinear op.
    """

    output: BallBox
    pre_activations: dict[str, BallBox]


def lipschitz(
    function: Callable[[Array], Any],
    *,
    box: bool = True,
    norms: Norms | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Turns a function of one example into one from an input set to l2 balls and boxes.

    Args:
      function: any JAX function of one array; it may close over weights.
      box: whether a box is carried beside the ball (BCP); without it the bounds are those of
        Lipschitz constants alone (LMT).
      norms: spectral norms of the linear layers by label, as `power_iteration` estimates them
        in training. Bounds from anything but upper bounds prove nothing: by default they are
        `spectral_norms`, and `certify` uses no others.
      has_aux: also return `Auxiliary`; needs a single output array.

    Returns:
      `bounds(input_set, specification=None)`: a `BallBox` per output leaf, or an `Interval`
      `[m]` on `<specification_k, f(x)>` for a specification `[m, *out]`, which is exact for
      the ball and the box of the last nonlinear ops. Every input set serves; one that is no l2
      ball is first enclosed in one, and its box is its own. With `has_aux` a pair.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for a specification that does not fit the output, a layer without units, norms
        of other layers than the function has; without the box at an op that has no Lipschitz
        constant (a product of perturbed values).
    """

    def bounds(input_set: InputSet, specification: Array | None = None) -> Any:
        graph = trace(function, intervals_of.example_of(input_set))
        sizes = _spectral_bounds(graph) if norms is None else _checked(graph, norms)
        reached = _walk(graph, input_set, sizes, box)
        if specification is None:
            leaves = [
                reached[o.index].as_set() if isinstance(o, Perturbed) else _fixed(o)
                for o in graph.outputs
            ]
            result = jax.tree.unflatten(graph.output_tree, leaves)
        else:
            result = _specification(graph, input_set, reached, specification)
        if not has_aux:
            return result
        if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Perturbed):
            raise ValueError("has_aux needs a function with one output array")
        met = {
            node.label: reached[node.inputs[0]].as_set()
            for node in graph.nodes
            if node.is_nonlinear
            and len(node.inputs) == 1
            and jnp.issubdtype(node.input_shapes[0].dtype, jnp.floating)
        }
        return result, Auxiliary(reached[graph.outputs[0].index].as_set(), met)

    return bounds


def spectral_norms(function: Callable[[Array], Any], example: Array) -> dict[str, Array]:
    """Provable upper bounds on the spectral norms of a function's linear layers, by label.

    Args:
      function: any JAX function of one array.
      example: an input, or a `jax.ShapeDtypeStruct`.

    Returns:
      `{label: scalar}`; NaN for weights that are not finite.
    """
    return _spectral_bounds(trace(function, _zeros(example)))


def power_vectors(function: Callable[[Array], Any], example: Array, key: Array) -> dict[str, Array]:
    """Random unit vectors to start `power_iteration` with, one per linear layer.

    Args:
      function: any JAX function of one array.
      example: an input, or a `jax.ShapeDtypeStruct`.
      key: PRNG key.
    """
    layers = _layers(trace(function, _zeros(example)))
    found = {}
    for node, part in zip(layers, jax.random.split(key, max(1, len(layers))), strict=False):
        (shape,) = node.input_shapes
        vector = jax.random.normal(part, shape.shape, shape.dtype)
        found[node.label] = vector / length(vector)
    return found


def power_iteration(
    function: Callable[[Array], Any], example: Array, vectors: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One power iteration on every linear layer and its transpose.

    Estimates from *below*, for training: a certificate needs `spectral_norms`.

    Args:
      function: any JAX function of one array.
      example: an input, or a `jax.ShapeDtypeStruct`.
      vectors: of the last iteration, or `power_vectors`.

    Returns:
      Norms and vectors by label. The norms are differentiable in the weights.

    Raises:
      ValueError: for vectors of other layers than the function has.
    """
    graph = trace(function, _zeros(example))
    _checked(graph, vectors)
    found = {n.label: norms_of.power_step(n, vectors[n.label]) for n in _layers(graph)}
    return {k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()}


def global_lipschitz(
    function: Callable[[Array], Any], example: Array, norms: Norms | None = None
) -> Array:
    """A Lipschitz constant of a function between l2 norms, everywhere.

    Args:
      function: any JAX function of one array with one output array.
      example: an input, or a `jax.ShapeDtypeStruct`.
      norms: see `lipschitz`; provable upper bounds by default.

    Returns:
      A scalar `L` with `||f(x) - f(y)||_2 <= L ||x - y||_2` for all `x`, `y`.

    Raises:
      ValueError: at an op without a Lipschitz constant (`exp`, a product of perturbed values).
    """
    graph = trace(function, _zeros(example))
    sizes = _spectral_bounds(graph) if norms is None else _checked(graph, norms)
    if len(graph.outputs) != 1:
        raise ValueError(f"a Lipschitz constant needs one output array, got {len(graph.outputs)}")
    radii = [jnp.ones((), graph.nodes[0].dtype)]
    for node in graph.nodes[1:]:
        operands = [radii[i] for i in node.inputs]
        if isinstance(node.op, Scalar):
            ends = jnp.full(node.shape, jnp.inf, node.dtype)
            slope = jnp.max(node.op.lipschitz(node, -ends, ends))
            if _known_to_be_unbounded(slope):
                raise ValueError(_without_constant(node))
            radii.append(slope * operands[0])
        else:
            radii.append(_radius(node, operands, sizes))
    (output,) = graph.outputs
    return radii[output.index] if isinstance(output, Perturbed) else jnp.zeros((), radii[0].dtype)


def _walk(graph: Graph, input_set: InputSet, norms: Norms, box: bool) -> list[Reached]:
    """Ball and box of every node."""
    center, radius = enclosing_ball(input_set)
    start = None
    if box:
        lower, upper = input_set.interval()
        # A centre outside of the clip range: ball and box are both around it.
        start = Interval(quick_smaller(lower, center), quick_larger(upper, center))
    reached = [Reached(center, radius, start)]
    for node in graph.nodes[1:]:
        reached.append(_advance(node, tuple(reached[i] for i in node.inputs), norms, box))
    return reached


def _advance(node: Node, operands: tuple[Reached, ...], norms: Norms, box: bool) -> Reached:
    """The ball and the box of one node's value, from those of its operands.

    The box around the ball needs no look after it: a row of a matrix is no longer than its spectral
    norm, and no element's slope larger than the largest one.
    """
    center = node.apply(*(o.center for o in operands))
    radii = [o.radius for o in operands]
    intervals = tuple(o.interval() for o in operands)
    found = intervals_of.propagate(node, intervals) if box else None
    if not jnp.issubdtype(node.dtype, jnp.floating):  # a predicate
        if not box:
            raise ValueError(_without_constant(node))
        return Reached(center, jnp.full_like(radii[0], jnp.inf), found)
    if node.is_linear or isinstance(node.op, Extremum):
        radius = _radius(node, radii, norms)
        if box and node.is_linear:
            found = cut(node, found, center, radii)
        return Reached(center, radius, found)
    if isinstance(node.op, Scalar):
        slope = jnp.max(node.op.lipschitz(node, *intervals[0]))
        # Nothing moves; or a predicate does, of which there is no radius, but on a flat step.
        still = (radii[0] == 0) | (slope == 0)
        radius = jnp.where(still, 0.0, slope * radii[0])
        if node.op.pieces and not node.op.jumps:
            return Reached(center, radius, found)
    elif box:
        radius = jnp.inf  # no slope is known of a function of several values, but its range is
    else:
        raise ValueError(_without_constant(node))
    if box:
        # Slopes may be large or unbounded; no value is further away than a corner of the box.
        fixed = found.lower == found.upper  # perhaps a mask's -inf
        ends = (jnp.where(fixed, 0.0, end - jnp.where(fixed, 0.0, center)) for end in found)
        corner = quick_larger(*(jnp.abs(end) for end in ends))
        radius = jnp.minimum(radius, length(corner))
    return Reached(center, radius, found)


def _radius(node: Node, radii: list[Array], norms: Norms) -> Array:
    """The radius behind an op that is linear, or as good as linear."""
    if node.is_linear:
        return norms_of.radius(node, radii, norms.get(node.label))
    if isinstance(node.op, Extremum):
        # |max x - max z| <= max |x - z|, and an element counts once per window that it is in.
        windows = functools.partial(node.op.windows, node)
        shape = jax.eval_shape(windows, *node.input_shapes)
        transposed = jax.linear_transpose(windows, *node.input_shapes)
        counts = transposed(jnp.ones(shape.shape, shape.dtype))
        squares = [jnp.max(c) * jnp.square(r) for c, r in zip(counts, radii, strict=True)]
        return root(sum(squares))
    raise ValueError(_without_constant(node))


def _specification(
    graph: Graph, input_set: InputSet, reached: list[Reached], specification: Array
) -> Interval:
    """Bounds `[m]`: rows pulled back to the last nonlinear ops, and their exact extrema there."""
    starts, constant = intervals_of.starts_of(graph, specification)
    stops: dict[int, Array] = {}

    def stop(node: Node, rows: Rows) -> Lines:
        stops[node.index] = dense(rows)
        zero = jnp.zeros((1, *node.shape), node.dtype)
        return Lines(None, zero, None, zero)

    centers = [value.center for value in reached]
    result = backward.pull_back(graph, centers, starts, stop, "lower")
    value = result.below.constant + constant
    ends = []
    for sign in (-1.0, 1.0):
        reach = jnp.zeros_like(value)
        for index, rows in stops.items():
            reach = reach + jax.vmap(reached[index].spread)(sign * rows)
        if _meets_input(graph, starts):
            rows = sign * result.below.coefficients
            offset = (input_set.interval().middle - centers[0])[None]
            shift = jnp.sum(rows * offset, axis=tuple(range(1, rows.ndim)))
            reach = reach + jax.vmap(input_set.spread)(rows) + shift
        ends.append(value + sign * reach)
    # What is NaN on one side is NaN on the other as well: `spread` looks at all that it is given.
    # So nothing of the upper end is computed where only the lower one is used.
    return Interval(*ends)


def _meets_input(graph: Graph, starts: Iterable[int]) -> bool:
    """Whether rows that start there reach the input through linear ops alone."""
    stack = list(starts)
    while stack:
        node = graph.nodes[stack.pop()]
        if node.index == 0:
            return True
        if node.is_linear:
            stack.extend(node.inputs)
    return False


def _fixed(output: Array) -> BallBox:
    """What does not depend on the input."""
    output = jnp.asarray(output)
    return BallBox(output, jnp.zeros(()), output, output)


def _zeros(example: Array | jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(example.shape, example.dtype)


def _layers(graph: Graph) -> list[Node]:
    """The linear layers, those whose spectral norm takes work."""
    empty = next((node for node in graph.nodes if not node.size), None)
    if empty is not None:
        raise ValueError(
            f"no l2 bounds for a layer without units: '{empty.primitive}' at {empty.location} "
            f"has shape {empty.shape}"
        )
    return [node for node in graph.nodes if norms_of.has_spectrum(node.op)]


def _spectral_bounds(graph: Graph) -> dict[str, Array]:
    return {node.label: norms_of.spectral_bound(node) for node in _layers(graph)}


def _checked(graph: Graph, given: Norms) -> Norms:
    labels = {node.label for node in _layers(graph)}
    if labels != set(given):
        raise ValueError(
            f"expected one entry per linear layer ({', '.join(sorted(labels))}), "
            f"got {', '.join(sorted(given)) or 'none'}"
        )
    return given


def _known_to_be_unbounded(slope: Array) -> bool:
    return not isinstance(slope, jax.core.Tracer) and not np.isfinite(slope)


def _without_constant(node: Node) -> str:
    return (
        f"'{node.primitive}' at {node.location} has no Lipschitz constant; bound its input "
        "(a clip or a squashing activation before it), or take the box along (method 'bcp')"
    )

"""Interval bound propagation (IBP; Gowal et al. 2018), with one rule per family of ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Extremum, Joint, Lines, Loop, Scalar, Structural, Weighted
from boundjax.ir.node import Graph, Node, NoProofError, Perturbed
from boundjax.numerics import materialized
from boundjax.ops import affine, domain
from boundjax.sets.input_set import InputSet, InputTree
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.tracing.builder import Built
from boundjax.tracing.trace import trace_body
from boundjax.transforms import backward, inside, outward
from boundjax.transforms import problem as problems
from boundjax.transforms.balls import FirstLayers
from boundjax.transforms.errors import ErrorAnalysis
from boundjax.transforms.signatures import ArrayFunction, BoundsFunction, TreeFunction
from boundjax.windows import Rows, dense

# Bounds on the inputs of the nonlinear ops, by label.
PreActivations: TypeAlias = dict[str, Interval]


def propagate(
    node: Node,
    operands: tuple[Interval, ...],
    center: Array | None = None,
    rounding: Rounding = "nearest",
) -> Interval:
    """The interval of a node from those of its perturbed operands (Gowal et al. 2018).

    Args:
      node: the node.
      operands: the intervals of its perturbed operands.
      center: the image of the operand's middle under a weighted op, if the caller has it already.
      rounding: what the steps of a loop are enclosed for; the other ops leave it to the caller.
    """
    lower, upper = zip(*operands, strict=True)
    match node.op:
        case Structural():
            # A 0/1 matrix is monotone; a minus sign swaps the ends of that operand.
            signs = node.op.sign(node)
            ends = [(o.lower, o.upper)[::s] for o, s in zip(operands, signs, strict=True)]
            lower, upper = zip(*ends, strict=True)
            return Interval(node.apply(*lower), node.apply(*upper))
        case Weighted() if node.op.diagonal:
            # Select by the factor's sign, because the derivatives of min and max look at ties.
            positive = affine.rises(node)
            ends = node.apply(*lower), node.apply(*upper)
            return Interval(jnp.where(positive, *ends), jnp.where(positive, *ends[::-1]))
        case Weighted():
            center = node.apply(operands[0].middle) if center is None else center
            radius = node.op.magnitude(node, operands[0].radius)
            return Interval(center - radius, center + radius)
        case Scalar():
            return Interval(*node.op.image(node, lower[0], upper[0]))
        case Extremum():
            return Interval(node.apply(*lower), node.apply(*upper))
        case Joint():
            return node.op.image(node, *operands)
        case Loop():
            return _loop(node, operands, rounding)
    raise AssertionError(f"no interval rule for {type(node.op).__name__}")


def _loop(node: Node, operands: tuple[Interval, ...], rounding: Rounding) -> Interval:
    """Scans the interval step of a loop's body.

    The bounds equal those of the unrolled loop. An interval that holds for all steps at once (an
    inductive invariant) could only be wider.
    """
    loop = node.params["loop"]
    remaining = iter(operands)
    values = [next(remaining) if isinstance(o, Perturbed) else o for o in node.operands]
    # Numbers that change from step to step are rounded in every step.
    rounded = () if rounding == "nearest" else loop.scan.carry
    values = [
        _as_interval(v) if p or (k in rounded and _is_floating(v)) else v
        for k, (v, p) in enumerate(zip(values, loop.perturbed, strict=True))
    ]
    consts, carry, xs = (
        [values[k] for k in role] for role in (loop.scan.consts, loop.scan.carry, loop.scan.xs)
    )

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        arguments = [*consts, *carry, *xs]
        intervals = [a for a in arguments if isinstance(a, Interval)]
        shapes = [
            jax.ShapeDtypeStruct(a.lower.shape, a.lower.dtype) if isinstance(a, Interval) else a
            for a in arguments
        ]
        body = trace_body(loop.scan.body, shapes, rounding)
        errors = analysis_of(body, rounding)
        if body.rounded:
            raise NoProofError(
                f"the loop at {node.location} gives a constant that it rounds itself; compute it "
                "outside, or take rounding='nearest'"
            )
        if errors is None:
            for inner in body.nodes[len(intervals) :]:
                intervals.append(propagate(inner, tuple(intervals[i] for i in inner.inputs)))
        else:
            intervals = _swept(body.nodes, intervals, errors)
        results = [intervals[o.index] if isinstance(o, Perturbed) else o for o in body.outputs]
        next_carry = [
            _as_interval(new) if isinstance(old, Interval) else new
            for old, new in zip(carry, results[: len(carry)], strict=True)
        ]
        return _strong(next_carry), results[len(carry) :]

    final, stacked = jax.lax.scan(
        step, _strong(carry), xs, length=loop.scan.length, reverse=loop.scan.reverse
    )
    outputs = [*final, *stacked]
    bounds = [_as_interval(outputs[k]) for k in loop.outputs]
    lower, upper = (
        jnp.concatenate([jnp.ravel(end) for end in ends]) for ends in zip(*bounds, strict=True)
    )
    if jnp.issubdtype(lower.dtype, jnp.floating):
        unbounded = ~(jnp.isfinite(lower) & jnp.isfinite(upper))
        domain.warn(node, unbounded, f"grow without end within {loop.scan.length} steps")
    return Interval(lower, upper)


def _swept(
    nodes: Sequence[Node], inputs: Sequence[Interval], errors: ErrorAnalysis
) -> list[Interval]:
    sweep = Sweep(nodes, inputs, errors)
    for node in nodes[len(inputs) :]:
        sweep.advance(node)
    return sweep.intervals


def analysis_of(graph: Graph | Built, rounding: Rounding) -> ErrorAnalysis | None:
    """The error analysis of a graph, after bounding its rounded constants; None if not needed.

    Raises:
      NoProofError: at an op, also of a constant, for which nobody states how it rounds.
    """
    if rounding == "nearest":
        return None
    bounds: list[Interval] = []
    nodes, weights = graph.constants
    if nodes:
        for node in nodes[len(weights) :]:
            if node.op is None:
                raise NoProofError(
                    f"nobody states how much '{node.primitive}' at {node.location} rounds, which "
                    "computes a constant; compute it beforehand, or take rounding='nearest'"
                )
        exact = [Interval(weight, weight) for weight in weights]
        # Constants are small, and a fusion would compute them again for every element they act on.
        bounds = materialized(_swept(nodes, exact, ErrorAnalysis(nodes, rounding)))
    return ErrorAnalysis(graph.nodes, rounding, bounds)


def _as_interval(value: Any) -> Interval:
    return value if isinstance(value, Interval) else Interval(value, value)


def _strong(carry: list[Any]) -> list[Any]:
    """Removes weak types, since a scan requires that they stay the same from step to step."""
    return jax.tree.map(lambda v: jax.lax.convert_element_type(v, jnp.result_type(v)), carry)


def _middle(interval: Interval) -> Array:
    """The middle; any value of a predicate, which no coefficient reaches."""
    return interval.middle if _is_floating(interval.lower) else interval.lower


def _is_floating(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _rounding_of(errors: ErrorAnalysis | None) -> Rounding:
    return "nearest" if errors is None else errors.rounding


class Sweep:
    """Intervals and references of the nodes of a graph, which it visits once, in order.

    Attributes:
      intervals: of the nodes so far.
      references: of the nodes so far, see `backward`.
      radii: index of an affine node -> half the width of its interval before any intersection.
      errors: what rounding may do to the values; None under `"nearest"`.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[Interval],
        errors: ErrorAnalysis | None,
        *,
        first: FirstLayers | None = None,
        keep: Callable[[Interval], Interval] = lambda interval: interval,
    ) -> None:
        """Begins with the intervals of the inputs, the first nodes.

        Args:
          nodes: those of the graph.
          inputs: the intervals of the first nodes.
          errors: an analysis of these nodes; the sweep records all nodes in it.
          first: cuts the intervals of first layers.
          keep: applied to the interval of every nonlinear node.
        """
        self.intervals = list(inputs)
        self.references = [_middle(interval) for interval in inputs]
        self.radii: dict[int, Array] = {}
        self.errors = errors
        self._rounding: Rounding = _rounding_of(errors)
        self._first, self._keep = first, keep
        # Nodes whose reference is the middle of their interval. Its image is the next reference and
        # the center of the next interval; computed once, it is also differentiated once.
        self._centered = set(range(len(inputs)))
        for node, interval, reference in zip(nodes, inputs, self.references, strict=False):
            if errors is not None and jnp.issubdtype(node.dtype, jnp.floating):
                errors.record(node, interval, reference)

    def advance(self, node: Node) -> None:
        """Appends the interval and the reference of the next node."""
        operands = tuple(self.intervals[i] for i in node.inputs)
        floating = jnp.issubdtype(node.dtype, jnp.floating)
        errors = self.errors if floating else None
        center = None
        if node.is_linear:
            backward.extend_references(self.references, node, None)
            if self._centered.issuperset(node.inputs):
                center = self.references[-1]
        if (
            errors is not None
            and self._first is None
            and isinstance(node.op, Weighted)
            and not node.op.diagonal
        ):
            image = node.apply(operands[0].middle) if center is None else center
            interval = errors.enclose_product(node, operands[0], image)
        else:
            interval = propagate(node, operands, center, self._rounding)
            interval = interval if self._first is None else self._first.cut(node, interval)
            interval = interval if errors is None else errors.enclose(node, interval)
        if not node.is_linear:
            interval = self._keep(interval)
            backward.extend_references(self.references, node, interval)
        self.intervals.append(interval)
        if errors is not None:
            errors.record(node, interval, self.references[-1])
        if node.is_linear and floating:
            self.radii[node.index] = interval.radius
        # Over other sets than boxes the intervals of first layers are cut around another center.
        if floating and (not node.is_linear or (center is not None and self._first is None)):
            self._centered.add(node.index)

    def replace(self, node: Node, interval: Interval) -> None:
        """Replaces a node's interval by a tighter one."""
        if interval is self.intervals[node.index]:
            return
        self.intervals[node.index] = interval
        self._centered.discard(node.index)
        if self.errors is not None:
            self.errors.record(node, interval, self.references[node.index])


def sweep_of(
    graph: Graph, input_set: InputSet, errors: ErrorAnalysis | None, reused: bool = False
) -> Sweep:
    """A sweep at the beginning of a graph; `reused` if many walks will use its intervals."""
    arithmetic = None if errors is None else errors.arithmetic
    first = None if input_set.is_box else FirstLayers(input_set, arithmetic)
    keep = materialized if reused else lambda interval: interval
    whole = input_set.interval()
    # Rounding the ends of a set takes long formulas, which every use would repeat.
    whole = whole if errors is None else materialized(whole)
    return Sweep(graph.nodes, [whole], errors, first=first, keep=keep)


def forward(graph: Graph, input_set: InputSet) -> list[Interval]:
    """Intervals of all nodes, in order; over an l2 ball those of the first layers are exact."""
    intervals = [input_set.interval()]
    first = FirstLayers(input_set)
    for node in graph.nodes[1:]:
        box = propagate(node, tuple(intervals[i] for i in node.inputs))
        intervals.append(first.cut(node, box))
    return intervals


def references_of(graph: Graph, intervals: Sequence[Interval]) -> list[Array]:
    """The references of the backward walk, from the intervals of all nodes."""
    references = [intervals[0].middle]
    for node in graph.nodes[1:]:
        backward.extend_references(references, node, intervals[node.index])
    return references


def constant_lines(node: Node, intervals: Sequence[Interval]) -> Lines:
    """Interval bounds as a relaxation: two constant lines at the ends of the node's interval."""
    image = intervals[node.index].poisoned()
    return Lines(None, image.lower[None], None, image.upper[None])


def merged(
    graph: Graph,
    input_set: InputSet,
    intervals: Sequence[Interval],
    references: Sequence[Array],
    starts: Mapping[int, Array],
    constant: Array,
    errors: ErrorAnalysis | None = None,
) -> Interval:
    """Interval bounds `[m]` of a specification, merged with the affine layers before it.

    This generalises the elision of the last layer of Gowal et al. 2018: the walk goes back to the
    nearest nonlinear ops and takes their intervals.
    """

    def lines_of(node: Node, rows: Rows) -> Lines:
        sources, target = [references[i][None] for i in node.inputs], references[node.index][None]
        lines = constant_lines(node, intervals)
        if inside.has_ball(node):
            lines = inside.lines(node, dense(rows), lines)
        lines = backward.around(node, lines, sources, target)
        return lines if errors is None else outward.lines(errors, node, lines)

    result = backward.pull_back(graph, references, starts, lines_of, "both", errors)
    lower, upper = result.concretize(input_set)
    assert lower is not None, "both sides were asked for"
    assert upper is not None, "both sides were asked for"
    return Interval(lower + constant, upper + constant)


@overload
def interval(
    function: ArrayFunction, *, rounding: Rounding = "nearest", has_aux: Literal[False] = False
) -> BoundsFunction[Interval, Interval]: ...


@overload
def interval(
    function: TreeFunction, *, rounding: Rounding = "nearest", has_aux: Literal[False] = False
) -> BoundsFunction[Any, Interval]: ...


@overload
def interval(
    function: ArrayFunction, *, rounding: Rounding = "nearest", has_aux: Literal[True]
) -> BoundsFunction[tuple[Interval, PreActivations], tuple[Interval, PreActivations]]: ...


@overload
def interval(
    function: TreeFunction, *, rounding: Rounding = "nearest", has_aux: Literal[True]
) -> BoundsFunction[tuple[Any, PreActivations], tuple[Interval, PreActivations]]: ...


def interval(
    function: TreeFunction, *, rounding: Rounding = "nearest", has_aux: bool = False
) -> BoundsFunction[Any, Any]:
    """Turns a function of one example into a function from an input set to interval bounds.

    Args:
      function: any JAX function of one array, or of one pytree of arrays,
        `f(x) -> pytree of arrays`; it may close over weights.
      rounding: what the bounds hold for, see `linear`.
      has_aux: also return the pre-activation bounds, `{label: Interval}`.

    Returns:
      `bounds(input_set, specification=None)`: an `Interval` per output leaf; with a
      specification `[m, *out]` (one output array) bounds `[m]` on `<specification_k, f(x)>`,
      merged with the network's last affine layers. With `has_aux` a pair of bounds and
      pre-activation bounds.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      NoProofError: at an op whose rounding nobody states, unless `rounding` is `"nearest"`.
      ValueError: for a specification that does not fit the output, or an unknown `rounding`.

    Source: Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation".
    """
    problems.require_rounding(rounding)

    def bounds(input_set: InputTree, specification: Array | None = None) -> Any:
        graph, input_set, _ = problems.traced(function, input_set, rounding)
        errors, references = analysis_of(graph, rounding), None
        if errors is None:
            intervals = forward(graph, input_set)
        else:
            sweep = sweep_of(graph, input_set, errors)
            for node in graph.nodes[1:]:
                sweep.advance(node)
            intervals, references = sweep.intervals, sweep.references
        if specification is None:
            leaves = [
                intervals[o.index].poisoned() if isinstance(o, Perturbed) else Interval(o, o)
                for o in graph.outputs
            ]
            result = jax.tree.unflatten(graph.output_tree, leaves)
        else:
            starts, constant = problems.starts_of(graph, specification)
            if references is None:
                references = references_of(graph, intervals)
            result = merged(graph, input_set, intervals, references, starts, constant, errors)
        return (result, pre_activations(graph, intervals)) if has_aux else result

    return bounds


def pre_activations(graph: Graph, intervals: Sequence[Interval]) -> PreActivations:
    """Bounds on the inputs of the nonlinear ops, by label."""
    return {label: intervals[index] for label, index in pre_activation_nodes(graph).items()}


def pre_activation_nodes(graph: Graph) -> dict[str, int]:
    """The inputs of nonlinear ops by label (`label:k` for input `k` of an op with several)."""
    nodes: dict[str, int] = {}
    for node in graph.nodes[1:]:
        if node.is_nonlinear:
            for position, index in enumerate(node.inputs):
                suffix = f":{position}" if len(node.inputs) > 1 else ""
                nodes[node.label + suffix] = index
    return nodes


def exact_intervals(graph: Graph, input_set: InputSet) -> set[int]:
    """The nodes whose intervals are the exact range of every element, where a walk gains nothing.

    Over a box the elements of the input vary independently. They still do after moving, scaling or
    shifting them, or after a monotone function. A linear map of independent values has exact
    intervals, too, but its elements are no longer independent.
    """
    independent: set[int] = {0} if input_set.is_box else set()
    exact = set(independent)
    for node in graph.nodes[1:]:
        if len(node.inputs) != 1:
            continue
        (source,) = node.inputs
        op = node.op
        keeps_independence = (
            (isinstance(op, Structural) and op.moves)
            or (isinstance(op, Weighted) and op.diagonal)
            or (isinstance(op, Scalar) and op.monotone)
        ) and node.size <= graph.nodes[source].size
        if source in independent and (node.is_linear or isinstance(op, (Scalar, Extremum))):
            exact.add(node.index)
            if keeps_independence:
                independent.add(node.index)
        elif source in exact and keeps_independence:
            exact.add(node.index)
    return exact

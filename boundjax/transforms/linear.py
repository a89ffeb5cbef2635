"""Backward linear bounds, the CROWN family: slope policy x source of the intermediate bounds.

======================  ===========  ============
method                  slopes       intermediate
======================  ===========  ============
CROWN-IBP               adaptive     interval
CROWN                   adaptive     linear
forward, then backward  adaptive     forward
Fast-Lin, CAP           parallel     linear
IBP as a relaxation     constant     interval
======================  ===========  ============
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from boundjax import slopes as slope_policies
from boundjax.ir.node import Perturbed
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.slopes import Optimized
from boundjax.tracing.trace import trace
from boundjax.transforms import backward
from boundjax.transforms import interval as intervals_of
from boundjax.transforms.backward import LinearBounds, Sides
from boundjax.transforms.forward import Forward
from boundjax.transforms.relaxations import Positions, RowEnds
from boundjax.transforms.walk import Companion, Walk


class Auxiliary(NamedTuple):
    """What `linear(..., has_aux=True)` met on the way, for a specification of `m` rows.

    Attributes:
      interval: interval bounds `[m]` of the specification.
      linear: the linear bounds `[m]` before they are intersected with those; a side that was not
        asked for holds the interval bound.
      pre_activations: label -> bounds on the op's input.
      slopes: label -> the free slope's position in `[0, 1]`, as used at unstable units; an op
        with two free lines has a second entry, `label:below`.
      coefficients: the linear bounds in the input.
      rows: label -> `[m, *shape]`, the coefficients on the op's output of the linear functions
        that the walk lower-bounds: a positive one takes the op's lower line, a negative one the
        upper. For `sides="upper"` they belong to minus the specification; for `"both"` those
        rows follow, `[2 m, *shape]`.
      worst_input: `[m, *input]`, where in the input set the relaxation's lower bound is attained
        (the upper bound, if `sides="upper"`).
    """

    interval: Interval
    linear: Interval
    pre_activations: dict[str, Interval]
    slopes: dict[str, Array]
    coefficients: LinearBounds
    rows: dict[str, Array]
    worst_input: Array


def linear(
    function: Callable[[Array], Any],
    *,
    slopes: slope_policies.Slopes | Optimized = "adaptive",
    intermediate: str = "interval",
    sides: Sides = "both",
    intersect: bool = True,
    max_rows: int | None = None,
    max_bytes: int = 2**30,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Turns a function of one example into one from an input set to linear-relaxation bounds.

    Args:
      function: any JAX function of one array; it may close over weights.
      slopes: `"adaptive"` (CROWN), `"parallel"` (Fast-Lin / CAP), `"zero"`, `"one"`,
        `"constant"` (interval bounds as a relaxation), a function of `(lower, upper)`, or a
        dict of positions in `[0, 1]` by label.
      intermediate: where pre-activation bounds come from: `"interval"`, `"linear"` (the same
        walk, recursively) or `"forward"` (`forward_linear`, for functions of few inputs).
      sides: `"lower"`, `"upper"` or `"both"`; the side not asked for holds the interval
        bound, and a walk for one side costs half.
      intersect: whether intermediate linear bounds are intersected with the interval bounds. That
        never loosens an intermediate bound, and nearly always tightens the result; not always,
        because slopes that are not optimised may get worse with it, parallel ones in particular.
        `False` is Fast-Lin / CAP to the letter; before ops with a domain and products, and in the
        result, they always are.
      max_rows: at most so many units of a layer get linear bounds, those of the widest intervals;
        the others keep their interval bounds. Under `vmap` and `grad` that is the way to spend
        less: elsewhere the rows of units that matter to no relaxation (stable relus) are skipped.
      max_bytes: budget for the rows of one block of intermediate linear bounds, of one example.
      has_aux: also return `Auxiliary`; needs a single output array.

    Returns:
      `bounds(input_set, specification=None)`: an `Interval` per output leaf, or bounds `[m]`
      on `<specification_k, f(x)>` for a specification `[m, *out]`. They are intersected with
      the interval bounds. With `has_aux` a pair.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      ValueError: for an unknown option, or a specification that does not fit the output.

    Source: Zhang et al. 2018 (CROWN), Zhang et al. 2020 (CROWN-IBP), Wong & Kolter 2018 (CAP).
    """
    relaxed = relax(
        function,
        slopes=slopes,
        intermediate=intermediate,
        sides=sides,
        intersect=intersect,
        max_rows=max_rows,
        max_bytes=max_bytes,
    )

    def bounds(input_set: InputSet, specification: Array | None = None) -> Any:
        return relaxed(input_set).bounds(specification, has_aux=has_aux)

    return bounds


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """A function relaxed over one input set, for as many specifications as there are.

    Attributes:
      walk: the graph with the bounds on its pre-activations.
      sides: which linear bounds are wanted.
    """

    walk: Walk
    sides: Sides

    @property
    def pre_activations(self) -> dict[str, Interval]:
        """Bounds on the inputs of the nonlinear ops, by label."""
        return intervals_of.pre_activations(self.walk.graph, self.walk.intervals)

    def interval(self, specification: Array) -> Interval:
        """Interval bounds `[m]` of `<specification_k, f(x)>`, given the pre-activations."""
        return self.walk.merged(*intervals_of.starts_of(self.walk.graph, specification))

    def bounds(
        self,
        specification: Array | None = None,
        *,
        within: Mapping[str, Interval] | None = None,
        has_aux: bool = False,
    ) -> Any:
        """What `linear` returns.

        Args:
          specification: `[m, *out]`, or None for every output.
          within: for some labels of `pre_activations` an interval for each row of the
            specification, `[m, *shape]`. Row `k` then holds for the part of the input set on which
            these values lie in their `k`-th intervals; where that part is empty it may be anything.
            So one walk bounds the parts of a case distinction (the two halves of a split ReLU).
          has_aux: also return `Auxiliary`.

        Raises:
          KeyError: for an entry of `within` for no op.
          ValueError: for an entry of another shape, or `within` without a specification.
        """
        walk, graph, sides = self.walk, self.walk.graph, self.sides
        if specification is not None:
            starts, constant = intervals_of.starts_of(graph, specification)
            ends = walk.row_ends(within or {}, len(specification))
            result, aux = _specification(walk, starts, constant, sides, ends)
            return (result, aux) if has_aux else result
        if within:
            raise ValueError("within needs a specification: it has an interval for each row")
        if has_aux:
            if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Perturbed):
                raise ValueError("has_aux needs a function with one output array")
            node = graph.nodes[graph.outputs[0].index]
            rows = node.unit_rows()
            zero = jnp.zeros((node.size,), node.dtype)
            result, aux = _specification(walk, {node.index: rows}, zero, sides)
            return Interval(*(end.reshape(node.shape) for end in result)), aux
        leaves = [
            _output(walk, o.index, sides) if isinstance(o, Perturbed) else Interval(o, o)
            for o in graph.outputs
        ]
        return jax.tree.unflatten(graph.output_tree, leaves)


def relax(
    function: Callable[[Array], Any],
    *,
    slopes: slope_policies.Slopes | Optimized = "adaptive",
    intermediate: str = "interval",
    sides: Sides = "both",
    intersect: bool = True,
    known: Mapping[str, Interval] | None = None,
    max_rows: int | None = None,
    max_bytes: int = 2**30,
) -> Callable[[InputSet], Relaxation]:
    """Like `linear`, with the bounds on pre-activations computed once for several specifications.

    Args:
      function: as the options, those of `linear`.
      slopes, intermediate, sides, intersect, max_rows, max_bytes: see there.
      known: bounds on pre-activations from elsewhere, by the labels of `pre_activations`; the
        result holds for the part of the input set where they do. They are intersected with the
        bounds that are found. Where both cannot hold, that is an error, or, under `jit`, NaN.
        Those on predicates are not used.

    Returns:
      `relaxed(input_set)`: a `Relaxation` with `interval(specification)`,
      `bounds(specification)` and `pre_activations`. One that is made inside a differentiated
      function is differentiated once, however many specifications it serves.

    Raises:
      UnsupportedOpError, ValueError: as `linear`; ValueError also for known bounds of another
        shape, or that contradict the others.
      KeyError: for known bounds of no op.
    """
    optimized = slopes if isinstance(slopes, Optimized) else None
    start = slopes if optimized is None else optimized.start
    policy_of = slope_policies.resolve(start)
    if intermediate not in _SOURCES:
        raise ValueError(f"intermediate must be one of {', '.join(_SOURCES)}, got {intermediate!r}")
    if sides not in ("lower", "upper", "both"):
        raise ValueError(f"sides must be 'lower', 'upper' or 'both', got {sides!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    if optimized is not None and optimized.optimize_intermediate and intermediate != "linear":
        raise ValueError(
            "optimize_intermediate needs intermediate='linear', got "
            f"intermediate={intermediate!r}: there are no slopes behind those bounds"
        )

    def relaxed(input_set: InputSet) -> Relaxation:
        graph = trace(function, intervals_of.example_of(input_set))
        if isinstance(start, Mapping):
            slope_policies.require_known(start, graph.nonlinear_labels)
        walk = Walk(
            graph,
            input_set,
            policy_of,
            refine=intermediate == "linear",
            companion=_SOURCES[intermediate](),
            optimized=optimized,
            intersect=intersect,
            known=known,
            max_rows=max_rows,
            max_bytes=max_bytes,
        )
        return Relaxation(walk, sides)

    return relaxed


# Where pre-activation bounds come from besides the interval walk.
_SOURCES: Mapping[str, Callable[[], Companion | None]] = {
    "interval": lambda: None,
    "linear": lambda: None,
    "forward": Forward,
}


def _output(walk: Walk, index: int, sides: Sides) -> Interval:
    """Bounds of one output leaf."""
    node = walk.graph.nodes[index]
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return walk.intervals[index]  # a predicate: true, false, or either
    if walk.optimized is None or walk.optimized.per_spec:
        return walk.node_bounds(node, sides, walk.optimized is not None)
    rows = node.unit_rows()
    zero = jnp.zeros((node.size,), node.dtype)
    result, _ = _specification(walk, {index: rows}, zero, sides)
    return Interval(*(end.reshape(node.shape) for end in result))


def _specification(
    walk: Walk,
    starts: dict[int, Array],
    constant: Array,
    sides: Sides,
    ends: RowEnds | None = None,
) -> tuple[Interval, Auxiliary]:
    """Bounds of the specification whose coefficients start at the given nodes."""
    merged = walk.merged(starts, constant)
    positions, seen = None, None
    if walk.optimized is not None:
        positions, seen = _optimized(walk, starts, constant, sides, ends)
    rows: dict[str, Array] = {}
    walked = walk.pull_back(starts, sides, positions, rows, ends)
    lower, upper = walked.concretize(walk.input_set)
    found = Interval(
        merged.lower if lower is None else lower + constant,
        merged.upper if upper is None else upper + constant,
    )
    side = walked.above if sides == "upper" else walked.below
    aux = Auxiliary(
        interval=merged,
        linear=found,
        pre_activations=intervals_of.pre_activations(walk.graph, walk.intervals),
        slopes=walk.relaxations.slopes if positions is None else positions,
        coefficients=walked.in_input(walk.references[0]),
        rows=rows,
        worst_input=walk.worst_input(side),
    )
    if seen is not None:
        # Another iterate may have been better for some rows; it is sound, and no gradient flows.
        found = backward.intersect(found, seen)
    return backward.intersect(merged, found), aux


def _optimized(
    walk: Walk, starts: dict[int, Array], constant: Array, sides: Sides, ends: RowEnds | None
) -> tuple[Positions, Interval]:
    """The positions to bound with, and the best bounds of all iterates."""
    found = walk.best(starts, sides, walk.optimized.per_spec, constant, ends)
    count = constant.shape[0]
    infinite = jnp.full_like(constant, jnp.inf)
    values = jax.lax.stop_gradient(found.values)
    lower = -infinite if sides == "upper" else values[:count]
    upper = infinite if sides == "lower" else -values[-count:]
    return found.parameters, Interval(lower, upper)

"""Backward linear bounds, the CROWN family: slope policy and source of the intermediate bounds.

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
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax import slopes as slope_policies
from boundjax.ir.node import Node, Perturbed
from boundjax.sets.input_set import InputTree
from boundjax.sets.inputs import Inputs
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Rounding
from boundjax.slopes import Optimized, Slopes
from boundjax.transforms import interval as intervals_of
from boundjax.transforms import problem as problems
from boundjax.transforms.backward import LinearBounds, Sides
from boundjax.transforms.forward import Forward
from boundjax.transforms.relaxations import Positions, RowEnds
from boundjax.transforms.signatures import (
    ArrayFunction,
    BoundsFunction,
    OutputBounds,
    Specification,
    TreeFunction,
)
from boundjax.transforms.walk import Companion, Walk
from boundjax.typing import PyTree

Intermediate: TypeAlias = Literal["interval", "linear", "forward"]


class LinearOptions(TypedDict, total=False):
    """The options of `linear`, see there."""

    slopes: Slopes | Optimized
    intermediate: Intermediate
    sides: Sides
    intersect: bool
    max_rows: int | None
    max_bytes: int
    rounding: Rounding


class RelaxOptions(LinearOptions, total=False):
    """The options of `relax`, see there."""

    known: Mapping[str, Interval] | None


class Auxiliary(NamedTuple):
    """Intermediate results that `linear(..., has_aux=True)` returns, for `m` rows.

    Attributes:
      interval: interval bounds `[m]` of the specification.
      linear: the linear bounds `[m]` before the intersection with the interval bounds; a side that
        was not asked for holds the interval bound.
      pre_activations: label -> bounds on the op's input.
      slopes: label -> the free slope's position in `[0, 1]`, as used at unstable units; an op
        with two free lines has a second entry, `label:below`.
      coefficients: the linear bounds in the input.
      rows: label -> `[m, *shape]`, the coefficients on the op's output of the linear functions
        that the walk bounds from below: a positive one takes the op's lower line, a negative one
        the upper line. For `sides="upper"` they belong to minus the specification. For `"both"` the
        rows of the specification come first and those of its negative second, `[2 m, *shape]`.
      worst_input: `[m, *input]`, the point of the input set that attains the relaxation's lower
        bound (its upper bound, if `sides="upper"`). For an input that is a pytree so is this,
        `[m, *leaf]`, with constant leaves repeated, for `jax.vmap(function)`.
    """

    interval: Interval
    linear: Interval
    pre_activations: dict[str, Interval]
    slopes: dict[str, Float[Array, " ..."]]
    coefficients: LinearBounds
    rows: dict[str, Float[Array, "rows ..."]]
    worst_input: Float[Array, " m *input"] | PyTree

    def of_inputs(self, inputs: Inputs) -> Auxiliary:
        """Coefficients and points of one array as those of the argument that it stands for."""
        return self._replace(
            coefficients=self.coefficients.of_inputs(inputs),
            worst_input=inputs.points(self.worst_input),
        )


@overload
def linear(
    function: ArrayFunction, *, has_aux: Literal[False] = False, **options: Unpack[LinearOptions]
) -> BoundsFunction[Interval, Interval]: ...


@overload
def linear(
    function: TreeFunction, *, has_aux: Literal[False] = False, **options: Unpack[LinearOptions]
) -> BoundsFunction[Any, Interval]: ...


@overload
def linear(
    function: TreeFunction, *, has_aux: Literal[True], **options: Unpack[LinearOptions]
) -> BoundsFunction[tuple[Interval, Auxiliary], tuple[Interval, Auxiliary]]: ...


def linear(
    function: TreeFunction,
    *,
    slopes: Slopes | Optimized = "adaptive",
    intermediate: Intermediate = "interval",
    sides: Sides = "both",
    intersect: bool = True,
    max_rows: int | None = None,
    max_bytes: int = 2**30,
    rounding: Rounding = "nearest",
    has_aux: bool = False,
) -> BoundsFunction[Any, Any]:
    """Turns a function of one example into a function from an input set to linear bounds.

    Args:
      function: any JAX function of one array, or of one pytree of arrays; it may close over
        weights.
      slopes: `"adaptive"` (CROWN), `"parallel"` (Fast-Lin / CAP), `"zero"`, `"one"`,
        `"constant"` (interval bounds as a relaxation), a number in `[0, 1]`, a function of
        `(lower, upper)`, a dict of positions in `[0, 1]` by label, or `optimized(...)`.
      intermediate: the source of the pre-activation bounds: `"interval"`, `"linear"` (the same
        walk, recursively) or `"forward"` (`forward_linear`, for functions of few inputs).
      sides: `"lower"`, `"upper"` or `"both"`. The side that is not asked for holds the interval
        bound; a walk for one side costs half.
      intersect: whether to intersect intermediate linear bounds with the interval bounds. This
        never loosens an intermediate bound and nearly always tightens the result, but slopes that
        are not optimised, parallel ones in particular, may get worse. `False` is Fast-Lin / CAP to
        the letter. Bounds before ops with a limited domain and before products, and the result, are
        intersected in any case.
      max_rows: the largest number of units of a layer that get linear bounds, those with the widest
        intervals; the others keep their interval bounds. It saves work under `vmap` and `grad`.
        Elsewhere the rows of units that affect no relaxation (stable ReLUs) are skipped anyway.
      max_bytes: memory for the rows of one block of intermediate linear bounds, for one example.
      rounding: what the bounds hold for: `"nearest"`, the function in real arithmetic up to the
        rounding of the bounds themselves; `"real"`, the function in real arithmetic;
        `"float32"`, also every execution of it in floating-point arithmetic (docs/soundness.md).
      has_aux: also return `Auxiliary`; needs a single output array.

    Returns:
      `bounds(input_set, specification=None)`: an `Interval` per output leaf, or bounds `[m]`
      on `<specification_k, f(x)>` for a specification `[m, *out]`. They are intersected with
      the interval bounds. With `has_aux` a pair of bounds and `Auxiliary`.

    Raises:
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      NoProofError: at an op whose rounding nobody states, unless `rounding` is `"nearest"`.
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
        rounding=rounding,
    )

    def bounds(input_set: InputTree, specification: Array | None = None) -> Any:
        return relaxed(input_set).bounds(specification, has_aux=has_aux)

    return bounds


@dataclasses.dataclass(frozen=True)
class Relaxation(Generic[OutputBounds]):
    """A function relaxed over one input set, for any number of specifications.

    `OutputBounds` is the type of the bounds on its outputs, see `BoundsFunction`.

    Attributes:
      walk: the graph with the bounds on its pre-activations.
      sides: which linear bounds are wanted.
      inputs: the one array of the walk as the function's argument, which may be a pytree.
    """

    walk: Walk
    sides: Sides
    inputs: Inputs

    @property
    def pre_activations(self) -> dict[str, Interval]:
        """Bounds on the inputs of the nonlinear ops, by label."""
        return intervals_of.pre_activations(self.walk.graph, self.walk.intervals)

    def largest_output(self) -> Float[Array, "*out"]:
        """The largest magnitude of each element of the one output array, by intervals."""
        (output,) = self.walk.graph.outputs
        if not isinstance(output, Perturbed):
            return jnp.abs(output)
        lower, upper = self.walk.intervals[output.index]
        return jnp.maximum(jnp.abs(lower), jnp.abs(upper))

    def interval(self, specification: Specification) -> Interval:
        """Interval bounds `[m]` of `<specification_k, f(x)>`, from the pre-activation bounds."""
        return self.walk.merged(*problems.starts_of(self.walk.graph, specification))

    @overload
    def bounds(
        self,
        specification: None = None,
        *,
        within: Mapping[str, Interval] | None = None,
        has_aux: Literal[False] = False,
    ) -> OutputBounds: ...

    @overload
    def bounds(
        self,
        specification: Specification,
        *,
        within: Mapping[str, Interval] | None = None,
        has_aux: Literal[False] = False,
    ) -> Interval: ...

    @overload
    def bounds(
        self,
        specification: Specification | None = None,
        *,
        within: Mapping[str, Interval] | None = None,
        has_aux: Literal[True],
    ) -> tuple[Interval, Auxiliary]: ...

    def bounds(
        self,
        specification: Specification | None = None,
        *,
        within: Mapping[str, Interval] | None = None,
        has_aux: bool = False,
    ) -> Any:
        """The bounds that `linear` returns.

        Args:
          specification: `[m, *out]`, or None for every output.
          within: intervals of some `pre_activations` by label, one for each row of the
            specification, `[m, *shape]`. Row `k` then holds for the part of the input set on which
            these values lie in their `k`-th intervals; if that part is empty, it may be anything.
            One walk thus bounds all parts of a case distinction (the two halves of a split ReLU).
          has_aux: also return `Auxiliary`.

        Raises:
          KeyError: for an entry of `within` that is the label of no op.
          ValueError: for an entry of another shape, or `within` without a specification.
        """
        walk, graph, sides = self.walk, self.walk.graph, self.sides
        if specification is not None:
            starts, constant = problems.starts_of(graph, specification)
            ends = walk.row_ends(within or {}, len(specification))
            result, aux = _specification(walk, starts, constant, sides, ends)
            return (result, aux.of_inputs(self.inputs)) if has_aux else result
        if within:
            raise ValueError("within needs a specification: it has an interval for each row")
        if has_aux:
            result, aux = _units(walk, problems.node_of_output(graph), sides)
            return result, aux.of_inputs(self.inputs)
        leaves = [
            _output(walk, o.index, sides) if isinstance(o, Perturbed) else Interval(o, o)
            for o in graph.outputs
        ]
        return jax.tree.unflatten(graph.output_tree, leaves)


@overload
def relax(
    function: ArrayFunction, **options: Unpack[RelaxOptions]
) -> Callable[[InputTree], Relaxation[Interval]]: ...


@overload
def relax(
    function: TreeFunction, **options: Unpack[RelaxOptions]
) -> Callable[[InputTree], Relaxation[Any]]: ...


def relax(
    function: TreeFunction,
    *,
    slopes: Slopes | Optimized = "adaptive",
    intermediate: Intermediate = "interval",
    sides: Sides = "both",
    intersect: bool = True,
    known: Mapping[str, Interval] | None = None,
    max_rows: int | None = None,
    max_bytes: int = 2**30,
    rounding: Rounding = "nearest",
) -> Callable[[InputTree], Relaxation[Any]]:
    """Like `linear`, but bounds the pre-activations once for several specifications.

    Args:
      function, slopes, intermediate, sides, intersect, max_rows, max_bytes, rounding: as for
        `linear`.
      known: bounds on pre-activations from elsewhere, by the labels of `pre_activations`; the
        result holds for the part of the input set on which they do. They are intersected with the
        computed bounds; a contradiction is an error, or NaN under `jit`. Bounds on predicates are
        not used.

    Returns:
      `relaxed(input_set)`: a `Relaxation` with `interval(specification)`,
      `bounds(specification)` and `pre_activations`. If it is made inside a differentiated function,
      it is differentiated once for all its specifications.

    Raises:
      UnsupportedOpError, NoProofError, ValueError: as `linear`; ValueError also for known bounds
        that have another shape or contradict the computed bounds.
      KeyError: for known bounds whose label belongs to no op.
    """
    optimized = slopes if isinstance(slopes, Optimized) else None
    start = slopes.start if isinstance(slopes, Optimized) else slopes
    policy_of = slope_policies.resolve(start)
    if intermediate not in _SOURCES:
        raise ValueError(f"intermediate must be one of {', '.join(_SOURCES)}, got {intermediate!r}")
    if sides not in ("lower", "upper", "both"):
        raise ValueError(f"sides must be 'lower', 'upper' or 'both', got {sides!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    problems.require_rounding(rounding)
    if optimized is not None and optimized.optimize_intermediate and intermediate != "linear":
        raise ValueError(
            "optimize_intermediate needs intermediate='linear', got "
            f"intermediate={intermediate!r}: there are no slopes behind those bounds"
        )

    def relaxed(input_set: InputTree) -> Relaxation[Any]:
        graph, input_set, inputs = problems.traced(function, input_set, rounding)
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
            rounding=rounding,
        )
        return Relaxation(walk, sides, inputs)

    return relaxed


# Companions of the interval walk by name; `"linear"` is an option of the walk itself.
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
    return _units(walk, node, sides)[0]


def _units(walk: Walk, node: Node, sides: Sides) -> tuple[Interval, Auxiliary]:
    """Bounds `[*shape]` of a node by the specification that has one row per unit."""
    zero = jnp.zeros((node.size,), node.dtype)
    bounds, aux = _specification(walk, {node.index: node.unit_rows()}, zero, sides)
    return Interval(*(end.reshape(node.shape) for end in bounds)), aux


def _specification(
    walk: Walk,
    starts: Mapping[int, Array],
    constant: Array,
    sides: Sides,
    ends: RowEnds | None = None,
) -> tuple[Interval, Auxiliary]:
    """Bounds of a specification whose coefficients start at the nodes of `starts`."""
    merged = walk.merged(starts, constant)
    positions, seen = None, None
    if walk.optimized is not None:
        positions, seen = _optimized(walk, walk.optimized, starts, constant, sides, ends)
    rows: dict[str, Array] = {}
    walked = walk.pull_back(starts, sides, positions, rows, ends)
    lower, upper = walked.concretize(walk.input_set)
    bounds = Interval(
        merged.lower if lower is None else lower + constant,
        merged.upper if upper is None else upper + constant,
    )
    side = walked.above if sides == "upper" else walked.below
    assert side is not None, "the walk returns the sides that were asked for"
    aux = Auxiliary(
        interval=merged,
        linear=bounds,
        pre_activations=intervals_of.pre_activations(walk.graph, walk.intervals),
        slopes=walk.relaxations.slopes if positions is None else positions,
        coefficients=walked.in_input(walk.references[0]),
        rows=rows,
        worst_input=walk.worst_input(side),
    )
    if seen is not None:
        # Another iterate may have been better for some rows. It is sound, and no gradient flows.
        bounds = walk.intersect(bounds, seen)
    return walk.intersect(merged, bounds), aux


def _optimized(
    walk: Walk,
    options: Optimized,
    starts: Mapping[int, Array],
    constant: Array,
    sides: Sides,
    ends: RowEnds | None,
) -> tuple[Positions, Interval]:
    """The best positions, and the best bounds of all iterates."""
    best = walk.best(starts, sides, options.per_spec, constant, ends)
    count = constant.shape[0]
    infinite = jnp.full_like(constant, jnp.inf)
    values = jax.lax.stop_gradient(best.values)
    lower = -infinite if sides == "upper" else values[:count]
    upper = infinite if sides == "lower" else -values[-count:]
    return best.parameters, Interval(lower, upper)

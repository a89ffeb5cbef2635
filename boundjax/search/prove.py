"""Proves what a JAX function does on an input set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.properties import Case, Conjunction, OutputProperty, Property
from boundjax.search.constraints import Constraints
from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES
from boundjax.search.method import Method
from boundjax.search.programs import Programs
from boundjax.search.result import Result
from boundjax.search.search import Evaluate, verify
from boundjax.sets import rounding as rounding_of_sets
from boundjax.sets.ball import LpBall
from boundjax.sets.box import Box
from boundjax.sets.checks import require_input_set
from boundjax.sets.constrained import Constrained
from boundjax.sets.input_set import InputSet, InputTree
from boundjax.sets.inputs import Inputs, inputs_of
from boundjax.sets.product import Product
from boundjax.sets.rounding import Rounding
from boundjax.tracing.statements import Statement, statement_of
from boundjax.typing import Device

_Ends = tuple[np.ndarray, np.ndarray]


def prove(
    function: Callable[[Any], Array],
    input_set: InputTree,
    property: OutputProperty | Callable[..., Any],
    *,
    method: Method = "complete",
    timeout: float = 60.0,
    rounding: Rounding = "float32",
    programs: Programs | None = None,
    devices: Sequence[Device] | None = None,
    max_bytes: int | None = None,
    max_queue_bytes: int = MAX_QUEUE_BYTES,
    max_split_inputs: int = 20,
    seed: int = 0,
    with_proof: bool = False,
) -> Result:
    """Proves that a property holds at every input of a set, or finds an input where it does not.

    Args:
      function: any JAX function of one float32 array `[*shape]`, or of a pytree, with one array
        `[*out]` as its result, or with any pytree if the property is a function; it may close over
        weights.
      input_set: a `boundjax.Box`, or a ball of the norm inf (`boundjax.LpBall`, with or without a
        clip range; what a `boundjax.Threat` returns), float32; a `boundjax.Constrained` of one;
        or a pytree of boxes and balls and of arrays that are not perturbed.
      property: what is to hold: a function of the outputs, or of the outputs and the input, that
        returns booleans made of comparisons, `lambda y: (y[0] > y[1]) & ~(y[2] >= jnp.max(y[3:]))`
        or `lambda y, x: y[0] >= x[0]`, all of which are to hold; or an `OutputProperty`, such as
        `boundjax.properties.predicts(label, classes)` or `boundjax.properties.all_positive(rows)`.
      method: the tightest bounds to try: `"complete"` splits the box and the units of piecewise
        linear ops; `"interval"`, `"crown-ibp"`, `"crown"` and `"alpha-crown"` bound the whole box.
      timeout: seconds of wall-clock time, compilation included. It is checked between compiled
        calls.
      rounding: what a proof holds for, see `boundjax.linear`.
      programs: `Programs(function, shape)` of `boundjax.search`, made with the same function and
        rounding: several calls then compile once. None for a set with constraints, for a pytree,
        whose constants they hold, and for a property that is a function.
      devices: local devices, such as `jax.local_devices()`, that divide the parts of the box that
        are bounded at a time, without communication; by default JAX's default device. Batches grow
        with their number, so the search may split in another order. State them to `Programs`
        instead where you pass some; so with `max_bytes`.
      max_bytes: the most memory, estimated, that one call may take on a device, 2 ** 30 by default.
      max_queue_bytes: the most memory of the host for parts of the box that are still open; while
        some are added it may be twice as much. If it does not suffice the verdict is `"unknown"`
        and the `note` says so.
      max_split_inputs: boxes with at most this many inputs of positive width are cut along inputs,
        others along units.
      seed: of the random points of the attack.
      with_proof: whether the result has a `proof` for `boundjax.save_proof`; needs the method
        `"complete"`, a set without constraints and an `OutputProperty`. It numbers the inputs of a
        pytree in the order of its leaves.

    Returns:
      A `Result`: `"unsat"` if the property is proved (`Result.proved`), `"sat"` with a
      counterexample in the shapes of the input (a pytree is one of numpy arrays, with the constants
      that were given) and the output, `"unknown"` or `"timeout"`. A
      counterexample lies in the exact set, and its outputs, as the function computes them, do not
      have the property in exact arithmetic; for a property that is a function, that function is
      false there.

    Raises:
      TypeError: for anything that is not an input set, another dtype than float32, or a function
        that does not return one array (one boolean array, if it is the property).
      ValueError: for a set that is not a box, a property that is no combination of comparisons, or
        as `boundjax.verify.verify`.
      UnsupportedOpError, NoProofError: as `boundjax.verify.verify`.
    """
    if not isinstance(property, OutputProperty) and not callable(property):
        raise TypeError(
            "property must be a function of the outputs, such as lambda y: y[0] > y[1], or an "
            "OutputProperty, such as boundjax.properties.all_positive(rows), got "
            f"{type(property).__name__}"
        )
    inputs, constraints = inputs_of(input_set), None
    if inputs.is_tree and programs is not None:
        raise ValueError(
            "programs serve a function of one array, got an input that is a pytree; leave them out"
        )
    flat = inputs.input_set
    if isinstance(flat, Constrained):
        constraints, flat = Constraints.of(flat), flat.base
    outer, inner = ends_of(flat)
    example, whole = outer[0], inputs.applied(function)
    evaluate: Evaluate | None = None
    if not isinstance(property, OutputProperty):
        if programs is not None or with_proof:
            name = "with_proof=True" if with_proof else "programs"
            raise ValueError(f"{name} needs an OutputProperty, got a property that is a function")
        of_values = _of_values(property, whole, inputs)
        statement = statement_of(of_values, example)
        unsafe, bounded = _unsafe(statement), statement.differences
        evaluate = _evaluate(of_values, bounded, example.shape)
    else:
        unsafe, bounded = property.unsafe, whole
    output = jax.eval_shape(bounded, jax.ShapeDtypeStruct(example.shape, example.dtype))
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise TypeError(f"function must return one array, got {type(output).__name__}")
    case = Case.flattened(outer, inner, unsafe)
    if constraints is not None:
        if programs is not None:
            raise ValueError(
                "programs serve a box, got an input set with constraints; leave programs out"
            )
        programs = Programs(
            bounded,
            example.shape,
            rounding=rounding,
            max_bytes=MAX_BYTES if max_bytes is None else max_bytes,
            devices=devices,
            constraints=constraints,
        )
        devices = max_bytes = None
    result = verify(
        bounded,
        Property(example.size, unsafe[0].weights.shape[1], (case,)),
        method=method,
        timeout=timeout,
        rounding=rounding,
        input_shape=example.shape,
        evaluate=evaluate,
        programs=programs,
        devices=devices,
        max_bytes=max_bytes,
        max_queue_bytes=max_queue_bytes,
        max_split_inputs=max_split_inputs,
        seed=seed,
        with_proof=with_proof,
    )
    if result.counterexample is None:
        return result
    point = result.counterexample
    x = point.inputs.reshape(example.shape)
    if isinstance(property, OutputProperty):
        outputs: Any = point.outputs.reshape(output.shape)
    else:
        outputs = jax.tree.map(np.asarray, jax.jit(whole)(jnp.asarray(x)))
    shaped = dataclasses.replace(point, inputs=inputs.restored(x), outputs=outputs)
    return dataclasses.replace(result, counterexample=shaped)


def _of_values(
    property: Callable[..., Any], function: Callable[[Array], Any], inputs: Inputs
) -> Callable[[Array], Any]:
    """A property of outputs, or of outputs and inputs, as a function of the one array."""
    try:
        parameters = inspect.signature(property).parameters.values()
    except ValueError:  # of some builtins
        parameters = ()
    needed = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if len(needed) > 2:
        raise TypeError(
            "property must take the outputs, or the outputs and the input, got a function of "
            f"{len(needed)} arguments"
        )

    def of_values(x: Array) -> Any:
        arguments = (function(x), inputs.restored(x))
        return property(*arguments[: max(1, len(needed))])

    return of_values


def _unsafe(statement: Statement) -> tuple[Conjunction, ...]:
    """The differences that refute a statement."""
    count = 1 + max(literal.index for literals in statement.refuted for literal in literals)
    conjunctions: list[Conjunction] = []
    for literals in statement.refuted:
        weights = np.zeros((len(literals), count))
        for row, literal in enumerate(literals):
            weights[row, literal.index] = literal.sign
        strict = tuple(literal.strict for literal in literals)
        conjunctions.append(
            Conjunction(weights, np.zeros(len(literals)), None, strict if any(strict) else None)
        )
    return tuple(conjunctions)


def _evaluate(
    of_values: Callable[[Array], Any],
    differences: Callable[[Array], Array],
    shape: tuple[int, ...],
) -> Evaluate:
    """The differences, or NaN where the statement itself holds: rounding may hide a sign."""
    both = jax.jit(lambda x: (jnp.all(of_values(x)), differences(x)))

    def evaluate(x: np.ndarray) -> np.ndarray:
        holds, values = both(jnp.asarray(x).reshape(shape))
        values = np.asarray(values)
        return np.full_like(values, np.nan) if holds else values

    return evaluate


def ends_of(input_set: InputSet) -> tuple[_Ends, _Ends]:
    """The ends of a box: rounded outwards, for proofs, and inwards, for counterexamples.

    Raises:
      TypeError: for anything that is not an input set, or another dtype than float32.
      ValueError: for a set that is not a box, has no elements, or no points.
    """
    require_input_set(input_set)
    if isinstance(input_set, Product):
        outers, inners = zip(*map(ends_of, input_set.parts), strict=True)
        return _joined(outers), _joined(inners)
    if isinstance(input_set, Box):
        low, high = input_set.lower, input_set.upper
    elif isinstance(input_set, LpBall) and input_set.is_box:
        low = high = input_set.center
        _require_points(input_set)
    else:
        norm = f" with p = {input_set.p:g}" if isinstance(input_set, LpBall) else ""
        raise ValueError(
            "the search needs a box, a boundjax.Box or a ball of the norm inf, got "
            f"{type(input_set).__name__}{norm}; what is proved for the box around it, "
            "boundjax.Box(*input_set.interval()), holds for the set"
        )
    # A list of numbers is float64 until a dtype is chosen for it.
    dtypes = {np.dtype(getattr(end, "dtype", np.float64)) for end in (low, high)}
    if dtypes != {np.dtype(np.float32)}:
        names = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(
            f"the search computes in float32, got an input set of {names}; convert it with "
            "jnp.float32"
        )
    if np.size(low) == 0:
        raise ValueError(f"the input set must have elements, got shape {np.shape(low)}")
    ends = input_set.outwards().interval()
    outer = np.asarray(ends.lower), np.asarray(ends.upper)
    if isinstance(input_set, Box):
        return outer, (np.asarray(low), np.asarray(high))
    return outer, rounding_of_sets.inward_ends(np.asarray(low), input_set.eps, input_set.clip)


def _joined(boxes: Iterable[_Ends]) -> _Ends:
    """The box `[n]` of several boxes, one after the other in C order."""
    lower, upper = (
        np.concatenate([end.reshape(-1) for end in ends]) for ends in zip(*boxes, strict=True)
    )
    return lower, upper


def _require_points(ball: LpBall) -> None:
    """Checks that a ball of the norm inf meets its clip range, in exact arithmetic.

    Raises:
      ValueError: if it has no points. Its interval is then the nearest part of the clip range.
    """
    if ball.clip is None:
        return
    center = np.asarray(ball.center, np.float64)
    low, high, eps = (
        np.broadcast_to(np.asarray(array, np.float64), center.shape)
        for array in (*ball.clip, ball.eps)
    )
    nearest = np.clip(center, low, high)
    for index in zip(*np.nonzero(nearest != center), strict=True):
        numbers = [float(array[index]) for array in (nearest, center, eps)]
        end, middle, radius = map(Fraction, numbers)
        if abs(end - middle) > radius:
            raise ValueError(
                "the ball must meet its clip range, got none of its points in "
                f"[{low[index]:g}, {high[index]:g}] at index {tuple(map(int, index))}: center "
                f"{center[index]:g}, eps {eps[index]:g}"
            )

"""Control flow while tracing: loops are unrolled, branches picked or merged by a select.

Control flow that cannot be resolved becomes a node without an entry in the table, which is an error
only if an output depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from boundjax.ir.node import NoProofError, Perturbed
from boundjax.tracing import jaxprs
from boundjax.tracing.builder import Builder, Rule
from boundjax.tracing.jaxprs import Place, Scan


@dataclasses.dataclass(frozen=True, eq=False)
class Repeated:
    """The parameter `loop` of a node of the family `Loop`.

    The node's value concatenates some of the scan's outputs to one vector, so that the loop runs
    once for all of them.

    Attributes:
      scan: the body and the roles of the node's operands.
      perturbed: which operands of the *body* depend on the input, after any number of steps.
      outputs: positions of the outputs that the value holds.
    """

    scan: Scan
    perturbed: tuple[bool, ...]
    outputs: tuple[int, ...]


def _scan(builder: Builder, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
    scan = jaxprs.scan_of(eqn)
    if scan.length > jaxprs.most_steps():
        return _long_scan(builder, eqn, scan, operands, place)
    consts, carry, xs = ([operands[i] for i in role] for role in scan[3:])
    avals = jaxprs.outputs_of(eqn)[len(carry) :]
    ys: list[list[Any]] = [[None] * scan.length for _ in avals]
    steps = range(scan.length)
    for step in reversed(steps) if scan.reverse else steps:
        slices = builder.inline(functools.partial(_slices, step), xs, place)
        outputs = builder.run(scan.body, [*consts, *carry, *slices], place)
        carry = outputs[: len(carry)]
        for stacked, y in zip(ys, outputs[len(carry) :], strict=True):
            stacked[step] = y
    stacks = []
    for aval, values in zip(avals, ys, strict=True):
        if values:
            stacks += builder.inline(lambda *v: jnp.stack(v), values, place)
        else:
            stacks.append(jnp.zeros(aval.shape, aval.dtype))
    return [*carry, *stacks]


def _slices(index: int, *xs: Any) -> list[Any]:
    return [lax.index_in_dim(x, index, 0, keepdims=False) for x in xs]


def _long_scan(
    builder: Builder, eqn: Any, scan: Scan, operands: list[Any], place: Place
) -> list[Any]:
    """Appends one node per dtype for the perturbed outputs (`Repeated`), evaluates the rest."""
    perturbed, outputs = _dependence(builder, scan, operands)
    evaluate = jaxprs.evaluator(eqn)
    avals = jaxprs.outputs_of(eqn)
    results: list[Any] = [None] * len(avals)
    if not all(outputs):
        # The constant outputs depend on no perturbed operand, so zeros can stand in for those.
        plain = [_zeros(builder.shape(o)) if isinstance(o, Perturbed) else o for o in operands]
        for k, value in enumerate(evaluate(*plain)):
            if not outputs[k]:
                results[k] = value
                if builder.formulas is not None:
                    builder.formulas.add_unknown("scan", place, [value])
    for dtype in dict.fromkeys(a.dtype for a, p in zip(avals, outputs, strict=True) if p):
        positions = tuple(k for k, a in enumerate(avals) if outputs[k] and a.dtype == dtype)

        def packed(*values: Any, positions: tuple[int, ...] = positions) -> Any:
            scanned = evaluate(*values)
            return jnp.concatenate([jnp.ravel(scanned[k]) for k in positions])

        size = sum(int(np.prod(avals[k].shape)) for k in positions)
        node = builder.append(
            "scan",
            {"loop": Repeated(scan, perturbed, positions)},
            operands,
            place,
            packed,
            jax.ShapeDtypeStruct((size,), dtype),
        )
        start = 0
        for k in positions:
            stop = start + int(np.prod(avals[k].shape))
            part = functools.partial(_part, start=start, stop=stop, shape=avals[k].shape)
            (results[k],) = builder.inline(part, [node], place)
            start = stop
    return results


def _zeros(shape: jax.ShapeDtypeStruct) -> Any:
    return jnp.zeros(shape.shape, shape.dtype)


def _part(value: Any, *, start: int, stop: int, shape: tuple[int, ...]) -> Any:
    return lax.reshape(lax.slice(value, (start,), (stop,)), shape)


def _dependence(
    builder: Builder, scan: Scan, operands: list[Any]
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Finds the perturbed operands and outputs of the body: the least fixed point of its carry.

    Raises:
      UnsupportedOpError: at an op of the body that the table does not cover.
    """
    marks = [isinstance(o, Perturbed) for o in operands]
    shapes = [builder.shape(o) for o in operands]
    for k in scan.xs:
        shapes[k] = jax.ShapeDtypeStruct(shapes[k].shape[1:], shapes[k].dtype)
    # Operands that change from step to step are abstract; the rest keep their values.
    changing = (*scan.carry, *scan.xs)
    while True:
        outputs: list[bool] = []

        def trace(
            values: Mapping[int, Any], marks: Sequence[bool] = marks, outputs: list[bool] = outputs
        ) -> None:
            arguments = [
                shapes[k] if marks[k] else values.get(k, operands[k]) for k in range(len(shapes))
            ]
            built = builder.nested(scan.body, arguments)
            outputs += [isinstance(o, Perturbed) for o in built.outputs]

        jax.eval_shape(trace, {k: shapes[k] for k in changing if not marks[k]})
        spread = [k for k, o in zip(scan.carry, outputs, strict=False) if o and not marks[k]]
        if not spread:
            carried = [marks[k] for k in scan.carry]
            # A carry that starts perturbed may end perturbed: the loop may run for zero steps.
            ends = [o or c for o, c in zip(outputs, carried, strict=False)]
            return tuple(marks), (*ends, *outputs[len(carried) :])
        for k in spread:
            marks[k] = True


def _while(builder: Builder, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
    loop = jaxprs.while_of(eqn)
    tests, consts, carry = ([operands[i] for i in role] for role in loop[2:])
    for _ in range(jaxprs.most_steps() + 1):
        (more,) = builder.run(loop.condition, [*tests, *carry], place)
        if isinstance(more, (Perturbed, Tracer)):
            why = "depends on the perturbed input" if isinstance(more, Perturbed) else _UNKNOWN
            return _refused(builder, eqn, operands, place, f"its trip count {why}; {_FIXED}")
        _require_exact(builder, more, "the trip count of a loop", place)
        if not bool(more):
            return carry
        carry = builder.run(loop.body, [*consts, *carry], place)
    return _refused(
        builder,
        eqn,
        operands,
        place,
        f"it takes more than {jaxprs.most_steps()} steps (boundjax.unroll_limit); {_FIXED}",
    )


_UNKNOWN = "is not known while tracing"
_FIXED = "use jax.lax.scan, or fori_loop with Python integers as its bounds"


def _cond(builder: Builder, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
    index, *arguments = operands
    branches = jaxprs.branches_of(eqn)
    if not isinstance(index, Perturbed):
        _require_exact(builder, index, "the branch of a cond", place)
    if not isinstance(index, (Perturbed, Tracer)):
        position = min(max(int(np.asarray(index)), 0), len(branches) - 1)
        return builder.run(branches[position], arguments, place)
    if isinstance(index, Perturbed):
        # lax.cond casts its predicate to an index, but only the predicate has bounds.
        node = builder.nodes[index.index]
        source = node.operands[0] if node.primitive == "convert_element_type" else None
        if source is not None and builder.shape(source).dtype == jnp.bool_ and len(branches) == 2:
            index = source
    outputs = [builder.run(branch, arguments, place) for branch in branches]
    last = len(branches) - 1

    def select(which: Any, *cases: Any) -> Any:
        if jnp.issubdtype(which.dtype, jnp.floating):  # carried, see `integers`
            result = cases[-1]
            for k in range(last - 1, -1, -1):
                result = jnp.where(which < k + 0.5, cases[k], result)
            return result
        if which.dtype != jnp.bool_:
            which = lax.clamp(np.int32(0), which, np.int32(last))
        return lax.select_n(lax.broadcast(which, cases[0].shape), *cases)

    results = []
    for cases in zip(*outputs, strict=True):
        results += builder.inline(select, [index, *cases], place)
    return results


def _require_exact(builder: Builder, constant: Any, what: str, place: Place) -> None:
    """Checks that a constant on which control flow depends is not rounded.

    Raises:
      NoProofError: if it is; with its exact value the function might do something else.
    """
    if builder.formulas is not None and builder.formulas.of(constant) is not None:
        raise NoProofError(
            f"{what} at {place.location} depends on a rounded constant; compute it beforehand, or "
            "take rounding='nearest'"
        )


def _refused(
    builder: Builder, eqn: Any, operands: list[Any], place: Place, advice: str
) -> list[Perturbed]:
    """Appends nodes without an entry in the table; their error gives the advice."""
    evaluate = jaxprs.evaluator(eqn)
    return [
        builder.append(
            eqn.primitive.name,
            {"advice": advice},
            operands,
            place,
            lambda *values, k=k: evaluate(*values)[k],
            aval,
        )
        for k, aval in enumerate(jaxprs.outputs_of(eqn))
    ]


RULES: Mapping[str, Rule] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

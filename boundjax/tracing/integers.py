"""Equations on perturbed integers: casts, counts, indices, and selections by an index.

A perturbed integer is carried in the dtype of the input as a whole number (`ops.whole`), so that
the graph of a count or of a lookup consists of ordinary ops. An operand is such an integer if its
equation expects one and its node holds a floating-point number. What is computed is marked with the
range of its type, outside of which it has no bounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.ir import table
from boundjax.ir.node import Perturbed
from boundjax.ops import order, whole
from boundjax.tracing import indices, jaxprs
from boundjax.tracing.builder import ON_INTEGERS, Builder, Rule
from boundjax.tracing.jaxprs import Place

# Ops whose value consists of elements of their operands.
_MOVES = frozenset(
    [
        "broadcast_in_dim", "concatenate", "copy", "copy_p", "cummax", "cummin", "expand_dims",
        "max", "min", "reduce_max", "reduce_min", "reshape", "rev", "slice", "split", "squeeze",
        "stack", "stop_gradient", "tile", "transpose", "unstack",
    ]
)  # fmt: skip
# Ops that leave the range in which floats are exact integers only if their value does.
_COMPUTES = frozenset(
    [
        "abs", "add", "clamp", "cumsum", "integer_pow", "mul", "neg", "pad", "reduce_prod",
        "reduce_sum", "sign", "square", "sub",
    ]
)  # fmt: skip
# Elements of the array of all rows that an index may read, for all places where it reads.
_LARGEST = 2**28
_COMPARES = frozenset(["eq", "ge", "gt", "le", "lt", "ne"])

_WHY = (
    "it computes with integers that depend on the perturbed input, of which only casts, sums, "
    "differences, products, comparisons, selections and reads at an index have bounds; compute it "
    "in floating point, or move it out of the bounded function"
)


class _Traced(NamedTuple):
    """A function in place of an equation, and its operands."""

    function: Callable[..., Any]
    operands: Sequence[Any]


def _equation(builder: Builder, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
    """Traces an equation that takes or makes perturbed integers, in floating point."""
    shapes = [builder.shape(o) for o in operands if isinstance(o, Perturbed)]
    # The input itself, or what a long loop carries, may be an integer.
    carried = not any(jnp.issubdtype(shape.dtype, jnp.integer) for shape in shapes)
    dtype = builder.nodes[0].dtype
    if carried and eqn.primitive.name in ("sort", "top_k"):
        return []  # the op's expansion makes floats of the indices
    traced = None
    if carried and jnp.issubdtype(dtype, jnp.floating):
        traced = _traced(builder, eqn, operands, dtype)
    if traced is None:
        return _refused(builder, eqn, operands, place, _WHY)
    if isinstance(traced, str):
        return _refused(builder, eqn, operands, place, traced)
    return builder.inline(traced.function, traced.operands, place)


def _traced(
    builder: Builder, eqn: Any, operands: list[Any], dtype: np.dtype
) -> _Traced | str | None:
    """What to trace in floating point; a reason, or None, if there are no bounds."""
    name = eqn.primitive.name
    first, result = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    function: Callable[..., Any] | None = None
    if name == "convert_element_type":
        function = _cast(first, result, dtype)
    elif name in ("argmax", "argmin"):
        function = functools.partial(_extreme_index, eqn, dtype)
    elif name == "select_n" and first != jnp.bool_ and isinstance(operands[0], Perturbed):
        return _selection(builder, eqn, operands, dtype)
    elif name == "select_n" and (case := _chosen(operands)) is not None:
        function, operands = functools.partial(as_float, dtype=dtype), [operands[1 + case]]
    elif indices.is_read(name, operands):
        return indices.read(eqn, operands, dtype, _LARGEST)
    elif name == "select_n" or indices.reads(name):
        selects, places = name == "select_n", range(len(operands))
        kept = [k == 0 if selects else indices.is_index(name, k) for k in places]
        function = functools.partial(_rebound, eqn, dtype, kept)
    elif name in _MOVES:
        function = functools.partial(_rebound, eqn, dtype, ())
    elif name in _COMPARES:
        function = functools.partial(_compared, eqn, dtype)
    elif name in _COMPUTES:
        function = functools.partial(_computed, eqn, dtype)
    return None if function is None else _Traced(function, operands)


def as_float(value: Array, dtype: np.dtype) -> Array:
    """An operand as it is carried; a constant integer that is too large to be exact is NaN."""
    if not jnp.issubdtype(value.dtype, jnp.integer):
        return value
    most, info = whole.largest_exact(dtype), np.iinfo(value.dtype)
    number = value.astype(dtype)
    if info.max <= most:
        return number
    return jnp.where(jnp.abs(number) < most, number, jnp.asarray(np.nan, dtype))


def _rebound(eqn: Any, dtype: np.dtype, kept: Sequence[bool], *values: Array) -> Any:
    """The equation on floats, but for the operands that are kept."""
    kept = kept or (False,) * len(values)
    floats = [v if k else as_float(v, dtype) for v, k in zip(values, kept, strict=True)]
    result = eqn.primitive.bind(*floats, **eqn.params)
    return list(result) if eqn.primitive.multiple_results else result


def _compared(eqn: Any, dtype: np.dtype, *values: Array) -> Array:
    """A comparison of integers, which are whole: ends that rounding moved say nothing else."""
    source = eqn.invars[0].aval.dtype
    if jnp.issubdtype(source, jnp.integer):
        carried = (jnp.issubdtype(v.dtype, jnp.floating) for v in values)
        values = tuple(
            whole.held(v, source) if c else v for v, c in zip(values, carried, strict=True)
        )
    return _rebound(eqn, dtype, (), *values)


def _computed(eqn: Any, dtype: np.dtype, *values: Array) -> Array:
    operand = eqn.invars[0].aval
    if eqn.primitive.name == "reduce_sum":
        terms = math.prod(operand.shape[axis] for axis in eqn.params["axes"])
        values = tuple(whole.within(v, operand.dtype, terms) for v in values)
    return whole.within(_rebound(eqn, dtype, (), *values), eqn.outvars[0].aval.dtype)


def _cast(source: np.dtype, target: np.dtype, dtype: np.dtype) -> Callable[[Array], Array] | None:
    """A cast from or to integers; other floating dtypes than the input's are refused."""

    def cast(x: Array) -> Array:
        if target == jnp.bool_:
            return x != 0
        if source == jnp.bool_:
            return x.astype(dtype)
        if jnp.issubdtype(source, jnp.floating):
            return whole.truncated(x, target)
        return whole.within(x, target) if jnp.issubdtype(target, jnp.integer) else x

    floats = (d for d in (source, target) if jnp.issubdtype(d, jnp.floating))
    return cast if all(d == dtype for d in floats) else None


def _extreme_index(eqn: Any, dtype: np.dtype, x: Array) -> Array:
    (axis,) = eqn.params["axes"]
    x = x.astype(dtype) if x.dtype == jnp.bool_ else x
    return order.index_of_largest(x, axis, 1 if eqn.primitive.name == "argmax" else -1)


def _selection(builder: Builder, eqn: Any, operands: list[Any], dtype: np.dtype) -> _Traced:
    """A selection by an index, as selections by predicates one inside the other."""
    index, *cases = operands
    predicates = _first_true(builder, index, len(cases))

    def by_index(which: Array, *values: Array) -> Array:
        floats = [as_float(v, dtype) for v in values]
        result = floats[-1]
        for k in range(len(floats) - 2, -1, -1):
            result = jnp.where(which < k + 0.5, floats[k], result)
        return result

    def by_predicates(stacked: Array, *values: Array) -> Array:
        floats = [as_float(v, dtype) for v in values]
        result = floats[0]  # the index is 0 where no predicate is true
        for k in range(len(floats) - 1, -1, -1):
            result = jnp.where(stacked[k], floats[k], result)
        return result

    if predicates is not None:
        return _Traced(by_predicates, [predicates, *cases])
    return _Traced(by_index, operands)


def _chosen(operands: Sequence[Any]) -> int | None:
    """The only case that a selection by a constant predicate chooses; None if there are several."""
    which = operands[0]
    if isinstance(which, Perturbed | Tracer) or not np.size(which):
        return None
    values = np.asarray(which).reshape(-1)
    return int(values[0]) if (values == values[0]).all() else None


def _first_true(builder: Builder, index: Perturbed, count: int) -> Perturbed | None:
    """The predicates `[count, ...]` of which an index names the first true one (`jnp.select`)."""
    node = builder.nodes[index.index]
    if node.primitive != "argmax" or node.params["sign"] < 0 or node.params["axis"] != 0:
        return None
    cast = builder.nodes[node.inputs[0]]
    source = cast.operands[0] if cast.primitive == "convert_element_type" else None
    if not isinstance(source, Perturbed) or builder.nodes[source.index].dtype != np.bool_:
        return None
    return source if builder.nodes[source.index].shape[0] == count else None


def _refused(
    builder: Builder, eqn: Any, operands: list[Any], place: Place, advice: str
) -> list[Perturbed]:
    evaluate = jaxprs.evaluator(eqn)
    return [
        builder.append(
            eqn.primitive.name,
            {} if table.is_refused(eqn.primitive.name) else {"advice": advice},
            operands,
            place,
            lambda *values, k=k: evaluate(*values)[k],
            aval,
        )
        for k, aval in enumerate(jaxprs.outputs_of(eqn))
    ]


RULES: Mapping[str, Rule] = {ON_INTEGERS: _equation}

"""A statement about a value: comparisons of numbers, combined by `&`, `|`, `~`, `all` and `any`.

`statement_of` evaluates the jaxpr of a boolean function equation by equation. Beside its value,
every boolean has a formula as soon as it is made of comparisons, and the formula of the result says
which comparisons decide it. The numbers that are compared are the outputs of another function,
which bounds and searches take like any network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.tracing import jaxprs

MAX_DISJUNCTS = 20_000

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
# Ops that only move elements, and so move formulas.
_MOVES = (
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "copy_p",
    "dynamic_slice",
    "expand_dims",
    "gather",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "stack",
    "transpose",
)


class Atom(NamedTuple):
    """A comparison of the difference with this index to 0: `"lt"`, `"le"` or `"eq"`."""

    index: int
    kind: str


class Combined(NamedTuple):
    """`"and"`, `"or"` or `"not"` of formulas; no parts at all are true or false."""

    kind: str
    parts: tuple[Formula, ...]


Formula: TypeAlias = Atom | Combined
_TRUE, _FALSE = Combined("and", ()), Combined("or", ())


class Literal(NamedTuple):
    """`sign * difference <= 0`, or `< 0` if it is strict."""

    index: int
    sign: float
    strict: bool


class Statement(NamedTuple):
    """What a boolean function says.

    Attributes:
      differences: the function's argument -> float32 `[K]`, one for each comparison.
      refuted: the statement is false where all literals of one of these lists hold.
    """

    differences: Callable[[Array], Array]
    refuted: list[list[Literal]]


def statement_of(function: Callable[[Array], Any], example: Any) -> Statement:
    """Reads a function that returns a boolean, or an array of booleans that all are to hold.

    Args:
      function: of one array.
      example: an array, or its shape and dtype.

    Raises:
      TypeError: for a function that returns anything but one boolean array.
      ValueError: if the result is not made of comparisons, is always true or always false, or is
        refuted in more than `MAX_DISJUNCTS` ways.
    """
    shape = jax.ShapeDtypeStruct(jnp.shape(example), jnp.result_type(example))
    closed = jax.make_jaxpr(function)(shape)
    outputs = closed.out_avals
    if len(outputs) != 1 or outputs[0].dtype != np.bool_:
        got = ", ".join(str(output) for output in outputs) or "nothing"
        raise TypeError(f"a property must return one boolean array, made of comparisons, got {got}")
    body = jaxprs.body_of(closed)
    read: list[np.ndarray] = []

    def run(x: Array) -> list[tuple[str, Array, Array]]:
        reading = _Reading()
        _, formulas = reading.run(body, [x], [None])
        read.append(_known(formulas[0]))
        return reading.compared

    jax.eval_shape(lambda x: [pair[1:] for pair in run(x)], shape)
    whole = Combined("and", tuple(read[0].reshape(-1)))
    refuted = list(_disjuncts(whole, negated=True))
    used = sorted({literal.index for conjunction in refuted for literal in conjunction})
    if not used:
        always = "false" if refuted else "true"
        raise ValueError(f"the property is {always} whatever the outputs are; compare them")
    position = {index: k for k, index in enumerate(used)}

    @jax.jit  # inside of which the argument is never concrete
    def differences(x: Array) -> Array:
        return jnp.concatenate([_difference(*pair) for pair in run(x)])[np.asarray(used)]

    return Statement(
        differences,
        [[literal._replace(index=position[literal.index]) for literal in c] for c in refuted],
    )


def _difference(kind: str, left: Array, right: Array) -> Array:
    if kind in ("gt", "ge"):
        left, right = right, left
    return jnp.ravel(left - right).astype(jnp.float32)


def _known(formulas: np.ndarray | str | None) -> np.ndarray:
    """Formulas, unless a text says which op has none.

    Raises:
      ValueError: naming the op.
    """
    if isinstance(formulas, np.ndarray):
        return formulas
    raise ValueError(
        "a property must be made of comparisons by &, |, ~, all and any, outside of loops and "
        f"branches; got a boolean of {formulas or 'another kind'}"
    )


class _Reading:
    """One evaluation of a jaxpr.

    Attributes:
      compared: the two sides of every comparison.
    """

    def __init__(self) -> None:
        self.compared: list[tuple[str, Array, Array]] = []
        self._count = 0

    def run(
        self, body: jaxprs.Body, values: Sequence[Any], formulas: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The values of a body's outputs, and the formulas of those that are boolean."""
        jaxpr = body.jaxpr
        known: dict[Any, tuple[Any, Any]] = {}

        def read(atom: Any) -> tuple[Any, Any]:
            constant = jaxprs.literal(atom)
            return known[atom] if constant is None else (constant, _constant(constant))

        for variable, value in zip(jaxpr.constvars, body.consts, strict=True):
            known[variable] = value, _constant(value)
        known.update(zip(jaxpr.invars, zip(values, formulas, strict=True), strict=True))
        for eqn in jaxprs.live(jaxpr):
            results = self.step(eqn, *zip(*map(read, eqn.invars), strict=True))
            known.update(zip(eqn.outvars, zip(*results, strict=True), strict=True))
        results = [read(variable) for variable in jaxpr.outvars]
        return [value for value, _ in results], [formula for _, formula in results]

    def step(
        self, eqn: Any, values: Sequence[Any] = (), formulas: Sequence[Any] = ()
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """The values of one equation's outputs, and their formulas."""
        name, shapes = eqn.primitive.name, jaxprs.outputs_of(eqn)
        predicates = [shape.dtype == np.bool_ for shape in shapes]
        if name in jaxprs.CALLS and any(predicates):
            return self.run(jaxprs.called(eqn), values, formulas)
        if eqn.effects or any(isinstance(value, Tracer) for value in values):
            results = jaxprs.evaluator(eqn)(*values)
        else:  # what does not depend on the argument stays concrete
            with jax.ensure_compile_time_eval():
                results = jaxprs.evaluator(eqn)(*values)
            return results, [_constant(result) for result in results]
        if not any(predicates):
            return results, [None] * len(results)
        if len(results) > 1:
            return results, [f"'{name}'" if is_predicate else None for is_predicate in predicates]
        return results, [self.formulas(eqn, name, shapes[0].shape, values, formulas)]

    def formulas(
        self,
        eqn: Any,
        name: str,
        shape: tuple[int, ...],
        values: Sequence[Any],
        formulas: Sequence[Any],
    ) -> np.ndarray | str:
        """The formulas of an equation's boolean output; the name of an op that has none."""
        of_numbers = all(jnp.result_type(value) != np.bool_ for value in values)
        if name in _COMPARISONS and of_numbers:
            return self.comparison(name, shape, *values)
        needed = [
            f for f, v in zip(formulas, values, strict=True) if jnp.result_type(v) == np.bool_
        ]
        missing = next((f for f in needed if not isinstance(f, np.ndarray)), None)
        if missing is not None or not needed:
            return missing if isinstance(missing, str) else f"'{name}'"
        if name in ("and", "or"):
            return _each(lambda a, b: Combined(name, (a, b)), *needed)
        if name == "not":
            return _each(_negation, *needed)
        if name in ("xor", "ne"):
            return _each(lambda a, b: _negation(_equal(a, b)), *needed)
        if name == "eq":
            return _each(_equal, *needed)
        if name in ("reduce_and", "reduce_or"):
            kind = name.removeprefix("reduce_")
            return _reduced(lambda parts: Combined(kind, parts), needed[0], eqn.params["axes"])
        if name in _MOVES:
            return _moved(eqn, values, needed)
        return f"'{name}'"

    def comparison(
        self, name: str, shape: tuple[int, ...], left: Array, right: Array
    ) -> np.ndarray:
        """The formulas of a comparison of numbers."""
        first, size = self._count, int(np.prod(shape, dtype=int))
        self._count += size
        self.compared.append((name, jnp.asarray(left), jnp.asarray(right)))
        kind = {"gt": "lt", "ge": "le", "ne": "eq"}.get(name, name)
        atoms: Iterable[Formula] = (Atom(index, kind) for index in range(first, first + size))
        return _array(map(_negation, atoms) if name == "ne" else atoms, shape)


def _array(formulas: Iterable[Formula], shape: Sequence[int]) -> np.ndarray:
    flat = list(formulas)
    result = np.empty(len(flat), object)
    for index, formula in enumerate(flat):  # NumPy would take the tuples apart
        result[index] = formula
    return result.reshape(tuple(shape))


def _each(combine: Callable[..., Formula], *operands: np.ndarray) -> np.ndarray:
    wide = np.broadcast_arrays(*operands)  # an operand may be a scalar
    parts = zip(*(operand.reshape(-1) for operand in wide), strict=True)
    return _array((combine(*part) for part in parts), wide[0].shape)


def _negation(formula: Formula) -> Formula:
    return Combined("not", (formula,))


def _equal(one: Formula, other: Formula) -> Formula:
    both, neither = (one, other), (_negation(one), _negation(other))
    return Combined("or", (Combined("and", both), Combined("and", neither)))


def _reduced(
    combine: Callable[[tuple[Formula, ...]], Formula], operand: np.ndarray, axes: Sequence[int]
) -> np.ndarray:
    kept = [axis for axis in range(operand.ndim) if axis not in axes]
    shape = [operand.shape[axis] for axis in kept]
    moved = operand.transpose([*kept, *axes]).reshape(int(np.prod(shape, dtype=int)), -1)
    return _array((combine(tuple(row)) for row in moved), shape)


def _constant(value: Any) -> np.ndarray | str | None:
    """The formulas of a constant; None unless it is boolean."""
    if jnp.result_type(value) != np.bool_:
        return None
    if isinstance(value, Tracer):
        return "a traced constant"
    value = np.asarray(value)
    return _array((_TRUE if v else _FALSE for v in value.reshape(-1)), value.shape)


def _moved(eqn: Any, values: Sequence[Any], needed: Sequence[np.ndarray]) -> np.ndarray | str:
    """Moves formulas as an equation moves the elements of its boolean operands."""
    pool, operands, start = np.concatenate([f.reshape(-1) for f in needed]), [], 0
    for value in values:
        if jnp.result_type(value) != np.bool_:
            if isinstance(value, Tracer):
                return f"'{eqn.primitive.name}' at indices that are not known"
            operands.append(value)
            continue
        size = int(np.size(value))
        places = np.arange(start, start + size, dtype=np.int32)
        operands.append(places.reshape(np.shape(value)))
        start += size
    with jax.ensure_compile_time_eval():
        places = eqn.primitive.bind(*map(jnp.asarray, operands), **eqn.params)
    places = np.asarray(places)
    return _array(pool[places.reshape(-1)], places.shape)


def _disjuncts(formula: Formula, negated: bool) -> list[list[Literal]]:
    """The disjunctive normal form of a formula, or of its negation.

    Raises:
      ValueError: for more than `MAX_DISJUNCTS` disjuncts.
    """
    if isinstance(formula, Atom):
        return _of_atom(formula, negated)
    if formula.kind == "not":
        return _disjuncts(formula.parts[0], not negated)
    parts = [_disjuncts(part, negated) for part in formula.parts]
    if (formula.kind == "or") != negated:
        found = [conjunction for part in parts for conjunction in part]
        _require_few(len(found))
        return found
    found: list[list[Literal]] = [[]]
    for part in parts:
        _require_few(len(found) * len(part))
        found = [[*a, *b] for a, b in itertools.product(found, part)]
    return found


def _of_atom(atom: Atom, negated: bool) -> list[list[Literal]]:
    """`d < 0`, `d <= 0` or `d = 0`, or the negation."""
    index, kind = atom
    strict = kind == "lt" if not negated else kind != "lt"
    sides = [Literal(index, sign, strict) for sign in (1.0, -1.0)]
    if kind != "eq":
        return [[sides[1 if negated else 0]]]
    return [[side] for side in sides] if negated else [sides]


def _require_few(count: int) -> None:
    if count > MAX_DISJUNCTS:
        raise ValueError(
            f"a property may be broken in at most {MAX_DISJUNCTS} ways, each a conjunction of "
            f"comparisons, got {count}; prove it in parts"
        )

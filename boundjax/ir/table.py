"""The one table of ops: `register` adds an entry, `supported_ops()` prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from jax import Array, lax

from boundjax.ir.families import Expansion, Extremum, Joint, Refused, Scalar, Structural, one
from boundjax.ir.node import Node, Op


class UnsupportedOpError(NotImplementedError):
    """A function applies an op outside the table; the message says which, where and what to do."""


_TABLE: dict[str, list[Op]] = {}
_REFUSED: dict[str, list[Refused]] = {}


def register(op: Op) -> Op:
    """Adds an entry to the table; if several accept an equation, the first registered one wins.

    A `Refused` entry applies only if no other accepts the equation, so users can register an op
    that is refused today.
    """
    if isinstance(op, Refused):
        _REFUSED.setdefault(op.name, []).append(op)
        return op
    # Untyped callers may pass anything.
    is_op = isinstance(op, Op)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_op or not (op.is_linear or op.is_nonlinear or isinstance(op, Expansion)):
        raise TypeError(
            f"expected an op of a family in boundjax.ops, such as Scalar, got {type(op).__name__}"
        )
    _TABLE.setdefault(op.name, []).append(op)
    return op


def resolve(node: Node) -> Op | None:
    """The entry that covers `node`, or None.

    An empty operand does not depend on the input, so a node with one expands to the same op of an
    empty constant. Layers do not expand, so that `lipschitz` can name a layer without units.
    """
    op = next((op for op in _TABLE.get(node.primitive, ()) if op.accepts(node)), None)
    empty = not all(math.prod(shape.shape) for shape in node.input_shapes)
    if empty and node.size and isinstance(op, (Structural, Scalar, Extremum, Joint)):
        return _OF_EMPTY_CONSTANTS
    return op


def _with_empty_constants(node: Node) -> Callable[..., Array]:
    """The node's function, with constants in place of its empty perturbed operands."""

    def function(*operands: Array) -> Array:
        shapes = iter(node.input_shapes)
        values: list[Array] = []
        for operand, perturbed in zip(operands, node.perturbed, strict=True):
            shape = next(shapes) if perturbed else None
            if shape is not None and not math.prod(shape.shape):
                operand = lax.full(shape.shape, 0, shape.dtype)
            values.append(operand)
        return node.evaluate(*values)

    return function


_OF_EMPTY_CONSTANTS = Expansion(name="of empty constants", expand=_with_empty_constants)


def is_refused(primitive: str) -> bool:
    """Whether the table has a specific reason to refuse some equations of this primitive."""
    return primitive in _REFUSED


def refusal(node: Node) -> str | None:
    """Why `node` has no bounds and what to do instead, or None if no entry says."""
    return next((op.reason for op in _REFUSED.get(node.primitive, ()) if op.accepts(node)), None)


def traced_as(name: str) -> Iterator[tuple[Op, Callable[..., Array]]]:
    """The entries that state JAX's function of this name, which several may do, with it."""
    for op in _TABLE.get(name, ()):
        if op.traced_as is not None:
            yield op, op.traced_as


def is_elementwise(primitive: str) -> bool:
    """Whether formulas that contain this primitive may be compared; see `Op`."""
    return any(op.elementwise for op in _TABLE.get(primitive, ()))


def is_commutative(primitive: str) -> bool:
    """Whether the two operands of this primitive may be exchanged."""
    return any(op.commutative for op in _TABLE.get(primitive, ()))


def moves_only(primitive: str) -> bool:
    """Whether this primitive only moves the elements of its one operand."""
    return any(op.moves_only for op in _TABLE.get(primitive, ()))


def jumps(primitive: str) -> bool:
    """Whether this primitive has steps; see `Scalar`."""
    return any(isinstance(op, Scalar) and op.jumps for op in _TABLE.get(primitive, ()))


def selects_numbers(primitive: str) -> bool:
    """Whether every element of the value is an element of an operand, or its negative."""
    entries = _TABLE.get(primitive, ())
    return any(
        isinstance(op, Extremum) or (isinstance(op, Structural) and op.terms is one)
        for op in entries
    )


def all_ops() -> Iterator[Op]:
    """Yields every entry that has bounds."""
    for entries in _TABLE.values():
        yield from entries


def supported_ops() -> None:
    """Prints the table: op, family, note; one line each, sorted by family and name.

    `boundjax.ops.all_ops()` gives the entries themselves.
    """
    rows = sorted((type(op).__name__.lower(), op.name, op.note) for op in all_ops())
    width = max(len(name) for _, name, _ in rows)
    print(f"{'op':<{width}}  {'family':<10}  note")
    for family, name, note in rows:
        print(f"{name:<{width}}  {family:<10}  {note}".rstrip())

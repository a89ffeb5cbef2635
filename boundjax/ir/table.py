"""The one table of ops: ``register`` adds an entry, ``supported_ops()`` prints them."""

from __future__ import annotations

from collections.abc import Iterator

from boundjax.ir.families import Expansion
from boundjax.ir.node import Node, Op


class UnsupportedOpError(NotImplementedError):
    """An op of the function is not in the table; the message says which, where and what to do."""


_TABLE: dict[str, list[Op]] = {}


def register(op: Op) -> Op:
    """Adds an entry to the table; of several that accept an equation the first registered wins."""
    if not isinstance(op, Op) or not (op.is_linear or op.is_nonlinear or isinstance(op, Expansion)):
        raise TypeError(f"expected an op of a known family, got {type(op).__name__}")
    _TABLE.setdefault(op.name, []).append(op)
    return op


def resolve(node: Node) -> Op | None:
    """The entry that covers ``node``, or None."""
    return next((op for op in _TABLE.get(node.primitive, ()) if op.accepts(node)), None)


def all_ops() -> Iterator[Op]:
    """Every registered entry."""
    for entries in _TABLE.values():
        yield from entries


def supported_ops() -> None:
    """Prints the table: op, family, note; one line each, sorted by family and name.

    ``boundjax.ops.all_ops()`` gives the entries themselves.
    """
    rows = sorted((type(op).__name__.lower(), op.name, op.note) for op in all_ops())
    width = max(len(name) for _, name, _ in rows)
    print(f"{'op':<{width}}  {'family':<10}  note")
    for family, name, note in rows:
        print(f"{name:<{width}}  {family:<10}  {note}".rstrip())

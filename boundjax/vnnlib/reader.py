"""Reads files of VNN-LIB 1.0: their declarations and assertions."""

from __future__ import annotations

from pathlib import Path

from boundjax.properties import Property
from boundjax.vnnlib import limits
from boundjax.vnnlib.assembly import Assembly
from boundjax.vnnlib.expressions import Atom, Expression, List, commands, quoted, read_text
from boundjax.vnnlib.formulas import VARIABLE

# Commands of SMT-LIB that say nothing about the variables.
_IDLE = ("set-logic", "set-info", "set-option", "get-model", "get-value", "exit")


def load(path: str | Path, *, max_bytes: int = limits.MAX_BYTES) -> Property:
    """Reads a property file, plain or compressed with gzip.

    Args:
      path: a `.vnnlib` or `.vnnlib.gz` file; its first bytes tell which.
      max_bytes: the largest text accepted, after decompression.

    Returns:
      The property of the file.

    Raises:
      OSError: if the file cannot be opened.
      VnnlibError: if the file is too large, malformed, states anything but linear constraints, or
        leaves an input without a bound.
    """
    path = Path(path)
    return parse(read_text(path, max_bytes), name=path.name)


def parse(text: str, name: str = "<text>") -> Property:
    """Reads a property from a text, as `load` does; errors call the file `name`."""
    reader = _Reader(text, name)
    for command in commands(text, reader.assembly.fail):
        reader.run(command)
    return reader.property()


class _Reader:
    """Executes the commands of a file."""

    def __init__(self, text: str, name: str):
        self.assembly = Assembly(text, name)
        self.end, self.is_checked = len(text), False

    def run(self, node: List) -> None:
        """Executes one command of the top level."""
        fail, position = self.assembly.fail, node.position
        head, arguments = self.assembly.formulas.split(node, "a command")
        if self.is_checked and head not in (*_IDLE, "check-sat"):
            fail(position, f"expected one check-sat, at the end, got {head} after it")
        if head in ("declare-const", "declare-fun"):
            self.declare(node, arguments)
        elif head == "assert":
            if len(arguments) != 1:
                fail(position, f"expected assert with 1 formula, got {len(arguments)}")
            self.assembly.add(arguments[0], position)
        elif head == "check-sat":
            self.is_checked = True
        elif head not in _IDLE:
            got = f"got {quoted(head)}; only VNN-LIB 1.0 is read"
            fail(position, f"expected declare-const, declare-fun or assert, {got}")

    def declare(self, node: List, arguments: list[Expression]) -> None:
        fail, declared = self.assembly.fail, self.assembly.declared
        match arguments:
            case [Atom(text=name), Atom(text="Real")]:
                pass
            case [Atom(text=name), List(items=[]), Atom(text="Real")]:
                pass
            case _:
                fail(
                    node.position,
                    "expected (declare-const NAME Real) or (declare-fun NAME () Real), got "
                    "something else",
                )
        if not VARIABLE.fullmatch(name):
            got = quoted(name)
            fail(node.position, f"expected an input X_0, ... or an output Y_0, ..., got {got}")
        if name in declared:
            fail(node.position, f"expected every variable once, got {name} a second time")
        if len(declared) >= limits.MAX_VARIABLES:
            fail(node.position, f"expected at most {limits.MAX_VARIABLES} variables, got more")
        declared[name] = node.position

    def property(self) -> Property:
        """The property of all commands so far."""
        return self.assembly.property(self.size("X", "input"), self.size("Y", "output"))

    def size(self, letter: str, kind: str) -> int:
        """Counts the declared variables of a letter, which must be numbered from 0."""
        declared = self.assembly.declared
        count = sum(name[0] == letter for name in declared)
        missing = next((i for i in range(count) if f"{letter}_{i}" not in declared), None)
        if count == 0 or missing is not None:
            name = f"{letter}_{missing or 0}"
            self.assembly.fail(self.end, f"expected the {kind} {name} to be declared, got none")
        return count

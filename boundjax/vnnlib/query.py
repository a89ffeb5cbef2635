"""Reads VNN-LIB 2.0: networks, their inputs, outputs and hidden values, and what is asserted.

The package `vnnlib`, the standard's own, parses and checks the text. `load_query` numbers the
elements of all tensors and hands the assertions to the same formulas as those of VNN-LIB 1.0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from boundjax.properties import Property
from boundjax.vnnlib import limits
from boundjax.vnnlib.assembly import Assembly
from boundjax.vnnlib.expressions import Atom, Expression, List, read_text
from boundjax.vnnlib.limits import VnnlibError

_VERSION = re.compile(r"\s*(;[^\n]*\s*)*\(\s*vnnlib-version\b")
_SIGNS = {
    "LessEqual": "<=",
    "GreaterEqual": ">=",
    "LessThan": "<",
    "GreaterThan": ">",
    "Equal": "=",
    "And": "and",
    "Or": "or",
    "Plus": "+",
    "Minus": "-",
    "Negate": "-",
    "Multiply": "*",
}
_FLOATS = {"F32": "float32", "Real": "real"}
# Types that outputs may have as well.
_INTEGERS = {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}


class Tensor(NamedTuple):
    """A declared tensor.

    Attributes:
      name: in the query.
      onnx_name: in the network's file; None where the order says which it is.
      shape: of one example, as declared.
      type: of its elements, as assignments write it.
    """

    name: str
    onnx_name: str | None
    shape: tuple[int, ...]
    type: str = "float32"

    def elements(self) -> Iterator[str]:
        """The elements as the query writes them, in C order."""
        for flat in range(math.prod(self.shape)):
            index: list[int] = []
            for size in reversed(self.shape):
                flat, position = divmod(flat, size)
                index.append(position)
            yield f"{self.name}[{','.join(map(str, reversed(index)))}]" if index else self.name

    def assigned(self, values: Iterator[Any]) -> Iterator[str]:
        """The lines of an assignment, from the values of all elements in C order."""
        yield f"{self.name} {self.type} [{','.join(map(str, self.shape))}]"
        number = int if self.type in _INTEGERS.values() else float
        for _ in range(math.prod(self.shape)):
            yield repr(number(next(values)))


class NetworkUse(NamedTuple):
    """A declared network.

    Attributes:
      name: in the query.
      equal_to: the network whose file it has; None if it has its own.
      inputs, outputs, hidden: its tensors.
    """

    name: str
    equal_to: str | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


class Query(NamedTuple):
    """A query about one or several networks.

    Attributes:
      networks: in the order of the file.
      property: of the elements of all inputs, network by network, and of the elements of all
        outputs and hidden values: for each network its outputs, then its hidden values.
    """

    networks: tuple[NetworkUse, ...]
    property: Property

    def input_names(self) -> list[str]:
        """The elements of all inputs, in the order of the property."""
        return [e for use in self.networks for tensor in use.inputs for e in tensor.elements()]

    def assignment(self, inputs: Iterable[Any], outputs: Iterable[Any]) -> str:
        """The values of all tensors as the standard prints them (its section 5.3.1).

        For every tensor, in the order of the file, a line with its name, type and shape, and a line
        for each element.

        Args:
          inputs, outputs: numbers, in the order of the property.
        """
        left, right, lines = iter(inputs), iter(outputs), []
        for use in self.networks:
            for tensor in use.inputs:
                lines += tensor.assigned(left)
            of_outputs = [line for tensor in use.outputs for line in tensor.assigned(right)]
            for tensor in use.hidden:  # declared before the outputs
                lines += tensor.assigned(right)
            lines += of_outputs
        return "".join(f"{line}\n" for line in lines)

    def output_names(self) -> list[str]:
        """The elements of all outputs and hidden values, in the order of the property."""
        return [
            element
            for use in self.networks
            for tensor in (*use.outputs, *use.hidden)
            for element in tensor.elements()
        ]


def load_query(path: str | Path, *, max_bytes: int = limits.MAX_BYTES) -> Query:
    """Reads a query of VNN-LIB 2.0, plain or compressed with gzip.

    Args:
      path: a `.vnnlib` or `.vnnlib.gz` file.
      max_bytes: the largest text accepted, after decompression.

    Raises:
      OSError: if the file cannot be opened.
      VnnlibError: if it is too large, is no query of VNN-LIB 2.0, or asserts anything but
        polynomials of at most the second degree, of float32 tensors whose inputs have bounds.
      ImportError: if the package vnnlib is not installed.
    """
    path = Path(path)
    return parse_query(read_text(path, max_bytes), name=path.name)


def is_query(path: str | Path, *, max_bytes: int = limits.MAX_BYTES) -> bool:
    """Whether a file begins as queries of VNN-LIB 2.0 do; raises what `load_query` raises."""
    return _VERSION.match(read_text(Path(path), max_bytes)) is not None


def parse_query(text: str, name: str = "<text>") -> Query:
    """Reads a query from a text, as `load_query` does; errors call the file `name`."""
    if _VERSION.match(text) is None:
        raise VnnlibError(f"{name}:1: expected (vnnlib-version <2.0>), got another beginning")
    query = _parsed(text, name)
    return _Numbered(text, name, query).query()


def _parsed(text: str, name: str) -> Any:
    try:
        import vnnlib
    except ImportError:
        raise ImportError(
            "expected the package vnnlib, which reads VNN-LIB 2.0, got none; run pip install "
            "'boundjax[vnnlib]'"
        ) from None
    try:
        return vnnlib.parse_query_string(text)
    except vnnlib.VNNLibException as error:
        raise VnnlibError(f"{name}:{_explained(str(error))}") from None


def _explained(message: str) -> str:
    """The first error of the package, in one line that begins with a number of a line."""
    try:
        first = json.loads(message)["errors"][0]
        found = f"{first['message']} {first['offendingSymbol']!r}: {first['hint']}"
        line = first["line"]
    except (ValueError, LookupError):
        place = re.search(r"line (\d+)", message)
        found, line = message, place[1] if place else 1
    return " ".join(f"{line}: expected VNN-LIB 2.0, got: {found}".split())[:400]


class _Numbered:
    """Numbers the elements of the tensors of a query, and reads its assertions."""

    def __init__(self, text: str, name: str, query: Any):
        self.parsed, self.assembly = query, Assembly(text, name)
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.first: dict[tuple[str, str], tuple[str, int, tuple[int, ...]]] = {}
        self.count = {"X": 0, "Y": 0}

    def query(self) -> Query:
        uses = tuple(map(self.network, self.parsed.networks))
        for assertion in self.parsed.assertions:
            formula = self.expression(assertion.expr)
            self.assembly.add(formula, formula.position)
        return Query(uses, self.assembly.property(self.count["X"], self.count["Y"]))

    def fail(self, message: str, line: int = 1) -> NoReturn:
        self.assembly.fail(self.position(line), message)

    def position(self, line: int) -> int:
        return self.starts[min(max(line, 1), len(self.starts)) - 1]

    def network(self, network: Any) -> NetworkUse:
        name = str(network.name)
        parts = [
            tuple(self.tensor(name, tensor, letter) for tensor in tensors)
            for letter, tensors in (
                ("X", network.inputs),
                ("Y", network.outputs),
                ("Y", network.hidden),
            )
        ]
        return NetworkUse(name, str(network.equal_to) or None, *parts)

    def tensor(self, network: str, tensor: Any, letter: str) -> Tensor:
        name, shape = str(tensor.name), tuple(int(size) for size in tensor.shape)
        kinds = _FLOATS if letter == "X" else _FLOATS | _INTEGERS
        if tensor.dtype.name not in kinds:
            self.fail(f"expected {name} to be of float32 or real, got {tensor.dtype.name}")
        first, size = self.count[letter], math.prod(shape)
        if min((*shape, 1)) < 1 or first + size > limits.MAX_VARIABLES:
            most = limits.MAX_VARIABLES
            self.fail(f"expected 1 to {most} elements of all tensors, got {name} of shape {shape}")
        self.first[network, name] = letter, first, shape
        self.count[letter] += size
        onnx_name = str(tensor.onnx_name or "").strip('"')
        declared = Tensor(name, onnx_name or None, shape, kinds[tensor.dtype.name])
        for k, element in enumerate(declared.elements(), start=first):
            self.assembly.declared[f"{letter}_{k}"] = 0
            self.assembly.shown[f"{letter}_{k}"] = element
        return declared

    def expression(self, node: Any) -> Expression:
        """A node of the package's tree as the expression that VNN-LIB 1.0 would have."""
        kind = type(node).__name__
        if kind == "Var":
            return self.variable(node)
        lexeme = getattr(node, "lexeme", None)
        if lexeme is not None:
            return Atom(str(lexeme), self.position(node.line))
        parts = [self.expression(child) for child in node.children()]
        position = min((part.position for part in parts), default=0)

        def made(head: str, items: Sequence[Expression]) -> List:
            return List([Atom(head, position), *items], position)

        if kind == "NotEqual":
            return made("not", [made("=", parts)])
        if kind not in _SIGNS:
            self.assembly.fail(position, f"expected a comparison of polynomials, got {kind}")
        return made(_SIGNS[kind], parts)

    def variable(self, node: Any) -> Atom:
        letter, first, shape = self.first[str(node.network_name), str(node.name)]
        flat, indices = 0, [int(index) for index in node.indices]
        if len(indices) != len(shape) or any(
            not 0 <= index < size for index, size in zip(indices, shape, strict=False)
        ):
            self.fail(
                f"expected an element of {node.name} of shape {shape}, got {indices}", node.line
            )
        for index, size in zip(indices, shape, strict=True):
            flat = flat * size + index
        return Atom(f"{letter}_{first + flat}", self.position(node.line))

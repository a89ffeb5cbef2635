"""Checks ONNX messages and converts them to plain data without protobuf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from boundjax.onnx.content import package, text
from boundjax.onnx.node import STORED, Node, OnnxError, Reference, quoted

_DOMAINS = ("", "ai.onnx")
_WITH_GRAPHS = ("If", "Loop", "Scan")


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """An input of the network.

    Attributes:
      name: its name in the graph.
      dtype: type of its elements.
      shape: None if it is not declared; sizes that are symbolic are None.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A node where it stands in a graph.

    Attributes:
      node: what is computed.
      operands: the names of its operands (`""` if omitted).
      function: of the local functions the one that it calls, or None.
    """

    node: Node
    operands: tuple[str, ...]
    function: tuple[str, str, str] | None = None

    def needs(self) -> set[str]:
        """The names of the values around it that it needs, also those that its graphs use."""
        graphs = (v for v in self.node.attributes.values() if isinstance(v, Graph))
        return set(filter(None, self.operands)).union(*(graph.free for graph in graphs))


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A graph, or the body of a local function.

    Attributes:
      inputs, outputs: names of values.
      constants: the initializers by name.
      operations: in evaluation order; those that no output needs are left out.
      free: the names that it takes from the graph around it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    operations: tuple[Operation, ...]
    free: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A local function.

    Attributes:
      graph: its body.
      attributes: the values of its attributes that have a default, None for those that have none.
    """

    graph: Graph
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class File:
    """The contents of an ONNX file.

    Attributes:
      opset: version of the default operator set.
      inputs: those that have no initializer, in file order.
      outputs: their names.
      constants: the initializers by name.
      operations: in evaluation order.
      functions: the local functions by domain, name and overload.
    """

    opset: int
    inputs: tuple[Variable, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    operations: tuple[Operation, ...]
    functions: Mapping[tuple[str, str, str], Function]


def contents(model: Any, max_bytes: int) -> File:
    """Checks and converts a `ModelProto`.

    Raises:
      OnnxError: see `from_onnx`.
    """
    if model.ir_version < 1 or not model.graph.output:
        raise OnnxError("expected an ONNX model, got a file without a graph")
    opset = _opset(model)
    reader = _Reader(max_bytes, {_key(function) for function in model.functions})
    if len(reader.functions) < len(model.functions):
        raise OnnxError("expected distinct local functions, got two of one name")
    constants = reader.constants(model.graph)
    inputs = [value for value in model.graph.input if text(value.name) not in constants]
    return File(
        opset,
        tuple(map(_variable, inputs)),
        _distinct([text(value.name) for value in model.graph.output], "outputs"),
        constants,
        reader.operations(model.graph.node, opset),
        {_key(function): reader.function(function, opset) for function in model.functions},
    )


def live(operations: Sequence[Operation], wanted: Iterable[str]) -> tuple[Operation, ...]:
    """The operations on which some values depend, in the same order."""
    needed = set(wanted)
    kept = []
    for operation in reversed(operations):
        if needed.intersection(operation.node.outputs):
            needed |= operation.needs()
            kept.append(operation)
    return tuple(reversed(kept))


def _key(message: Any) -> tuple[str, str, str]:
    """By what a function is called; `overload` is younger than the oldest onnx."""
    name = message.op_type if hasattr(message, "op_type") else message.name
    domain = text(message.domain)
    overload = text(getattr(message, "overload", ""))
    return ("" if domain in _DOMAINS else domain), text(name), overload


def _distinct(names: Sequence[str], what: str) -> tuple[str, ...]:
    if len(set(names)) < len(names) or "" in names:
        raise OnnxError(f"expected distinct {what}, got {', '.join(map(quoted, names[:4]))}")
    return tuple(names)


def _opset(model: Any, default: int | None = None) -> int:
    versions = {entry.version for entry in model.opset_import if entry.domain in _DOMAINS}
    if not versions and default is not None:
        return default
    if len(versions) != 1 or min(versions) < 1:
        raise OnnxError(
            f"expected one version of the default operator set, got {sorted(versions)[:8]}; "
            "export the model again"
        )
    return versions.pop()


def _variable(value: Any) -> Variable:
    name, kind = text(value.name), value.type
    if not kind.HasField("tensor_type"):
        raise OnnxError(f"input {quoted(name)}: expected a tensor, got another type")
    tensor = kind.tensor_type
    if tensor.elem_type not in STORED:
        raise OnnxError(
            f"input {quoted(name)}: expected float32, got element type {tensor.elem_type}; "
            "export in single precision"
        )
    shape = None
    if tensor.HasField("shape"):
        # Some exporters write 0 or a negative number for an unknown size.
        shape = tuple(size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim)
    return Variable(name, STORED[tensor.elem_type], shape)


class _Reader:
    """Converts the parts of one model."""

    def __init__(self, max_bytes: int, functions: set[tuple[str, str, str]]) -> None:
        self.onnx = package()
        self.max_bytes = max_bytes
        self.functions = functions

    def constants(self, graph: Any) -> dict[str, np.ndarray]:
        if graph.sparse_initializer:
            raise OnnxError("sparse initializers are not supported; export dense ones")
        constants = {
            text(tensor.name): self._array(tensor, f"initializer {quoted(text(tensor.name))}")
            for tensor in graph.initializer
        }
        if len(constants) < len(graph.initializer):
            raise OnnxError("expected distinct initializers, got two of one name; export it again")
        return constants

    def operations(self, messages: Iterable[Any], opset: int) -> tuple[Operation, ...]:
        return tuple(self._operation(message, opset) for message in messages)

    def function(self, message: Any, opset: int) -> Function:
        key = _key(message)
        if not key[0]:
            raise OnnxError(
                f"expected local functions outside of the default domain, got {quoted(key[1])}"
            )
        defaults = {text(a.name): a for a in message.attribute_proto}
        opset = _opset(message, opset)
        owner = Node(f"{key[0]}.{key[1]}", key[1], opset, {}, (), self.max_bytes)
        attributes = {text(name): None for name in message.attribute}
        attributes |= {name: self._attribute(a, owner) for name, a in defaults.items()}
        inputs = _distinct([text(name) for name in message.input], "inputs of a function")
        outputs = _distinct([text(name) for name in message.output], "outputs of a function")
        return Function(
            _graph(inputs, outputs, {}, self.operations(message.node, opset)), attributes
        )

    def _subgraph(self, message: Any, opset: int) -> Graph:
        inputs = _distinct([text(value.name) for value in message.input], "inputs of a graph")
        outputs = tuple(text(value.name) for value in message.output)
        constants = self.constants(message)
        return _graph(inputs, outputs, constants, self.operations(message.node, opset))

    def _array(self, tensor: Any, what: str) -> np.ndarray:
        if tensor.data_type not in STORED:
            raise OnnxError(
                f"{what}: expected float32, another type of floats, integers or bool, "
                f"got {self._type_name(tensor.data_type)}; export in single precision"
            )
        dtype = STORED[tensor.data_type]
        shape = tuple(tensor.dims)
        lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
        stored = max(map(len, lists))
        if tensor.HasField("raw_data"):
            stored = len(tensor.raw_data) // dtype.itemsize
        if tensor.HasField("segment") or min(shape, default=0) < 0 or math.prod(shape) != stored:
            raise OnnxError(f"{what}: expected shape {shape}, got {stored} elements")
        try:
            if tensor.data_type == self.onnx.TensorProto.BFLOAT16:  # older onnx: as float32
                return _bits(tensor).view(dtype).reshape(shape)
            array = np.ascontiguousarray(self.onnx.numpy_helper.to_array(tensor))
            return array.reshape(shape).astype(dtype)
        except (ValueError, TypeError, OverflowError) as error:
            raise OnnxError(f"{what}: expected {dtype}, got content that is damaged") from error

    def _type_name(self, number: int) -> str:
        names = {value: name.lower() for name, value in self.onnx.TensorProto.DataType.items()}
        return names.get(number, f"element type {number}")

    def _operation(self, message: Any, opset: int) -> Operation:
        outputs = tuple(map(text, message.output))
        operator = text(message.op_type)
        if message.domain not in _DOMAINS:
            operator = f"{text(message.domain)}.{operator}"
        name = text(message.name) or (outputs[0] if outputs else "")
        if not operator.replace(".", "").replace("_", "").isalnum() or len(operator) > 80:
            operator = quoted(operator)
        node = Node(operator, name, opset, {}, outputs, self.max_bytes)
        attributes = {text(a.name): self._attribute(a, node) for a in message.attribute}
        node = dataclasses.replace(node, attributes=attributes)
        key = _key(message)
        return Operation(
            node, tuple(map(text, message.input)), key if key in self.functions else None
        )

    def _attribute(self, attribute: Any, node: Node) -> Any:
        kinds = self.onnx.AttributeProto
        what = f"{node.title}: attribute {quoted(text(attribute.name))}"
        if attribute.ref_attr_name:
            return Reference(text(attribute.ref_attr_name))
        if attribute.type == kinds.TENSOR:
            return self._array(attribute.t, what)
        if attribute.type in (kinds.INT, kinds.FLOAT):
            return self.onnx.helper.get_attribute_value(attribute)
        if attribute.type in (kinds.INTS, kinds.FLOATS):
            return tuple(self.onnx.helper.get_attribute_value(attribute))
        if attribute.type == kinds.STRING:
            return attribute.s.decode(errors="replace")
        if attribute.type == kinds.STRINGS:
            return tuple(value.decode(errors="replace") for value in attribute.strings)
        if attribute.type == kinds.GRAPH and node.operator in _WITH_GRAPHS:
            return self._subgraph(attribute.g, node.opset)
        # No operator accepts this value, so sparse tensors and other types are refused.
        return NotImplemented


def _graph(
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: Mapping[str, np.ndarray],
    operations: tuple[Operation, ...],
) -> Graph:
    operations = live(operations, outputs)
    inside = {*inputs, *constants}.union(*(o.node.outputs for o in operations))
    needed = set(outputs).union(*(operation.needs() for operation in operations))
    return Graph(inputs, outputs, constants, operations, frozenset(needed - inside))


def _bits(tensor: Any) -> np.ndarray:
    """The 16 bits of each number."""
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, "<u2").astype(np.uint16)
    return np.asarray(tensor.int32_data, np.int64).astype(np.uint16)

"""Parses and checks ONNX files and converts them to plain data without protobuf."""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from boundjax.onnx.node import DTYPES, Node, OnnxError, check_bytes, quoted

_DOMAINS = ("", "ai.onnx")


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """The input or the output of the graph.

    Attributes:
      name: its name in the graph.
      dtype: type of its elements.
      shape: None if it is not declared; sizes that are symbolic are None.
    """

    name: str
    dtype: Any
    shape: tuple[int | None, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class File:
    """The contents of an ONNX file.

    Attributes:
      opset: version of the default operator set.
      source, sink: the input and the output.
      constants: the initializers by name.
      nodes: in evaluation order, each with the names of its operands (`""` if omitted).
    """

    opset: int
    source: Variable
    sink: Variable
    constants: Mapping[str, np.ndarray]
    nodes: tuple[tuple[Node, tuple[str, ...]], ...]


def read(path: str | os.PathLike, max_bytes: int) -> File:
    """Parses and checks a file.

    Raises:
      OnnxError: see `from_onnx`.
      ImportError: if the package onnx is not installed.
      OSError: if the file cannot be opened.
    """
    onnx = _package()
    content = _content(Path(path), max_bytes)
    try:
        # Not `onnx.load`, which chooses the parser by the file's suffix.
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exceptions have no common public base
        raise OnnxError("expected an ONNX model, got a truncated or different file") from error
    external = next(_external_tensors(onnx, model), None)
    if external is not None:
        raise OnnxError(f"{external} is stored outside the file; save the model as one file")
    if model.ir_version < 1 or not model.graph.output:
        raise OnnxError("expected an ONNX model, got a file without a graph")
    opset = _opset(model)
    graph = model.graph
    if graph.sparse_initializer:
        raise OnnxError("sparse initializers are not supported; export dense ones")
    constants = {
        _text(tensor.name): _array(onnx, tensor, f"initializer {quoted(_text(tensor.name))}")
        for tensor in graph.initializer
    }
    if len(constants) < len(graph.initializer):
        raise OnnxError("expected distinct initializers, got two of one name; export it again")
    inputs = [value for value in graph.input if value.name not in constants]
    nodes = tuple(
        (_node(onnx, message, opset, max_bytes), tuple(map(_text, message.input)))
        for message in graph.node
    )
    return File(
        opset,
        _only_variable(inputs, "input"),
        _only_variable(list(graph.output), "output"),
        constants,
        nodes,
    )


def _package() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(
            "from_onnx needs the package onnx: pip install 'boundjax[onnx]'"
        ) from error
    return onnx


def _content(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OnnxError("expected a regular file, got a device or a pipe")
        check_bytes("the file", status.st_size, max_bytes)
        return stream.read(status.st_size)


def _text(value: str | bytes) -> str:
    """Checks a name; protobuf returns bytes for one that is not UTF-8."""
    if isinstance(value, bytes):
        raise OnnxError(f"expected names in UTF-8, got {quoted(repr(value))}; is the file damaged?")
    return value


def _external_tensors(onnx: Any, message: Any, what: str = "tensor", of: str = "") -> Iterator[str]:
    """Yields, as errors name them, the tensors of a message whose content is in another file.

    The search includes parts that are never evaluated (branches, functions, unused nodes), because
    onnxruntime, which has the last word on counterexamples, would open their files, too.

    Args:
      onnx: the package.
      message: a protobuf message of any type.
      what: the role of the message in the one around it.
      of: the node around the message, or empty.
    """
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield f"{what} {quoted(_text(message.name))}{of}"
        return
    if isinstance(message, onnx.NodeProto) and not of:
        name = _text(message.name) or _text(next(iter(message.output), ""))
        of = f" of node {quoted(name)}"
    for field, value in message.ListFields():
        if field.message_type is not None:
            what = "initializer" if field.name == "initializer" else "tensor"
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _external_tensors(onnx, part, what, of)


def _opset(model: Any) -> int:
    versions = {entry.version for entry in model.opset_import if entry.domain in _DOMAINS}
    if len(versions) != 1 or min(versions) < 1:
        raise OnnxError(
            f"expected one version of the default operator set, got {sorted(versions)[:8]}; "
            "export the model again"
        )
    return versions.pop()


def _only_variable(variables: list[Any], role: str) -> Variable:
    if len(variables) != 1:
        names = ", ".join(quoted(_text(value.name)) for value in variables[:4])
        raise OnnxError(
            f"expected one {role}, got {len(variables)} ({names}); "
            "export a network of one input tensor and one output tensor"
        )
    name, kind = _text(variables[0].name), variables[0].type
    if not kind.HasField("tensor_type"):
        raise OnnxError(f"{role} {quoted(name)}: expected a tensor, got another type")
    tensor = kind.tensor_type
    if tensor.elem_type not in DTYPES:
        raise OnnxError(
            f"{role} {quoted(name)}: expected float32, got element type {tensor.elem_type}; "
            "export in single precision"
        )
    shape = None
    if tensor.HasField("shape"):
        # Some exporters write 0 or a negative number for an unknown size.
        shape = tuple(size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim)
    return Variable(name, DTYPES[tensor.elem_type], shape)


def _array(onnx: Any, tensor: Any, what: str) -> np.ndarray:
    if tensor.data_type not in DTYPES:
        raise OnnxError(
            f"{what}: expected float32, int32, int64 or bool, "
            f"got {_type_name(onnx, tensor.data_type)}; export in single precision"
        )
    dtype = np.dtype(DTYPES[tensor.data_type])
    shape = tuple(tensor.dims)
    stored = len(tensor.raw_data) // dtype.itemsize
    if not tensor.HasField("raw_data"):
        stored = max(len(tensor.float_data), len(tensor.int32_data), len(tensor.int64_data))
    if tensor.HasField("segment") or min(shape, default=0) < 0 or math.prod(shape) != stored:
        raise OnnxError(f"{what}: expected shape {shape}, got {stored} elements")
    try:
        return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).reshape(shape).astype(dtype)
    except (ValueError, TypeError) as error:
        raise OnnxError(f"{what}: expected {dtype}, got content that is damaged") from error


def _type_name(onnx: Any, number: int) -> str:
    names = {value: name.lower() for name, value in onnx.TensorProto.DataType.items()}
    return names.get(number, f"element type {number}")


def _node(onnx: Any, message: Any, opset: int, max_bytes: int) -> Node:
    outputs = tuple(map(_text, message.output))
    operator = _text(message.op_type)
    if message.domain not in _DOMAINS:
        operator = f"{_text(message.domain)}.{operator}"
    name = _text(message.name) or (outputs[0] if outputs else "")
    if not operator.replace(".", "").replace("_", "").isalnum() or len(operator) > 80:
        operator = quoted(operator)
    node = Node(operator, name, opset, {}, outputs, max_bytes)
    attributes = {_text(a.name): _attribute(onnx, a, node) for a in message.attribute}
    return dataclasses.replace(node, attributes=attributes)


def _attribute(onnx: Any, attribute: Any, node: Node) -> Any:
    kinds = onnx.AttributeProto
    what = f"{node.title}: attribute {quoted(_text(attribute.name))}"
    if attribute.type == kinds.TENSOR:
        return _array(onnx, attribute.t, what)
    if attribute.type in (kinds.INT, kinds.FLOAT):
        return onnx.helper.get_attribute_value(attribute)
    if attribute.type in (kinds.INTS, kinds.FLOATS):
        return tuple(onnx.helper.get_attribute_value(attribute))
    if attribute.type == kinds.STRING:
        return attribute.s.decode(errors="replace")
    # No operator accepts this value, so graphs, sparse tensors and other types are refused.
    return NotImplemented

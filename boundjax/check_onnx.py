"""Reads ONNX networks for `check.py`, with NumPy and the package `onnx` alone.

Every value is flat. Whatever moves, sums or multiplies elements becomes a product that reads its
operand by an index, see `docs/certificates.md`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# A value: its node, and its shape with a batch of one.
Value = tuple[int, tuple[int, ...]]

MAX_BYTES = 2**31


def read_onnx(
    path: str | os.PathLike[str], append: Callable[..., int]
) -> tuple[list[Any], list[str]]:
    """The nodes of a network with one input and one output, and what it is.

    Args:
      path: of the file, which is not trusted.
      append: `(nodes, op, inputs, **arrays) -> index`, appends a node of the checker.

    Raises:
      ValueError: for what is no such network, or has an operator that is not in `OPERATORS`.
      ImportError: if the package onnx is not installed.
    """
    import onnx
    from onnx import numpy_helper

    with open(path, "rb") as stream:
        stored = stream.read(MAX_BYTES)
    content = _decompressed(stored, os.path.basename(path))
    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # the errors of protobuf have no public base
        raise ValueError(f"{os.path.basename(path)} is no ONNX model") from error
    reader = _Reader(append)
    for tensor in graph.initializer:
        reader.weights[tensor.name] = _inside(tensor, numpy_helper.to_array)
    sources = [value for value in graph.input if value.name not in reader.weights]
    if len(sources) != 1 or len(graph.output) != 1:
        raise ValueError("expected a network with one input and one output")
    sizes = [dim.dim_value for dim in sources[0].type.tensor_type.shape.dim]
    shape = (1, *sizes[1:]) if len(sizes) > 1 and sizes[0] in (0, 1) else tuple(sizes)
    source = reader.add("input", (), size=np.array([math.prod(shape)]))
    reader.values[sources[0].name] = source, shape
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):  # which may be a function, called like an operator
            raise ValueError(f"{node.op_type}: of the domain {node.domain!r}")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            reader.weights[node.output[0]] = _inside(attributes["value"], numpy_helper.to_array)
        else:
            reader.read(node.op_type, list(node.input), list(node.output), attributes)
    last, _ = reader.value(graph.output[0].name)
    if last != len(reader.nodes) - 1:
        raise ValueError("the output of the network is not its last value")
    return reader.nodes, ["onnx", hashlib.sha256(stored).hexdigest()]


def _decompressed(content: bytes, name: str) -> bytes:
    """The content of a file that may be compressed with gzip, in bounded memory."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    result = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            while part := stream.read(2**20):
                result += part
                if len(result) > MAX_BYTES:
                    raise ValueError(f"{name}: more than {MAX_BYTES} bytes when decompressed")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{name}: a damaged gzip file: {error}") from error
    return bytes(result)


def _inside(tensor: Any, to_array: Callable[[Any], Array]) -> Array:
    if tensor.external_data or tensor.data_location:
        raise ValueError(f"weights {tensor.name!r} are stored outside the file")
    return to_array(tensor)


class _Reader:
    """Translates operators one by one.

    Attributes:
      nodes: those of the checker so far.
      weights: constants by name.
      values: what depends on the input, by name.
    """

    def __init__(self, append: Callable[..., int]) -> None:
        self.append = append
        self.nodes: list[Any] = []
        self.weights: dict[str, Array] = {}
        self.values: dict[str, Value] = {}

    def read(self, op: str, names: list[str], outputs: list[str], a: dict[str, Any]) -> None:
        """Translates one operator with these operands and attributes."""
        translate = OPERATORS.get(op)
        if translate is None:
            raise ValueError(f"the ONNX operator {op} is not one of {', '.join(OPERATORS)}")
        unknown = set(a) - translate.attributes
        if unknown or any(outputs[1:]):
            raise ValueError(f"{op}: attribute or output {', '.join(unknown) or outputs[1]}")
        missing = [n for n in names if n and n not in self.values and n not in self.weights]
        if missing:
            raise ValueError(f"{op}: {missing[0]!r} is computed from weights, or by no node")
        operands = [self.values.get(n, self.weights.get(n)) for n in names]
        if not any(isinstance(v, tuple) for v in operands):
            raise ValueError(f"{op}: of constants alone")
        self.values[outputs[0]] = translate.function(self, operands, a)

    def value(self, name: str) -> Value:
        """A value that depends on the input."""
        if name not in self.values:
            raise ValueError(f"{name!r} does not depend on the input")
        return self.values[name]

    def add(self, op: str, inputs: Sequence[int], **arrays: Array) -> int:
        """Appends a node of the checker."""
        return self.append(self.nodes, op, inputs, **arrays)

    def moved(self, place: int, index: Array) -> int:
        """A value whose element p is element `index[p]` of another."""
        return self.add("product", (place,), index=index.reshape(-1, 1), kernel=np.ones((1, 1, 1)))

    def affine(self, place: int, **arrays: Any) -> int:
        """`x factor / divisor + constant`."""
        defaults = {"factor": 1.0, "divisor": 1.0, "constant": 0.0}
        full = {k: np.array(arrays.get(k, v), ndmin=1) * 1.0 for k, v in defaults.items()}
        return self.add("affine", (place,), **full)


def _perturbed(operands: list[Any], *constants: int) -> tuple[Value, list[Array]]:
    """The first operand, which depends on the input, and the others, which must be constants."""
    first, *rest = operands
    if not isinstance(first, tuple) or any(isinstance(v, tuple) for v in rest):
        raise ValueError("the first operand must depend on the input, and no other one")
    if constants and len(rest) not in constants:
        raise ValueError(f"expected {' or '.join(map(str, constants))} constants, got {len(rest)}")
    return first, rest


def _reshaped(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), rest = _perturbed(operands, 1)
    if a.get("allowzero"):
        raise ValueError("Reshape: allowzero")
    wanted = [shape[i] if n == 0 else int(n) for i, n in enumerate(rest[0].tolist())]
    return place, np.zeros(shape, bool).reshape(wanted).shape


def _flattened(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), _ = _perturbed(operands, 0)
    axis = a.get("axis", 1)
    return place, (math.prod(shape[:axis]), math.prod(shape[axis:]))


def _squeezed(inverse: bool) -> Callable[..., Value]:
    def translate(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
        (place, shape), rest = _perturbed(operands, 0, 1)
        axes = tuple(rest[0].tolist()) if rest else tuple(a.get("axes", ()))
        grid = np.zeros(shape, bool)
        if inverse:
            return place, np.expand_dims(grid, axes).shape
        return place, np.squeeze(grid, axes or None).shape

    return translate


def _same(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    return _perturbed(operands)[0]


def _transposed(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), _ = _perturbed(operands, 0)
    grid = np.arange(math.prod(shape)).reshape(shape).transpose(a.get("perm"))
    return reader.moved(place, grid), grid.shape


def _product(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    """Gemm and MatMul of a value with a constant matrix, and a constant bias."""
    (place, shape), rest = _perturbed(operands, 1, 2)
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
        raise ValueError("Gemm: alpha, beta or transA")
    matrix = rest[0].T if a.get("transB", 0) else rest[0]
    if matrix.ndim != 2 or matrix.shape[0] != shape[-1]:
        raise ValueError(f"a matrix of shape {matrix.shape} for a value of shape {shape}")
    index = np.arange(math.prod(shape[:-1]))[:, None]
    place = reader.add("product", (place,), index=index, kernel=matrix[None])
    shape = (*shape[:-1], matrix.shape[1])
    if len(rest) == 2:
        place = reader.affine(place, constant=np.broadcast_to(rest[1], shape))
    return place, shape


def _arithmetic(name: str) -> Callable[..., Value]:
    def translate(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
        first, second = operands
        if isinstance(first, tuple) and isinstance(second, tuple):
            if name not in ("Add", "Sub") or first[1] != second[1]:
                raise ValueError(f"{name}: of two values that depend on the input")
            other = second[0] if name == "Add" else reader.affine(second[0], factor=-1.0)
            return reader.add("add", (first[0], other)), first[1]
        reverse = not isinstance(first, tuple)
        (place, shape), constant = (second, first) if reverse else (first, second)
        if np.broadcast_shapes(shape, constant.shape) != shape:
            raise ValueError(f"{name}: a constant of shape {constant.shape} for {shape}")
        constant = np.broadcast_to(constant, shape)
        if name == "Add":
            return reader.affine(place, constant=constant), shape
        if name == "Sub":
            factor = -1.0 if reverse else 1.0
            return reader.affine(place, factor=factor, constant=-factor * constant), shape
        if name == "Div" and reverse:
            raise ValueError("Div: by a value that depends on the input")
        return reader.affine(place, **{"factor" if name == "Mul" else "divisor": constant}), shape

    return translate


def _negative(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), _ = _perturbed(operands, 0)
    return reader.affine(place, factor=-1.0), shape


def _ramp(low: float, high: float, slope: float | None) -> Callable[..., Value]:
    def translate(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
        (place, shape), _ = _perturbed(operands, 0)
        left = float(np.float32(a.get("alpha", 0.01))) if slope is None else slope
        ends = {"low": np.array([low]), "high": np.array([high])}
        return reader.add("ramp", (place,), slope=np.array([left]), **ends), shape

    return translate


def _clip(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), rest = _perturbed([*operands, None, None][:3], 2)
    low = a.get("min", -np.inf) if rest[0] is None else rest[0]
    high = a.get("max", np.inf) if rest[1] is None else rest[1]
    ends = {"low": np.array(low, ndmin=1) * 1.0, "high": np.array(high, ndmin=1) * 1.0}
    return reader.add("ramp", (place,), slope=np.zeros(1), **ends), shape


def _smooth(name: str) -> Callable[..., Value]:
    def translate(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
        (place, shape), _ = _perturbed(operands, 0)
        return reader.add(name, (place,)), shape

    return translate


def _normalized(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), (scale, bias, mean, variance) = _perturbed(operands, 4)
    if a.get("training_mode") or a.get("spatial", 1) != 1:
        raise ValueError("BatchNormalization: in training mode, or not spatial")
    epsilon = float(np.float32(a.get("epsilon", 1e-5)))
    factor = scale / np.sqrt(variance.astype(np.float64) + epsilon)
    # The checker takes a factor of 1 for exact, which a rounded quotient is not.
    factor = np.where(np.abs(factor) == 1.0, factor * (1.0 + 2.0**-52), factor)
    repeats = math.prod(shape[2:])
    place = reader.affine(place, constant=np.repeat(-mean, repeats))
    constant = np.repeat(bias, repeats)
    return reader.affine(place, factor=np.repeat(factor, repeats), constant=constant), shape


def _places(
    shape: tuple[int, ...], window: Sequence[int], op: str, a: dict[str, Any]
) -> tuple[Array, tuple[int, ...]]:
    """The elements of every window over the sites of a value, `[places, taps]`; -1 is padding."""
    rank = len(window)
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or a.get("ceil_mode"):
        raise ValueError(f"{op}: auto_pad or ceil_mode")
    pads = a.get("pads", [0] * (2 * rank))
    widths = list(zip(pads[:rank], pads[rank:], strict=True))
    grid = np.pad(np.arange(math.prod(shape)).reshape(shape), widths, constant_values=-1)
    dilations = a.get("dilations", [1] * rank)
    reach = [(n - 1) * d + 1 for n, d in zip(window, dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(grid, reach)
    steps = (*a.get("strides", [1] * rank), *dilations)
    views = views[tuple(slice(None, None, step) for step in steps)]
    return views.reshape(-1, math.prod(window)), views.shape[:rank]


def _convolution(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
    (place, shape), (weights, *bias) = _perturbed(operands, 1, 2)
    outputs, width, *window = weights.shape
    groups, channels = a.get("group", 1), shape[1]
    if shape[0] != 1 or width * groups != channels or outputs % groups:
        raise ValueError(f"Conv: weights {weights.shape} in {groups} groups for {shape}")
    index, sites = _places(shape[2:], window, "Conv", a)
    share = outputs // groups
    kernel = np.zeros((math.prod(window), channels, outputs))  # zero between the groups
    flat = weights.reshape(outputs, width, -1).transpose(2, 1, 0)
    for g in range(groups):
        columns = slice(g * share, (g + 1) * share)
        kernel[:, g * width : (g + 1) * width, columns] = flat[..., columns]
    place = reader.moved(place, np.arange(math.prod(shape)).reshape(channels, -1).T)
    place = reader.add("product", (place,), index=index, kernel=kernel)
    place = reader.moved(place, np.arange(len(index) * outputs).reshape(-1, outputs).T)
    if bias:
        place = reader.affine(place, constant=np.repeat(bias[0], len(index)))
    return place, (1, outputs, *sites)


def _pooled(average: bool, whole: bool) -> Callable[..., Value]:
    def translate(reader: _Reader, operands: list[Any], a: dict[str, Any]) -> Value:
        (place, shape), _ = _perturbed(operands, 0)
        window = shape[2:] if whole else a["kernel_shape"]
        index, sites = _places(shape[2:], window, "pooling", a)
        first = (np.arange(math.prod(shape[:2])) * math.prod(shape[2:]))[:, None, None]
        every = np.where(index >= 0, index + first, -1).reshape(-1, index.shape[1])
        if not average:
            place = reader.add("max", (place,), index=every)
        else:
            count = np.full(len(every), index.shape[1])
            if not a.get("count_include_pad"):
                count = (every >= 0).sum(axis=1)
            kernel = np.ones((index.shape[1], 1, 1))
            place = reader.add("product", (place,), index=every, kernel=kernel)
            place = reader.affine(place, divisor=count)
        return place, (*shape[:2], *sites)

    return translate


class _Operator:
    """How an operator is translated, and the attributes that it may have."""

    def __init__(self, function: Callable[..., Value], attributes: str = "") -> None:
        self.function = function
        self.attributes = set(attributes.split())


_WINDOW = "kernel_shape strides pads dilations auto_pad"
OPERATORS = {
    "Identity": _Operator(_same),
    "Dropout": _Operator(_same, "ratio seed"),
    "Reshape": _Operator(_reshaped, "allowzero"),
    "Flatten": _Operator(_flattened, "axis"),
    "Squeeze": _Operator(_squeezed(False), "axes"),
    "Unsqueeze": _Operator(_squeezed(True), "axes"),
    "Transpose": _Operator(_transposed, "perm"),
    "Gemm": _Operator(_product, "alpha beta transA transB"),
    "MatMul": _Operator(_product),
    "Add": _Operator(_arithmetic("Add")),
    "Sub": _Operator(_arithmetic("Sub")),
    "Mul": _Operator(_arithmetic("Mul")),
    "Div": _Operator(_arithmetic("Div")),
    "Neg": _Operator(_negative),
    "Relu": _Operator(_ramp(0.0, np.inf, 0.0)),
    "Abs": _Operator(_ramp(0.0, np.inf, -1.0)),
    "LeakyRelu": _Operator(_ramp(0.0, np.inf, None), "alpha"),
    "Clip": _Operator(_clip, "min max"),
    "Tanh": _Operator(_smooth("tanh")),
    "Sigmoid": _Operator(_smooth("sigmoid")),
    "Exp": _Operator(_smooth("exp")),
    "BatchNormalization": _Operator(
        _normalized, "epsilon momentum training_mode spatial consumed_inputs"
    ),
    "Conv": _Operator(_convolution, f"{_WINDOW} group"),
    "MaxPool": _Operator(_pooled(False, False), f"{_WINDOW} ceil_mode storage_order"),
    "AveragePool": _Operator(_pooled(True, False), f"{_WINDOW} ceil_mode count_include_pad"),
    "GlobalAveragePool": _Operator(_pooled(True, True)),
    "GlobalMaxPool": _Operator(_pooled(False, True)),
}

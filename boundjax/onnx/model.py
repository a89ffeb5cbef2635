"""A graph of nodes -> a JAX function: constants folded, the rest kept as steps."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.onnx.file import File, read
from boundjax.onnx.node import Node, OnnxError, check_bytes, shown
from boundjax.onnx.operators import OPERATORS, Operator

# Characters of an error.
_LONGEST = 500


@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """A value that depends on the input.

    Attributes:
      shape: with the batch dimension.
      kind: "f", "i" (carried as float32) or "b".
    """

    shape: tuple[int, ...]
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Missing:
    """A value that the file has and boundjax does not compute; an error where it is used."""

    reason: str


_Value = np.ndarray | _Perturbed | _Missing


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """A node that depends on the input.

    Attributes:
      node, operator: what is computed.
      operands: names of perturbed values, constants, None for one left out.
    """

    node: Node
    operator: Operator
    operands: tuple[str | np.ndarray | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxModel:
    """A network read from an ONNX file; a callable from a batch to its outputs.

    ``X_i`` and ``Y_i`` of VNN-LIB are the elements of one input and one output in C order.

    Attributes:
      input_name, output_name: as in the file.
      input_shape, output_shape: of one example, without the batch dimension; that is the
        leading one, where it is 1 or symbolic and not the only one.
      opset: version of the file's operator set.
    """

    input_name: str
    output_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    opset: int
    _batched: bool = dataclasses.field(repr=False)
    _steps: tuple[_Step, ...] = dataclasses.field(repr=False)
    # The output of a network that does not depend on its input.
    _constant: np.ndarray | None = dataclasses.field(repr=False)

    def __call__(self, x: Array) -> Array:
        """A batch ``[B, *input_shape]`` of float32 -> ``[B, *output_shape]`` of float32."""
        return jax.vmap(self.single)(x)

    def single(self, x: Array) -> Array:
        """One example ``[*input_shape]`` of float32 -> ``[*output_shape]`` of float32.

        The function that ``interval``, ``linear`` and the other transforms take.

        Raises:
          ValueError: if ``x`` has another shape or dtype.
        """
        x = jnp.asarray(x)
        if x.shape != self.input_shape or x.dtype != jnp.float32:
            raise ValueError(
                f"one example must be float32 of shape {self.input_shape}, "
                f"got {x.dtype} of shape {x.shape}"
            )
        if self._constant is not None:
            return jnp.asarray(self._constant.reshape(self.output_shape))
        values = {self.input_name: jnp.expand_dims(x, 0) if self._batched else x}
        for step in self._steps:
            operands = [values[v] if isinstance(v, str) else v for v in step.operands]
            results = _tuple(step.operator.function(step.node, *operands))
            values.update(zip(step.node.outputs, results, strict=False))
        y = values[self.output_name]
        return y if y.shape == self.output_shape else jnp.reshape(y, self.output_shape)


def from_onnx(path: str | os.PathLike, *, max_bytes: int = 2**31) -> OnnxModel:
    """Reads a network with one input and one output from an ONNX file.

    Weights stay float32 and become constants of what is traced. What only depends on them and on
    shapes is computed here, once, in numpy. A network that counts or classifies gives its integers
    as float32.

    Args:
      path: of the file.
      max_bytes: the most that the file, one value of the network, and all computed constants
        together may need.

    Raises:
      OnnxError: a ValueError; if the file is no ONNX model or is truncated, keeps weights outside
        itself, is larger than ``max_bytes`` or would need more; for unknown operators and
        attributes, several inputs or outputs, symbolic sizes other than the batch's, and
        weights that are not float32.
      ImportError: without the package onnx.
      OSError: if the file cannot be opened.
    """
    try:
        return _model(read(path, max_bytes), max_bytes)
    except OnnxError as error:
        message = f"{Path(path).name}: {error}"
        # Shapes and names of a file may be long.
        message = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}..."
        raise OnnxError(message) from error.__cause__


def _model(file: File, max_bytes: int) -> OnnxModel:
    shape, batched = _input_shape(file)
    check_bytes(
        f"input {shown(file.source.name)}", 4 * int(np.prod(shape, dtype=object)), max_bytes
    )
    builder = _Builder(file, shape, max_bytes)
    needed = _needed(file)
    for node, operands in file.nodes:
        if needed.intersection(node.outputs):
            builder.add(node, operands)
    result = builder.value(file.sink.name, f"output {shown(file.sink.name)}")
    constant = result if isinstance(result, np.ndarray) else None
    if (result.dtype == np.bool_) if constant is not None else (result.kind == "b"):
        raise OnnxError(f"output {shown(file.sink.name)}: expected numbers, got bool")
    if constant is not None:
        constant = constant.astype(np.float32)
    output = tuple(result.shape)
    if batched and output[:1] == (1,):
        output = output[1:]
    return OnnxModel(
        input_name=file.source.name,
        output_name=file.sink.name,
        input_shape=shape[1:] if batched else shape,
        output_shape=output,
        opset=file.opset,
        _batched=batched,
        _steps=tuple(builder.steps),
        _constant=constant,
    )


def _input_shape(file: File) -> tuple[tuple[int, ...], bool]:
    """The shape of one example as the graph sees it, and whether its first axis is the batch."""
    name, shape = file.source.name, file.source.shape
    if file.source.dtype != np.float32:
        raise OnnxError(f"input {shown(name)}: expected float32, got {file.source.dtype.__name__}")
    if shape is None:
        raise OnnxError(f"input {shown(name)}: expected a shape, got none; export with fixed sizes")
    batched = len(shape) > 1 and shape[0] in (1, None)
    fixed = (1, *shape[1:]) if batched else shape
    if None in fixed:
        raise OnnxError(
            f"input {shown(name)}: expected fixed sizes behind the batch's, got "
            f"{tuple('?' if size is None else size for size in shape)}; export with fixed sizes"
        )
    return fixed, batched


def _needed(file: File) -> set[str]:
    """Names of the values on which the output depends."""
    needed = {file.sink.name}
    for node, operands in reversed(file.nodes):
        if needed.intersection(node.outputs):
            needed.update(filter(None, operands))
    return needed


class _Builder:
    """Takes nodes in order; folds those that are known and keeps the others as steps."""

    def __init__(self, file: File, input_shape: tuple[int, ...], max_bytes: int) -> None:
        self.values: dict[str, _Value] = {
            **file.constants,
            file.source.name: _Perturbed(input_shape, "f"),
        }
        self.steps: list[_Step] = []
        self.folded = 0
        self.max_bytes = max_bytes

    def value(self, name: str, what: str) -> np.ndarray | _Perturbed:
        """The value of a name; ``what`` needs it."""
        found = self.values.get(name)
        if found is None:
            raise OnnxError(
                f"{what}: no earlier node, initializer or input gives the value {shown(name)}"
            )
        if isinstance(found, _Missing):
            raise OnnxError(f"{what}: {found.reason}")
        return found

    def add(self, node: Node, names: tuple[str, ...]) -> None:
        """Adds the next node."""
        operator = OPERATORS.get(node.operator)
        if operator is None:
            raise node.error("this operator is not supported; boundjax reads inference networks")
        while names and not names[-1]:
            names = names[:-1]
        fewest, most = operator.operands
        if not fewest <= len(names) <= most or "" in names[:fewest]:
            raise node.error(f"expected {fewest} to {most} operands, got {len(names)}")
        operands = [self.value(name, node.title) if name else None for name in names]
        if operator.shape_only:
            results: list[_Value] = [operator.function(node, operands[0].shape)]
        else:
            results = self._apply(node, operator, names, operands)
        unread = set(node.attributes) - node.read
        if unread:
            raise node.error(f"attribute {shown(min(unread))} is not supported")
        self._keep(node, results)

    def _keep(self, node: Node, results: list[_Value]) -> None:
        for k, name in enumerate(node.outputs):
            if not name:
                continue
            if name in self.values:
                raise node.error(f"gives the value {shown(name)}, which exists already")
            if k < len(results):
                self.values[name] = results[k]
            else:
                self.values[name] = _Missing(f"value {k + 1} of {node.title} is not supported")

    def _apply(
        self,
        node: Node,
        operator: Operator,
        names: tuple[str, ...],
        operands: list[np.ndarray | _Perturbed | None],
    ) -> list[_Value]:
        for k in operator.known:
            if k < len(operands) and isinstance(operands[k], _Perturbed):
                raise node.error(
                    f"operand {k + 1}, {shown(names[k])}, depends on the network's input; "
                    "only known values are supported"
                )
        places = [k for k, v in enumerate(operands) if v is not None and k not in operator.known]
        if not places:
            # Such operators check the size of their value themselves.
            return self._fold(node, operator, operands)
        kind = operator.kinds(node, [_kind(operands[k]) for k in places])
        structures = [_structure(operands[k]) for k in places]

        def call(*values: Array) -> tuple[Array, ...]:
            given = list(operands)
            for k, v in zip(places, values, strict=True):
                given[k] = v
            return _tuple(operator.function(node, *given))

        if not any(isinstance(v, _Perturbed) for v in operands):
            # Shapes first: a small file may describe a large value.
            for shape in _shapes(node, call, structures):
                node.check_size(shape)
            return self._fold(node, operator, operands)
        if kind == "i" and operator.constant_integers:
            raise node.error("divides integers that depend on the input, which is not supported")
        kinds = tuple(_kind(v) if k in places else "" for k, v in enumerate(operands))
        node = dataclasses.replace(node, kinds=kinds)
        perturbed = [k for k in places if isinstance(operands[k], _Perturbed)]
        # Values that do not depend on the input stay numpy's, as they are when the step is run.
        for k in places:
            if k not in perturbed:
                operands[k] = node.carried(operands[k])
        places = perturbed
        structures = [_structure(operands[k]) for k in places]
        shapes = _shapes(node, call, structures)
        for shape in shapes:
            node.check_size(shape)
        steps = tuple(names[k] if isinstance(v, _Perturbed) else v for k, v in enumerate(operands))
        self.steps.append(_Step(node, operator, steps))
        return [_Perturbed(shape, kind) for shape in shapes]

    def _fold(
        self, node: Node, operator: Operator, operands: list[np.ndarray | None]
    ) -> list[_Value]:
        def fold() -> list[np.ndarray]:
            with np.errstate(all="ignore"), jax.ensure_compile_time_eval():
                values = operator.function(dataclasses.replace(node, xp=np), *operands)
                return [np.asarray(v) for v in _tuple(values)]

        results = _guarded(node, fold)
        for value in results:
            if value.dtype not in (np.float32, np.int32, np.int64, np.bool_):
                raise node.error(f"mixes types: its value would be {value.dtype}")
            self.folded += value.nbytes
        check_bytes(f"{node.title}: all constants together", self.folded, self.max_bytes)
        return results


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def _kind(value: np.ndarray | _Perturbed) -> str:
    return value.kind if isinstance(value, _Perturbed) else value.dtype.kind


def _structure(value: np.ndarray | _Perturbed) -> jax.ShapeDtypeStruct:
    dtype = jnp.bool_ if _kind(value) == "b" else jnp.float32
    return jax.ShapeDtypeStruct(value.shape, dtype)


def _shapes(node: Node, call: Any, structures: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(s.shape) for s in _guarded(node, lambda: jax.eval_shape(call, *structures))]


def _guarded(node: Node, compute: Any) -> Any:
    """The result of ``compute``, with errors of numpy and JAX on operands that do not fit."""
    try:
        return compute()
    except OnnxError:
        raise
    except Exception as error:  # whatever an untrusted file can provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise node.error(f"its operands do not fit: {reason}") from error

"""Turns a graph of nodes into a JAX function: constants are folded, the rest are steps."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from boundjax.onnx.file import File, read
from boundjax.onnx.node import Node, OnnxError, check_bytes, quoted
from boundjax.onnx.operators import OPERATORS, Operator
from boundjax.onnx.steps import Step, Steps, as_tuple, separated

_MAX_MESSAGE = 500  # characters of an error

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """A value that depends on the input.

    Attributes:
      shape: its shape, with the batch dimension.
      kind: "f", "i" (carried as float32) or "b".
    """

    shape: tuple[int, ...]
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Missing:
    """A value that boundjax does not compute; using it is an error."""

    reason: str


_Value = np.ndarray | _Perturbed | _Missing


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxModel:
    """A network read from an ONNX file; call it with a batch to get the outputs.

    `X_i` and `Y_i` of VNN-LIB are the elements of one input and one output in C order.

    Attributes:
      input_name, output_name: their names in the file.
      input_shape, output_shape: shapes of one example. A leading dimension that is 1 or symbolic,
        and not the only one, is the batch and left out.
      opset: version of the file's operator set.
      weights: the float32 constants whose numbers nothing but arithmetic depends on, all different.
    """

    input_name: str
    output_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    opset: int
    weights: tuple[np.ndarray, ...] = dataclasses.field(repr=False)
    _steps: Steps = dataclasses.field(repr=False)

    def __call__(self, x: Float32[Array, "B ..."]) -> Float32[Array, "B ..."]:
        """The outputs `[B, *output_shape]` of a batch `[B, *input_shape]`."""
        return jax.vmap(self.single)(x)

    def single(self, x: Float32[Array, "*input_shape"]) -> Float32[Array, "*output_shape"]:
        """The output of one example; pass this function to `interval`, `linear` and the like.

        Raises:
          ValueError: if `x` has another shape or dtype.
        """
        return self._steps.apply(self.weights, x)

    @property
    def apply(self) -> Callable[[Sequence[Any], Any], Array]:
        """The function `(weights, x)` -> the output of one example, which holds no weights.

        With the model's `weights` it is `single`, with other ones the network of the same
        `structure` that has them.
        """
        return self._steps.apply

    @property
    def structure(self) -> Hashable:
        """What the network is but for the numbers of its weights.

        Two models with equal structures have the same `apply`, so that what is compiled for one
        serves the other.
        """
        return self._steps.structure


def from_onnx(path: str | os.PathLike, *, max_bytes: int = 2**31) -> OnnxModel:
    """Reads a network with one input and one output from an ONNX file.

    Weights stay float32; they are constants of the traced function `single` and arguments of
    `apply`. Everything that depends only on weights and shapes is computed once, here, in numpy;
    what is rounded on the way is computed again by the function, so that bounds account for it.
    Integer outputs of a network that counts or classifies are returned as float32.

    Args:
      path: the ONNX file.
      max_bytes: limit on the file, on each value of the network, and on all computed constants
        together.

    Raises:
      OnnxError: a ValueError; if the file is not an ONNX model, is truncated, stores weights
        outside itself, or is or needs more than `max_bytes`; for unknown operators and attributes,
        several inputs or outputs, symbolic sizes other than the batch's, and weights that are not
        float32.
      ImportError: if the package onnx is not installed.
      OSError: if the file cannot be opened.
    """
    try:
        return _model(read(path, max_bytes), max_bytes)
    except OnnxError as error:
        message = f"{Path(path).name}: {error}"
        # Shapes and names in a file may be long.
        message = message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 3]}..."
        raise OnnxError(message) from error.__cause__


def _model(file: File, max_bytes: int) -> OnnxModel:
    shape, batched = _input_shape(file)
    check_bytes(
        f"input {quoted(file.source.name)}", 4 * int(np.prod(shape, dtype=object)), max_bytes
    )
    builder = _Builder(file, shape, max_bytes)
    needed = _needed(file)
    for node, operands in file.nodes:
        if needed.intersection(node.outputs):
            builder.add(node, operands)
    result = builder.value(file.sink.name, f"output {quoted(file.sink.name)}")
    if _kind(result) == "b":
        raise OnnxError(f"output {quoted(file.sink.name)}: expected numbers, got bool")
    constant = result.astype(np.float32) if isinstance(result, np.ndarray) else None
    output = tuple(result.shape)
    if batched and output[:1] == (1,):
        output = output[1:]
    separate, weights = separated(builder.steps)
    steps = Steps(
        input_name=file.source.name,
        output_name=file.sink.name,
        input_shape=shape[1:] if batched else shape,
        output_shape=output,
        batched=batched,
        steps=separate,
        constant=constant,
    )
    return OnnxModel(
        input_name=steps.input_name,
        output_name=steps.output_name,
        input_shape=steps.input_shape,
        output_shape=steps.output_shape,
        opset=file.opset,
        weights=weights,
        _steps=steps,
    )


def _input_shape(file: File) -> tuple[tuple[int, ...], bool]:
    """The input's shape as the graph sees it, and whether its first axis is the batch."""
    name, shape = file.source.name, file.source.shape
    if file.source.dtype != np.float32:
        raise OnnxError(f"input {quoted(name)}: expected float32, got {file.source.dtype.__name__}")
    if shape is None:
        raise OnnxError(
            f"input {quoted(name)}: expected a shape, got none; export with fixed sizes"
        )
    batched = len(shape) > 1 and shape[0] in (1, None)
    sizes = (1, *shape[1:]) if batched else shape
    fixed = tuple(size for size in sizes if size is not None)
    if len(fixed) < len(sizes):
        raise OnnxError(
            f"input {quoted(name)}: expected fixed sizes after the batch's, got "
            f"{tuple('?' if size is None else size for size in shape)}; export with fixed sizes"
        )
    return fixed, batched


def _needed(file: File) -> set[str]:
    """The names of the values on which the output depends."""
    needed = {file.sink.name}
    for node, operands in reversed(file.nodes):
        if needed.intersection(node.outputs):
            needed.update(filter(None, operands))
    return needed


class _Builder:
    """Processes nodes in order; folds those without perturbed operands, keeps the rest as steps.

    A folded node that rounds is kept as a step, too.
    """

    def __init__(self, file: File, input_shape: tuple[int, ...], max_bytes: int) -> None:
        self.values: dict[str, _Value] = {
            **file.constants,
            file.source.name: _Perturbed(input_shape, "f"),
        }
        self.steps: list[Step] = []
        self.rounded: set[str] = set()  # the constants that steps compute again
        self.folded = 0
        self.max_bytes = max_bytes

    def value(self, name: str, what: str) -> np.ndarray | _Perturbed:
        """Looks up a value by its name; `what` names its user in errors."""
        value = self.values.get(name)
        if value is None:
            raise OnnxError(
                f"{what}: no earlier node, initializer or input gives the value {quoted(name)}"
            )
        if isinstance(value, _Missing):
            raise OnnxError(f"{what}: {value.reason}")
        return value

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
            (operand,) = operands
            assert operand is not None, "the one operand is required"
            results: Sequence[_Value] = [operator.function(node, operand.shape)]
        else:
            results = self._apply(node, operator, names, operands)
        unread = set(node.attributes) - node.read
        if unread:
            raise node.error(f"attribute {quoted(min(unread))} is not supported")
        self._keep(node, results)

    def _keep(self, node: Node, results: Sequence[_Value]) -> None:
        for k, name in enumerate(node.outputs):
            if not name:
                continue
            if name in self.values:
                raise node.error(f"gives the value {quoted(name)}, which exists already")
            if k < len(results):
                self.values[name] = results[k]
            else:
                self.values[name] = _Missing(f"value {k + 1} of {node.title} is not supported")

    def _apply(
        self,
        node: Node,
        operator: Operator,
        names: tuple[str, ...],
        operands: Sequence[np.ndarray | _Perturbed | None],
    ) -> Sequence[_Value]:
        for k in operator.constant_operands:
            if k < len(operands) and isinstance(operands[k], _Perturbed):
                raise node.error(
                    f"operand {k + 1}, {quoted(names[k])}, depends on the network's input; "
                    "only constants are supported"
                )
        constants = [v for v in operands if not isinstance(v, _Perturbed)]
        values = {
            k: v
            for k, v in enumerate(operands)
            if v is not None and k not in operator.constant_operands
        }
        rounded = {k for k, name in enumerate(names) if name in self.rounded}
        rounded -= set(operator.constant_operands) - set(operator.numbers)
        if not values:
            # Operators whose operands are all constant check the size of their value themselves.
            results = self._fold(node, operator, constants)
            self._recompute(node, operator, names, operands, rounded, results)
            return results
        kind = operator.kinds(node, [_kind(v) for v in values.values()])
        if len(constants) == len(operands):
            # Compute the shapes first, because a small file may describe a large value.
            call = _function_of(node, operator, operands, list(values))
            for shape in _shapes(node, call, values.values()):
                node.check_size(shape)
            results = self._fold(node, operator, constants)
            self._recompute(node, operator, names, operands, rounded, results)
            return results
        if kind == "i" and operator.constant_integers:
            raise node.error("divides integers that depend on the input, which is not supported")
        kinds = tuple(_kind(values[k]) if k in values else "" for k in range(len(operands)))
        node = dataclasses.replace(node, kinds=kinds)
        perturbed = {k: v for k, v in values.items() if isinstance(v, _Perturbed)}
        # Constants beside perturbed values stay numpy arrays, here and when the step is run.
        carried = {k: node.carried(v) for k, v in values.items() if isinstance(v, np.ndarray)}
        operands = [carried.get(k, v) for k, v in enumerate(operands)]
        call = _function_of(node, operator, operands, list(perturbed))
        shapes = _shapes(node, call, perturbed.values())
        for shape in shapes:
            node.check_size(shape)
        self._step(node, operator, names, operands, rounded, shapes)
        return [_Perturbed(shape, kind) for shape in shapes]

    def _recompute(
        self,
        node: Node,
        operator: Operator,
        names: tuple[str, ...],
        operands: Sequence[np.ndarray | _Perturbed | None],
        rounded: set[int],
        results: Sequence[np.ndarray],
    ) -> None:
        """Appends the step of a folded node, if its results may be rounded."""
        floats = all(result.dtype.kind == "f" for result in results)
        if floats and (rounded or not operator.selects):
            self.rounded.update(node.outputs)
            shapes = [result.shape for result in results]
            self._step(node, operator, names, operands, rounded, shapes, constant=True)

    def _step(
        self,
        node: Node,
        operator: Operator,
        names: tuple[str, ...],
        operands: Sequence[np.ndarray | _Perturbed | None],
        rounded: set[int],
        shapes: Sequence[tuple[int, ...]],
        constant: bool = False,
    ) -> None:
        """Appends a step; earlier ones compute the perturbed and the rounded operands."""
        values = (
            names[k] if k in rounded or isinstance(v, _Perturbed) else v
            for k, v in enumerate(operands)
        )
        self.steps.append(Step(node, operator, tuple(values), tuple(shapes), constant))

    def _fold(
        self, node: Node, operator: Operator, operands: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        def fold() -> list[np.ndarray]:
            with np.errstate(all="ignore"), jax.ensure_compile_time_eval():
                values = operator.function(dataclasses.replace(node, xp=np), *operands)
                return [np.asarray(v) for v in as_tuple(values)]

        results = _guarded(node, fold)
        for value in results:
            if value.dtype not in (np.float32, np.int32, np.int64, np.bool_):
                raise node.error(f"expected operands of one type, got a value of {value.dtype}")
            self.folded += value.nbytes
        check_bytes(f"{node.title}: all constants together", self.folded, self.max_bytes)
        return results


def _function_of(
    node: Node,
    operator: Operator,
    operands: Sequence[np.ndarray | _Perturbed | None],
    positions: Sequence[int],
) -> Callable[..., tuple[Array, ...]]:
    """A node's values as a function of its operands at these positions."""

    def call(*values: Array) -> tuple[Array, ...]:
        arguments: list[Any] = list(operands)
        for k, value in zip(positions, values, strict=True):
            arguments[k] = value
        return as_tuple(operator.function(node, *arguments))

    return call


def _kind(value: np.ndarray | _Perturbed) -> str:
    return value.kind if isinstance(value, _Perturbed) else value.dtype.kind


def _shapes(
    node: Node, call: Callable[..., Any], operands: Iterable[np.ndarray | _Perturbed]
) -> list[tuple[int, ...]]:
    """The shapes of a function's values at operands of these shapes and kinds."""
    structures = [
        jax.ShapeDtypeStruct(v.shape, jnp.bool_ if _kind(v) == "b" else jnp.float32)
        for v in operands
    ]
    return [tuple(s.shape) for s in _guarded(node, lambda: jax.eval_shape(call, *structures))]


def _guarded(node: Node, compute: Callable[[], _Result]) -> _Result:
    """Computes a result; errors of numpy and JAX about its operands become errors of the node."""
    try:
        return compute()
    except OnnxError:
        raise
    except Exception as error:  # whatever an untrusted file can provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise node.error(f"its operands do not fit: {reason}") from error

"""An ONNX file as a JAX function: `from_onnx`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float32

from boundjax.onnx.builder import Builder, Perturbed, Scope
from boundjax.onnx.content import read_message, text
from boundjax.onnx.expansions import EXPANSIONS
from boundjax.onnx.file import File, Variable, contents, live
from boundjax.onnx.node import OnnxError, check_bytes, kind_of, quoted
from boundjax.onnx.steps import Input, Output, Steps, separated

_MAX_MESSAGE = 500  # characters of an error

Names = str | Sequence[str] | None
# From the names of the inputs and outputs of a file to the ones that are wanted.
Choose = Callable[[Sequence[str], Sequence[str]], tuple[Sequence[str], Sequence[str]]]


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxModel:
    """A network read from an ONNX file; call it with a batch to get the outputs.

    A network of several inputs takes an array for each, in the order of `input_names`. One of
    several outputs returns a tuple, in the order of `output_names`. `X_i` and `Y_i` of VNN-LIB are
    the elements of all inputs and all outputs, one after the other, each in C order.

    Attributes:
      input_names, output_names: their names in the file.
      input_shapes, output_shapes: shapes of one example. A leading dimension that is 1 or symbolic,
        and not the only one, is the batch and left out.
      opset: version of the file's operator set.
      weights: the float32 constants whose numbers nothing but arithmetic depends on, all different.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    opset: int
    weights: tuple[np.ndarray, ...] = dataclasses.field(repr=False)
    _steps: Steps = dataclasses.field(repr=False)

    @property
    def input_name(self) -> str:
        """The name of the one input; ValueError if there are several."""
        return _only(self.input_names, self.input_names, "input")

    @property
    def output_name(self) -> str:
        """The name of the one output; ValueError if there are several."""
        return _only(self.output_names, self.output_names, "output")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example; ValueError if there are several inputs."""
        return _only(self.input_shapes, self.input_names, "input")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the output of one example; ValueError if there are several outputs."""
        return _only(self.output_shapes, self.output_names, "output")

    def __call__(self, *batches: Float32[Array, "B ..."]) -> Any:
        """The outputs `[B, *output_shape]` of a batch `[B, *input_shape]`; tuples of several."""
        return jax.vmap(self.single)(*batches)

    def single(self, *examples: Float32[Array, ...]) -> Any:
        """The output of one example; pass this function to `interval`, `linear` and the like.

        Bounds for a network of several inputs are those of a function of a pytree:
        `bj.linear(lambda x: net.single(x["a"], x["b"]))`, or of one input with the others fixed:
        `bj.linear(lambda a: net.single(a, b))`.

        Args:
          *examples: an array `[*input_shape]` for each input.

        Returns:
          An array `[*output_shape]`, or a tuple of the arrays of several outputs.

        Raises:
          ValueError: if an example has another shape or dtype, or for another number of them.
        """
        return self._steps.apply(self.weights, *examples)

    @property
    def apply(self) -> Callable[..., Any]:
        """The function `(weights, *examples)` -> the output of one example, without weights.

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


def from_onnx(
    path: str | os.PathLike[str],
    *,
    inputs: Names = None,
    outputs: Names = None,
    max_bytes: int = 2**31,
) -> OnnxModel:
    """Reads a network from an ONNX file, plain or compressed with gzip.

    Weights are float32 constants of the traced function `single` and arguments of `apply`; they may
    stand in other files of the same folder. Everything that depends only on weights and shapes is
    computed once, here, in numpy; what is rounded on the way is computed again by the function, so
    that bounds account for it. Integer outputs of a network that counts or classifies are returned
    as float32.

    The network computes in float32. Weights that are stored as float16, bfloat16 or double have to
    be cast to float32 by the file (`Cast`), those of 8 and 16 bits by `DequantizeLinear`. A cast of
    doubles that rounds is charged like any rounding. Computing in another precision is refused.

    `If` and `Loop` need conditions and trip counts that do not depend on the input. Loops, branches
    and local functions are written out, as at most 20,000 nodes.

    Args:
      path: the ONNX file; its first bytes tell whether it is compressed.
      inputs: the names of the arguments, in their order; by default all inputs in file order. An
        input that is left out must not be needed for the outputs.
      outputs: the name of one output, or the names of several; by default all in file order. Values
        inside of the network have names, too.
      max_bytes: limit on the file (with weights in other files, and decompressed), on each value of
        the network, and on all computed constants together.

    Raises:
      OnnxError: a ValueError; if the file is not an ONNX model, is truncated, refers to files
        outside of its folder, or is or needs more than `max_bytes`; for unknown operators,
        attributes and names, and symbolic sizes other than the batch's.
      ImportError: if the package onnx is not installed.
      OSError: if the file cannot be opened.
    """

    def choose(known: Sequence[str], results: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        return _names(inputs, known), _names(outputs, results)

    return _read(path, choose, max_bytes)[0]


def with_content(
    path: str | os.PathLike[str], *, choose: Choose | None = None, max_bytes: int = 2**31
) -> tuple[OnnxModel, bytes]:
    """What `from_onnx` returns, and the same network as one uncompressed ONNX file.

    Args:
      path: of the ONNX file.
      choose: what `inputs=` and `outputs=` are; all by default. Hidden values among the outputs
        become outputs of the file that is returned.
      max_bytes: as of `from_onnx`.
    """
    model, message = _read(path, choose or (lambda inputs, outputs: (inputs, outputs)), max_bytes)
    _show(message, model.output_names)
    try:
        return model, message.SerializeToString()
    except Exception as error:  # protobuf's limit of 2 GB has an exception of its own
        name = Path(path).name
        raise OnnxError(f"{name}: the model with its weights is too large for one file") from error


def _show(message: Any, names: Sequence[str]) -> None:
    """Makes outputs of those values of a `ModelProto` that are none yet."""
    shown = {text(output.name) for output in message.graph.output}
    for name in names:
        if name not in shown:
            message.graph.output.add().name = name


def _read(path: str | os.PathLike[str], choose: Choose, max_bytes: int) -> tuple[OnnxModel, Any]:
    try:
        message = read_message(path, max_bytes)
        file = contents(message, max_bytes)
        return _model(_chosen(file, choose), max_bytes), message
    except OnnxError as error:
        line = f"{Path(path).name}: {error}"
        # Shapes and names in a file may be long.
        line = line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."
        raise OnnxError(line) from error.__cause__


def _only(values: Sequence[Any], names: Sequence[str], role: str) -> Any:
    if len(values) != 1:
        listed = ", ".join(quoted(name) for name in names[:8])
        raise ValueError(f"the network has {len(values)} {role}s ({listed}); ask for {role}_names")
    return values[0]


def _chosen(file: File, choose: Choose) -> File:
    """The part of a file that computes some outputs, or hidden values, of some inputs."""
    by_name = {source.name: source for source in file.inputs}
    if len(by_name) < len(file.inputs):
        raise OnnxError("expected distinct inputs, got two of one name")
    values = {name for operation in file.operations for name in operation.node.outputs if name}
    inputs, outputs = choose(tuple(by_name), file.outputs)
    sources = _named(inputs, tuple(by_name), (), "inputs")
    sinks = _named(outputs, file.outputs, values, "outputs")
    operations = live(file.operations, sinks)
    needed = set(sinks).union(*(operation.needs() for operation in operations))
    missing = sorted(needed & (by_name.keys() - set(sources)))
    if missing:
        raise OnnxError(
            f"the outputs {', '.join(map(quoted, sinks[:4]))} depend on the input "
            f"{quoted(missing[0])}, which inputs= leaves out"
        )
    return dataclasses.replace(
        file,
        inputs=tuple(by_name[name] for name in sources),
        outputs=sinks,
        operations=operations,
    )


def _names(wanted: Names, known: Sequence[str]) -> Sequence[str]:
    return known if wanted is None else (wanted,) if isinstance(wanted, str) else wanted


def _named(
    names: Sequence[str], known: Sequence[str], hidden: Collection[str], role: str
) -> tuple[str, ...]:
    listed = ", ".join(quoted(name) for name in known[:8])
    for name in names:
        if name not in known and name not in hidden:
            raise OnnxError(f"{role}: expected some of {listed}, got {quoted(str(name))}")
    if not names or len(set(names)) < len(names):
        raise OnnxError(f"{role}: expected at least one name and none twice, of {listed or 'none'}")
    return tuple(names)


def _model(file: File, max_bytes: int) -> OnnxModel:
    sources = tuple(map(_input, file.inputs))
    builder, scope = Builder(file.functions, EXPANSIONS, max_bytes), Scope()
    for source in sources:
        shape = (1, *source.shape) if source.batched else source.shape
        size = 4 * int(np.prod(shape, dtype=object))
        check_bytes(f"input {quoted(source.name)}", size, max_bytes)
        key = builder.fresh(source.name, Perturbed(shape, "f"))
        builder.define(scope, source.name, key, f"input {quoted(source.name)}")
    for name, constant in file.constants.items():
        key = builder.fresh(name, constant)
        builder.define(scope, name, key, f"initializer {quoted(name)}")
    for operation in file.operations:
        builder.add(operation, scope)
    batched = any(source.batched for source in sources)
    sinks = tuple(_output(builder, scope, name, batched) for name in file.outputs)
    separate, weights = separated(builder.steps)
    return OnnxModel(
        input_names=tuple(source.name for source in sources),
        output_names=file.outputs,
        input_shapes=tuple(source.shape for source in sources),
        output_shapes=tuple(sink.shape for sink in sinks),
        opset=file.opset,
        weights=weights,
        _steps=Steps(sources, sinks, separate),
    )


def _input(source: Variable) -> Input:
    """An input as the graph sees it, and whether its first axis is the batch."""
    name, shape = source.name, source.shape
    if source.dtype != np.float32:
        raise OnnxError(
            f"input {quoted(name)}: expected float32, got {source.dtype}; leave it out with "
            "inputs= if the outputs do not need it"
        )
    if shape is None:
        raise OnnxError(
            f"input {quoted(name)}: expected a shape, got none; export with fixed sizes"
        )
    batched = len(shape) > 1 and shape[0] in (1, None)
    sizes = shape[1:] if batched else shape
    fixed = tuple(size for size in sizes if size is not None)
    if len(fixed) < len(sizes):
        raise OnnxError(
            f"input {quoted(name)}: expected fixed sizes after the batch's, got "
            f"{tuple('?' if size is None else size for size in shape)}; export with fixed sizes"
        )
    return Input(name, fixed, batched)


def _output(builder: Builder, scope: Scope, name: str, batched: bool) -> Output:
    what = f"output {quoted(name)}"
    key = builder.key(scope, name, what)
    value = builder.value(key, what)
    shape = value.shape[1:] if batched and value.shape[:1] == (1,) else value.shape
    if isinstance(value, Perturbed):
        kind, constant = value.kind, None
    else:
        kind, constant = kind_of(value.dtype), value.astype(np.float32)
    if kind == "b":
        raise OnnxError(f"{what}: expected numbers, got bool")
    if kind == "h":
        raise OnnxError(f"{what}: expected float32, got a constant of another precision")
    return Output(key, tuple(shape), constant)

"""An ONNX network as the command verifies it: JAX functions beside onnxruntime."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax import vnnlib
from boundjax.onnx.model import Choose, OnnxModel, with_content
from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES
from boundjax.search.method import Method
from boundjax.search.network import weighed
from boundjax.search.programs import Programs
from boundjax.search.search import Result, verify
from boundjax.sets.rounding import Rounding
from boundjax.verify.errors import VerifyError, one_line

_CHECKED_POINTS = 5
# Benchmarks have a few architectures, often one after the other.
_MOST_STRUCTURES = 4


# A file, or for each network of a query its file and what is declared.
Source: TypeAlias = Path | tuple[tuple[Path, vnnlib.NetworkUse], ...]


class Verifier(Protocol):
    """Decides properties of one network."""

    def verify(
        self,
        property: vnnlib.Property,
        method: Method,
        timeout: float,
        with_proof: bool = False,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        count_compilation: bool = True,
    ) -> Result:
        """The verdict on a property."""
        ...


class Compiled:
    """What is compiled for the networks of the last few structures, whatever their weights."""

    def __init__(self, most: int = _MOST_STRUCTURES):
        """Keeps the programs of the `most` structures that were used last."""
        self._most = most
        self._programs: OrderedDict[Hashable, dict[Any, Any]] = OrderedDict()

    def of(self, key: Hashable) -> dict[Any, Any]:
        """The programs of networks with a key, which must tell all apart that differ in theirs."""
        programs = self._programs.setdefault(key, {})
        self._programs.move_to_end(key)
        while len(self._programs) > self._most:
            self._programs.popitem(last=False)
        return programs


class _Part:
    """One ONNX file, as a JAX function with bounds and in onnxruntime.

    Attributes:
      path: of the file.
      model: takes the inputs, and gives the outputs, that the query declares, in its order.
      size: the number of elements of all inputs.
    """

    def __init__(self, path: Path, use: vnnlib.NetworkUse | None = None):
        """Imports a file; a use names inputs, outputs and hidden values, or counts them."""
        self.path = path
        self.model, content = with_content(path, choose=None if use is None else _chosen(use, path))
        if use is not None:
            _require_sizes(use, self.model, path)
        self.size = sum(map(math.prod, self.model.input_shapes))
        # The file itself may be compressed, or refer to other files.
        self._session = _session(content, path.name)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """The outputs `[m]` of an input `[n]`, as onnxruntime computes them."""
        feed, start = {}, 0
        declared = {source.name: source.shape for source in self._session.get_inputs()}
        for name, example in zip(self.model.input_names, self.model.input_shapes, strict=True):
            # A symbolic dimension is the batch.
            shape = [n if isinstance(n, int) and n > 0 else 1 for n in declared[name]]
            stop = start + math.prod(example)
            feed[name] = np.asarray(x[start:stop], np.float32).reshape(shape)
            start = stop
        try:
            values = self._session.run(list(self.model.output_names), feed)
        except Exception as error:  # onnxruntime's exceptions have no other common class
            raise VerifyError(f"{self.path.name}: onnxruntime: {one_line(error)}") from None
        return np.concatenate([np.asarray(value).reshape(-1) for value in values])


class Network:
    """One or several ONNX networks, side by side, as JAX functions with bounds and in onnxruntime.

    The inputs of all networks stand one after the other, and so do their outputs.
    """

    def __init__(
        self,
        path: Source,
        rounding: Rounding = "float32",
        max_bytes: int = MAX_BYTES,
        compiled: Compiled | None = None,
    ):
        """Imports the files. Where there are several local devices, they divide its batches.

        Args:
          path: of the network, or for each network of a query its path and what is declared.
          rounding: what proofs hold for, see `boundjax.linear`.
          max_bytes: memory of one call on each device, see `Programs`.
          compiled: shared by networks, of which those of one structure then compile once.

        Raises:
          OSError: if a file cannot be opened.
          OnnxError: if a file cannot be imported.
          VerifyError: if onnxruntime is not installed or refuses a file, or a network is not as it
            is declared.
        """
        files = [(path, None)] if isinstance(path, Path) else path
        self._parts = [_Part(file, use) for file, use in files]
        self._rounding: Rounding = rounding
        self._max_bytes, self._compiled = max_bytes, compiled
        self._weights = jax.device_put(tuple(part.model.weights for part in self._parts))
        self._kept: dict[Any, Programs] = {}

    @property
    def model(self) -> OnnxModel:
        """The first network."""
        return self._parts[0].model

    @property
    def programs(self) -> Programs:
        """Those of the outputs `[m]`."""
        return self._programs(None)

    def _programs(self, property: vnnlib.Property | None) -> Programs:
        """Those of what the rows of a property weigh, or of the outputs."""
        weighs = property is not None and property.on_inputs
        key = (property.products,) if property is not None and weighs else None
        if key not in self._kept:
            apply, shape = _side_by_side([part.model for part in self._parts])
            structures = tuple(part.model.structure for part in self._parts)
            options = structures, self._rounding, self._max_bytes, key
            devices = jax.local_devices()
            self._kept[key] = Programs(
                apply if key is None else weighed(apply, *key),
                shape,
                rounding=self._rounding,
                max_bytes=self._max_bytes,
                devices=devices if len(devices) > 1 else None,
                weights=self._weights,
                compiled=None if self._compiled is None else self._compiled.of(options),
            )
        return self._kept[key]

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """The outputs `[m]` of an input `[n]`, as onnxruntime computes them."""
        outputs, start = [], 0
        for part in self._parts:
            outputs.append(part.evaluate(x[start : start + part.size]))
            start += part.size
        return np.concatenate(outputs)

    def verify(
        self,
        property: vnnlib.Property,
        method: Method,
        timeout: float,
        with_proof: bool = False,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        count_compilation: bool = True,
    ) -> Result:
        """Runs `boundjax.verify.verify`, in which onnxruntime decides counterexamples.

        There is no proof of constraints on several inputs: no checker reads one.

        Raises:
          VerifyError: if an imported network disagrees with onnxruntime; nothing is proved then.
        """
        programs = self._programs(property)

        def evaluate(x: np.ndarray) -> np.ndarray:
            return property.weighed(self.evaluate(x), x)

        result = verify(
            programs.network,
            property,
            method=method,
            timeout=timeout,
            evaluate=evaluate,
            rounding=self._rounding,
            programs=programs,
            with_proof=with_proof and not property.on_inputs,
            max_queue_bytes=max_queue_bytes,
            count_compilation=count_compilation,
        )
        if result.verdict == "unsat":
            self._compare(property)
        point = result.counterexample
        if point is None:
            return result
        outputs = point.outputs[: property.output_size]
        return dataclasses.replace(
            result, counterexample=dataclasses.replace(point, outputs=outputs)
        )

    def _compare(self, property: vnnlib.Property) -> None:
        """Compares the imported networks with onnxruntime at points of the first box."""
        case, random = property.cases[0], np.random.default_rng(0)
        for index in range(_CHECKED_POINTS):
            share = random.uniform(size=case.lower.shape) if index else 0.5
            x = case.inner_lower + share * (case.inner_upper - case.inner_lower)
            x = np.clip(x, case.inner_lower, case.inner_upper).astype(np.float32)
            ours, theirs = np.asarray(self.programs.forward(x)), self.evaluate(x)
            # Rounding differs between runtimes, but far less than a misread network would.
            if ours.shape != theirs.shape or not np.allclose(
                ours, theirs, rtol=1e-3, atol=1e-4 * (1.0 + np.abs(theirs).max())
            ):
                names = ", ".join(part.path.name for part in self._parts)
                raise VerifyError(
                    f"{names}: expected the imported network to agree with onnxruntime, got other "
                    "outputs; nothing is proved, please report the file"
                )


def _chosen(use: vnnlib.NetworkUse, path: Path) -> Choose:
    """Finds the tensors of a declared network among those of its file.

    Tensors without a name of the file are taken in its order.
    """

    def choose(inputs: Sequence[str], outputs: Sequence[str]) -> tuple[list[str], list[str]]:
        def named(tensors: Sequence[vnnlib.Tensor], known: Sequence[str], role: str) -> list[str]:
            if len(tensors) != len(known):
                raise VerifyError(
                    f"{path.name}: expected {len(tensors)} {role}s, as {use.name} declares, got "
                    f"{len(known)}"
                )
            return [t.onnx_name or name for t, name in zip(tensors, known, strict=True)]

        hidden = [tensor.onnx_name or tensor.name for tensor in use.hidden]
        return (
            named(use.inputs, inputs, "input"),
            [*named(use.outputs, outputs, "output"), *hidden],
        )

    return choose


def _require_sizes(use: vnnlib.NetworkUse, model: OnnxModel, path: Path) -> None:
    """Checks that every tensor has as many elements as are declared.

    Raises:
      VerifyError: for the first that does not.
    """
    tensors = *use.inputs, *use.outputs, *use.hidden
    for tensor, shape in zip(tensors, (*model.input_shapes, *model.output_shapes), strict=True):
        if math.prod(tensor.shape) != math.prod(shape):
            raise VerifyError(
                f"{path.name}: expected {tensor.name} of shape {tensor.shape}, as {use.name} "
                f"declares, got {shape}"
            )


def _side_by_side(models: Sequence[OnnxModel]) -> tuple[Callable[..., Array], tuple[int, ...]]:
    """The function of the weights of all networks and one example, and the example's shape."""
    functions, shapes = zip(*map(flattened, models), strict=True)
    if len(models) == 1:
        (single,), (shape,) = functions, shapes
        return (lambda weights, x: single(weights[0], x)), shape
    sizes = [math.prod(shape) for shape in shapes]

    def apply(weights: Any, x: Array) -> Array:
        parts = jnp.split(x, np.cumsum(sizes)[:-1])
        outputs = [
            jnp.ravel(function(w, jnp.reshape(part, shape)))
            for function, w, part, shape in zip(functions, weights, parts, shapes, strict=True)
        ]
        return jnp.concatenate(outputs)

    return apply, (sum(sizes),)


def flattened(model: OnnxModel) -> tuple[Callable[..., Array], tuple[int, ...]]:
    """The function of a network's weights and one example, and the example's shape.

    The elements of several inputs, and of several outputs, stand one after the other in file order,
    as VNN-LIB's X_i and Y_i count them.
    """
    if len(model.input_names) == len(model.output_names) == 1:
        return model.apply, model.input_shape
    sizes = [math.prod(shape) for shape in model.input_shapes]
    ends = np.cumsum(sizes)

    def apply(weights: Any, x: Array) -> Array:
        parts = [
            jnp.reshape(x[end - size : end], shape)
            for size, end, shape in zip(sizes, map(int, ends), model.input_shapes, strict=True)
        ]
        y = model.apply(weights, *parts)
        return jnp.concatenate([jnp.ravel(v) for v in (y if isinstance(y, tuple) else (y,))])

    return apply, (sum(sizes),)


def _session(content: bytes, name: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise VerifyError(
            "expected onnxruntime, which confirms counterexamples, got no such package; "
            "run pip install 'boundjax[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Otherwise products with dequantized weights are replaced by ones of 8-bit numbers, which are
    # off in the third digit: another network than the one of the file.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no other common class
        raise VerifyError(f"{name}: onnxruntime refuses it: {one_line(error)}") from None

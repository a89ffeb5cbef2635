"""An ONNX network as the command verifies it: JAX functions beside onnxruntime."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax import vnnlib
from boundjax.onnx.model import OnnxModel, with_content
from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES
from boundjax.search.method import Method
from boundjax.search.network import followed_by_inputs
from boundjax.search.programs import Programs
from boundjax.search.search import Result, verify
from boundjax.sets.rounding import Rounding
from boundjax.verify.errors import VerifyError, one_line

_CHECKED_POINTS = 5
# Benchmarks have a few architectures, often one after the other.
_MOST_STRUCTURES = 4


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


class Network:
    """An ONNX network, both as JAX functions with bounds and in onnxruntime."""

    def __init__(
        self,
        path: Path,
        rounding: Rounding = "float32",
        max_bytes: int = MAX_BYTES,
        compiled: Compiled | None = None,
    ):
        """Imports the file. Where there are several local devices, they divide its batches.

        Args:
          path: of the network.
          rounding: what proofs hold for, see `boundjax.linear`.
          max_bytes: memory of one call on each device, see `Programs`.
          compiled: shared by networks, of which those of one structure then compile once.

        Raises:
          OSError: if the file cannot be opened.
          OnnxError: if the file cannot be imported.
          VerifyError: if onnxruntime is not installed or refuses the file.
        """
        self.path = path
        self.model, content = with_content(path)
        self._rounding: Rounding = rounding
        self._max_bytes, self._compiled = max_bytes, compiled
        self._weights = jax.device_put(self.model.weights)
        # The file itself may be compressed, or refer to other files.
        self._session = _session(content, path.name)

    @functools.cached_property
    def programs(self) -> Programs:
        """Those of the outputs `[m]`."""
        return self._programs(followed=False)

    @functools.cached_property
    def _followed(self) -> Programs:
        """Those of the outputs and after them the inputs, `[m + n]`."""
        return self._programs(followed=True)

    def _programs(self, followed: bool) -> Programs:
        apply, shape = flattened(self.model)
        key = self.model.structure, self._rounding, self._max_bytes, followed
        devices = jax.local_devices()
        return Programs(
            followed_by_inputs(apply) if followed else apply,
            shape,
            rounding=self._rounding,
            max_bytes=self._max_bytes,
            devices=devices if len(devices) > 1 else None,
            weights=self._weights,
            compiled=None if self._compiled is None else self._compiled.of(key),
        )

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

        A property that constrains inputs together has no proof: no checker reads one.

        Raises:
          VerifyError: if the imported network disagrees with onnxruntime; nothing is proved then.
        """
        programs = self._followed if property.on_inputs else self.programs

        def evaluate(x: np.ndarray) -> np.ndarray:
            outputs = self.evaluate(x)
            return np.concatenate([outputs, x]) if property.on_inputs else outputs

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
        """Compares the imported network with onnxruntime at points of the first box."""
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
                raise VerifyError(
                    f"{self.path.name}: expected the imported network to agree with onnxruntime, "
                    "got other outputs; nothing is proved, please report the file"
                )


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

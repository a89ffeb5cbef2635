"""One node of an ONNX graph: its attributes by type, and errors that name it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
import numpy as np

from boundjax.ops import integers

# A numpy array while constants are folded, otherwise a JAX array: operators treat both alike.
Value = Any

# Element types by their ONNX numbers.
DTYPES: Mapping[int, Any] = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_}
# Types that only constants may have, and what QuantizeLinear computes (the small integers).
SMALL: Mapping[int, Any] = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16}
_OTHER_FLOATS: Mapping[int, Any] = {10: np.float16, 11: np.float64, 16: jnp.bfloat16}
# All that is read, as what NumPy calls them.
STORED: Mapping[int, np.dtype] = {
    number: np.dtype(dtype) for number, dtype in {**DTYPES, **SMALL, **_OTHER_FLOATS}.items()
}
# The kinds of values, as errors name them.
KINDS: Mapping[str, str] = {
    "f": "float32",
    "i": "integer",
    "b": "bool",
    "q": "integers of 8 or 16 bits",
    "h": "float16, bfloat16 or double",
}
# Shapes, axes and pads are short; a longer list can only be meant to exhaust memory.
_MAX_INTEGERS = 4096


class OnnxError(ValueError):
    """An ONNX file that boundjax cannot read; the message is one line."""


def quoted(name: str) -> str:
    """Quotes a name from an untrusted file on one line, shortened to fit into a message."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def kind_of(dtype: np.dtype) -> str:
    """The kind of constants of a type, see `KINDS`."""
    if dtype in (np.dtype(small) for small in SMALL.values()):
        return "q"
    if dtype in (np.dtype(other) for other in _OTHER_FLOATS.values()):
        return "h"
    return dtype.kind


@dataclasses.dataclass(frozen=True)
class Reference:
    """An attribute of a node in a local function that is an attribute of the function.

    Attributes:
      name: of the function's attribute.
    """

    name: str


def check_bytes(what: str, count: int, max_bytes: int) -> None:
    """Raises OnnxError if `what` needs `count` bytes and that is more than `max_bytes`."""
    if count > max_bytes:
        raise OnnxError(
            f"{what} needs {count} bytes, expected at most {max_bytes}; "
            "raise max_bytes if you trust the file"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One node, without its operands.

    Attributes:
      operator: the operator's name, such as `Conv`.
      name: the node's name in the file, or that of its first output if it has none.
      opset: version of the operator set, which determines the meaning of the operands.
      attributes: name -> int, float, str, tuple of them, array, or a graph (see `file.Graph`).
      outputs: names of the values that it computes.
      max_bytes: size limit of each of these values.
      xp: numpy while constants are folded, otherwise `jax.numpy`.
      kinds: kinds of the operands, if any of them depends on the input: "f", "i" and "q" (carried
        as float32), "b", or "" for an operand that is omitted or must be constant.
      read: the attributes that the operator has asked for; any other attribute is refused.
    """

    operator: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: tuple[str, ...]
    max_bytes: int
    xp: Any = jnp
    kinds: tuple[str, ...] = ()
    read: set[str] = dataclasses.field(default_factory=set)

    def error(self, message: str) -> OnnxError:
        """An error whose message begins with the node's name and operator."""
        return OnnxError(f"{self.title}: {message}")

    @property
    def title(self) -> str:
        """The node as messages name it."""
        return f"node {quoted(self.name)} ({self.operator})"

    def check_size(self, shape: Sequence[int]) -> None:
        """Raises OnnxError if a value of this shape is too large or a size is negative."""
        if any(size < 0 for size in shape):
            raise self.error(f"expected sizes of at least 0, got the shape {tuple(shape)}")
        # The widest element type that is read has eight bytes.
        check_bytes(f"{self.title}: the shape {tuple(shape)}", 8 * math.prod(shape), self.max_bytes)

    def _get(self, name: str, kind: type, default: Any) -> Any:
        self.read.add(name)
        value = self.attributes.get(name, default)
        if value is not default and type(value) is not kind:
            raise self.error(
                f"attribute {name}: expected {kind.__name__}, got {type(value).__name__}"
            )
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """An attribute that is an integer; it is required if there is no default."""
        value = self._get(name, int, default)
        if value is None:
            raise self.error(f"expected an attribute {name}, got none")
        return value

    @overload
    def number(self, name: str, default: float) -> float: ...
    @overload
    def number(self, name: str, default: None) -> float | None: ...
    def number(self, name: str, default: float | None) -> float | None:
        """An attribute that is a floating-point number."""
        return self._get(name, float, default)

    def text(self, name: str, default: str) -> str:
        """An attribute that is a string."""
        return self._get(name, str, default)

    def tensor(self, name: str) -> np.ndarray | None:
        """An attribute that is an array, or None if absent."""
        return self._get(name, np.ndarray, None)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An attribute that is a list of integers, or None if absent."""
        value = self._get(name, tuple, None)
        if value is not None and not all(type(v) is int for v in value):
            raise self.error(f"attribute {name}: expected integers, got {value[:8]}")
        return value

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """An attribute that is a list of floating-point numbers, or None if absent."""
        value = self._get(name, tuple, None)
        if value is not None and not all(type(v) is float for v in value):
            raise self.error(f"attribute {name}: expected numbers, got {value[:8]}")
        return value

    def texts(self, name: str) -> tuple[str, ...] | None:
        """An attribute that is a list of strings, or None if absent."""
        value = self._get(name, tuple, None)
        if value is not None and not all(type(v) is str for v in value):
            raise self.error(f"attribute {name}: expected strings, got {value[:8]}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """An attribute that is 0 or 1."""
        value = self.integer(name, int(default))
        if value not in (0, 1):
            raise self.error(f"attribute {name}: expected 0 or 1, got {value}")
        return bool(value)

    def only(self, name: str, expected: int | str) -> None:
        """Refuses any value of an attribute but the one that is supported."""
        if isinstance(expected, int):
            value = self.integer(name, expected)
        else:
            value = self.text(name, expected)
        if value != expected:
            raise self.error(f"attribute {name}: only {expected!r} is supported, got {value!r}")

    def to_integers(self, operand: np.ndarray) -> tuple[int, ...]:
        """Converts a constant operand to Python integers."""
        if operand.dtype.kind != "i" or operand.ndim > 1 or operand.size > _MAX_INTEGERS:
            raise self.error(
                f"expected an operand of at most {_MAX_INTEGERS} integers, "
                f"got {operand.dtype} of shape {operand.shape}"
            )
        return tuple(int(v) for v in operand.reshape(-1))

    @property
    def computes_integers(self) -> bool:
        """Whether it computes integers that depend on the input (carried as float32)."""
        return self.xp is not np and "i" in self.kinds

    def carried(self, constant: np.ndarray) -> np.ndarray:
        """Converts constant integers to float32, like the perturbed integers beside them."""
        if kind_of(constant.dtype) not in "iq":
            return constant
        largest = max(-int(constant.min()), int(constant.max())) if constant.size else 0
        if largest > integers.LARGEST_EXACT:
            raise self.error("has integers beyond 2^24, which float32 cannot represent exactly")
        return constant.astype(np.float32)

    def to_number(self, operand: Value) -> Any:
        """Converts a constant operand of one element to a scalar."""
        if operand.size != 1:
            raise self.error(f"expected an operand of one element, got shape {operand.shape}")
        return operand.reshape(())[()]

    def attribute_or_operand(self, name: str, operand: np.ndarray | None) -> tuple[int, ...] | None:
        """Integers that old opsets pass as the attribute `name` and newer ones as an operand."""
        attribute = self.integers(name)
        if operand is None:
            return attribute
        if attribute is not None:
            raise self.error(f"{name} is given twice, as an attribute and as an operand")
        return self.to_integers(operand)

    def axis(self, axis: int, rank: int) -> int:
        """Checks an axis and counts it from the front."""
        if not -rank <= axis < rank:
            raise self.error(f"axis {axis} is out of range for rank {rank}")
        return axis % rank

    def axes(self, axes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Checks that axes are distinct and counts them from the front."""
        result = tuple(self.axis(axis, rank) for axis in axes)
        if len(set(result)) != len(result):
            raise self.error(f"expected distinct axes, got {tuple(axes)} for rank {rank}")
        return result

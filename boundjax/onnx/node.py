"""One node of an ONNX graph: its attributes by type, and errors that name it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# Element types by their ONNX numbers.
DTYPES: Mapping[int, Any] = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_}
# Shapes, axes and paddings are short; a longer one is not a network but an attack on the memory.
_MOST_INTEGERS = 4096
# Above it float32 skips integers.
_LARGEST_EXACT = 2**24


class OnnxError(ValueError):
    """A file that is not an ONNX network which boundjax can read; the message is one line."""


def shown(name: str) -> str:
    """A name from an untrusted file, on one line and short enough for a message."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def check_bytes(what: str, count: int, max_bytes: int) -> None:
    """Raises OnnxError if ``count`` bytes for ``what`` are more than ``max_bytes``."""
    if count > max_bytes:
        raise OnnxError(
            f"{what} needs {count} bytes, expected at most {max_bytes}; "
            "raise max_bytes if you trust the file"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One node, without its operands.

    Attributes:
      operator: such as ``Conv``.
      name: as in the file, else its first output's.
      opset: version of the operator set, which decides what the operands mean.
      attributes: name -> int, float, str, tuple of them, or array.
      outputs: names of the values it gives.
      max_bytes: largest value it may give.
      xp: numpy while constants are folded, else ``jax.numpy``.
      kinds: of its operands, where one depends on the input: "f", "i" (carried as float32), "b",
        or "" for one that is left out or must be known.
      read: the attributes that the operator has asked for; the others are refused.
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
        """An error with the node's name and operator in front."""
        return OnnxError(f"{self.title}: {message}")

    @property
    def title(self) -> str:
        """How messages name the node."""
        return f"node {shown(self.name)} ({self.operator})"

    def check_size(self, shape: Sequence[int]) -> None:
        """Raises OnnxError where a value of ``shape`` would be too large or has a negative size."""
        if any(size < 0 for size in shape):
            raise self.error(f"expected sizes of at least 0, got the shape {tuple(shape)}")
        # Eight bytes are the widest dtype that is read.
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
        """An attribute that is an integer; required if there is no default."""
        value = self._get(name, int, default)
        if value is None:
            raise self.error(f"expected an attribute {name}, got none")
        return value

    def number(self, name: str, default: float) -> float:
        """An attribute that is a floating-point number."""
        return self._get(name, float, default)

    def text(self, name: str, default: str) -> str:
        """An attribute that is a string."""
        return self._get(name, str, default)

    def tensor(self, name: str) -> np.ndarray | None:
        """An attribute that is an array."""
        return self._get(name, np.ndarray, None)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An attribute that is a list of integers, None where absent."""
        value = self._get(name, tuple, None)
        if value is not None and not all(type(v) is int for v in value):
            raise self.error(f"attribute {name}: expected integers, got {value[:8]}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """An attribute that is 0 or 1."""
        value = self.integer(name, int(default))
        if value not in (0, 1):
            raise self.error(f"attribute {name}: expected 0 or 1, got {value}")
        return bool(value)

    def only(self, name: str, expected: int | str) -> None:
        """Refuses an attribute that has another value than the one that is supported."""
        get = self.integer if isinstance(expected, int) else self.text
        value = get(name, expected)
        if value != expected:
            raise self.error(f"attribute {name}: only {expected!r} is supported, got {value!r}")

    def known_integers(self, operand: np.ndarray) -> tuple[int, ...]:
        """A known operand as Python integers."""
        if operand.dtype.kind != "i" or operand.ndim > 1 or operand.size > _MOST_INTEGERS:
            raise self.error(
                f"expected an operand of at most {_MOST_INTEGERS} integers, "
                f"got {operand.dtype} of shape {operand.shape}"
            )
        return tuple(int(v) for v in operand.reshape(-1))

    @property
    def computes_integers(self) -> bool:
        """Whether it computes integers that depend on the input, which are carried as float32."""
        return self.xp is not np and "i" in self.kinds

    def carried(self, constant: np.ndarray) -> np.ndarray:
        """A constant beside integers that depend on the input: as float32, like them."""
        if constant.dtype.kind != "i":
            return constant
        if constant.size and max(-int(constant.min()), int(constant.max())) > _LARGEST_EXACT:
            raise self.error("has integers beyond 2^24, which float32 does not hold")
        return constant.astype(np.float32)

    def known_number(self, operand: np.ndarray) -> Any:
        """A known operand of one element, as a numpy scalar."""
        if operand.size != 1:
            raise self.error(f"expected an operand of one element, got shape {operand.shape}")
        return operand.reshape(())[()]

    def integers_of(self, name: str, operand: np.ndarray | None) -> tuple[int, ...] | None:
        """What older opsets give as the attribute ``name`` and newer ones as an operand."""
        attribute = self.integers(name)
        if operand is None:
            return attribute
        if attribute is not None:
            raise self.error(f"{name} is given twice, as an attribute and as an operand")
        return self.known_integers(operand)

    def axis(self, axis: int, rank: int) -> int:
        """``axis`` counted from the front."""
        if not -rank <= axis < rank:
            raise self.error(f"axis {axis} is out of range for rank {rank}")
        return axis % rank

    def axes(self, axes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Several different axes, counted from the front."""
        result = tuple(self.axis(axis, rank) for axis in axes)
        if len(set(result)) != len(result):
            raise self.error(f"axes {tuple(axes)} name one axis twice")
        return result

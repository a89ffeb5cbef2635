"""Dictionaries of byte arrays and lists from pickles, without running what is pickled.

A pickle is a program: unpickling calls whatever functions it names. The unpickler here knows the
four names by which numpy pickles an array of bytes, and gives a stand-in for each that keeps its
arguments and does nothing; a pickle that asks for any other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np


def load(content: bytes) -> dict[Any, Any]:
    """The dictionary in a pickle of Python 2 or 3, its arrays uint8 of any shape.

    Strings of Python 2 are bytes.

    Raises:
      pickle.UnpicklingError: for anything else.
    """
    try:
        _need_small_memo(content)
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle may raise any type
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise pickle.UnpicklingError(f"expected a dictionary, got {type(found).__name__}")
    return {
        key: value.array() if isinstance(value, _Array) else value for key, value in found.items()
    }


def _need_small_memo(content: bytes) -> None:
    """Refuses what would fill the memory: the memo is a list as long as its largest place."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument >= len(content):
            raise pickle.UnpicklingError(f"a place {argument} of {len(content)} bytes in its memo")


class _Dtype:
    """In place of `numpy.dtype`."""

    def __init__(self, code: Any, *flags: Any) -> None:
        del flags
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """In place of `numpy.ndarray`: its state is `(version, shape, dtype, is_fortran, bytes)`."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array that was pickled, if it is one of bytes."""
        match self.state:
            case (int(), tuple(shape), _Dtype(code="u1" | b"u1"), bool(fortran), bytes(values)):
                pass
            case _:
                raise pickle.UnpicklingError("an array in it is not one of uint8")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError("an array in it has no shape")
        if math.prod(shape) != len(values):
            raise pickle.UnpicklingError(
                f"an array of shape {list(shape)} in it has {len(values)} bytes"
            )
        return np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*arguments: Any) -> _Array:
    """In place of the function that makes the empty array: its type, shape and dtype follow."""
    del arguments
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """In place of `codecs.encode`, as which Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} instead of 'latin1'")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # numpy 2
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"refused: it would run {f'{module}.{name}'[:80]!r}, which no array needs"
            )
        return _STAND_INS[module, name]

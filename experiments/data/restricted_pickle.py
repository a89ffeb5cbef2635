"""Reads dictionaries of byte arrays and lists from pickles without running their code.

A pickle is a program: unpickling calls whatever functions it names. The unpickler here accepts only
the names by which numpy pickles an array of bytes, and replaces each with a stand-in that stores
its arguments and does nothing. It refuses a pickle that asks for any other name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np


def load(content: bytes) -> dict[Any, Any]:
    """Reads the dictionary in a pickle of Python 2 or 3, with uint8 arrays of any shape.

    Strings of Python 2 become bytes.

    Raises:
      pickle.UnpicklingError: for anything else.
    """
    try:
        _need_small_memo(content)
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle may raise any type
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict):
        raise pickle.UnpicklingError(f"expected a dictionary, got {type(loaded).__name__}")
    return {
        key: value.array() if isinstance(value, _Array) else value for key, value in loaded.items()
    }


def _need_small_memo(content: bytes) -> None:
    """Refuses a memo that would fill the memory: it is a list as long as its largest index."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT"):
            assert isinstance(argument, int)  # both opcodes take an index
            if argument >= len(content):
                raise pickle.UnpicklingError(
                    f"its memo has an index {argument}, but it has {len(content)} bytes only"
                )


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: Any, *flags: Any) -> None:
        del flags
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and the like, which bytes do not have."""


class _Array:
    """Stands in for `numpy.ndarray`; its state is `(version, shape, dtype, is_fortran, bytes)`."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Returns the pickled array, if it is one of bytes."""
        match self.state:
            case (int(), tuple(shape), _Dtype(code="u1" | b"u1"), bool(fortran), bytes(values)):
                pass
            case _:
                raise pickle.UnpicklingError("an array in it is not one of uint8")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError("an array in it has an invalid shape")
        if math.prod(shape) != len(values):
            raise pickle.UnpicklingError(
                f"an array of shape {list(shape)} in it has {len(values)} bytes"
            )
        return np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*arguments: Any) -> _Array:
    """Stands in for the function that makes an empty array; its shape and dtype come later."""
    del arguments
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `codecs.encode`, by which Python 3 pickles bytes for Python 2."""
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

"""Reads `.npz` files without trusting them.

`numpy.load` trusts the archive: it allocates whatever a header declares, inflates whatever is
compressed, picks one of two members with the same name, and lets many types of exceptions through.
This module compares every claim with the size of the file before it reads anything, and raises a
`FormatError` for whatever is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.records.formats import FormatError

_SUFFIX = ".npy"


class Header(NamedTuple):
    """The type and shape that a member declares, and the byte at which its data starts."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    start: int

    def __str__(self) -> str:
        """Formats it for messages: `float32 [130, 10]`."""
        return f"{str(self.dtype)[:60]} {str(list(self.shape))[:60]}"


class ArrayArchive:
    """The arrays of an archive as `numpy.savez` writes it: uncompressed, every name once.

    Attributes:
      names: the arrays' names, in the order of the file.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int):
        """Checks the directory of an archive in a file of `size` bytes; reads no array yet.

        Raises:
          FormatError: for members that are compressed, larger than the file, or not arrays.
        """
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._headers: dict[str, Header] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(_SUFFIX)
            if name == member.filename:
                raise FormatError(f"expected arrays NAME{_SUFFIX}, got {name!r}")
            if name in self._members:
                raise FormatError(f"expected every array once, got {name!r} twice")
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.file_size != member.compress_size:
                raise FormatError(
                    f"expected arrays as numpy.savez stores them, got {name!r} compressed"
                )
            self._members[name] = member
        # Nothing is compressed, so the members cannot hold more bytes than the file.
        declared = sum(member.file_size for member in self._members.values())
        if declared > size:
            raise FormatError(f"expected {declared} bytes of arrays, got a file of {size} bytes")
        self.names = tuple(self._members)

    def header(self, name: str) -> Header:
        """Returns type and shape of an array; they agree with the size of its member.

        Raises:
          FormatError: for a member that is not an array of that size, or holds Python objects.
        """
        if name not in self._headers:
            with _refusing(f"array {name!r}"):
                self._headers[name] = self._read_header(name)
        return self._headers[name]

    def array(self, name: str) -> np.ndarray:
        """Reads an array, in the byte order of this machine.

        Raises:
          FormatError: as `header`, or if the data is damaged.
        """
        header = self.header(name)
        with _refusing(f"array {name!r}"):
            content = self._archive.read(self._members[name])  # compares the checksum
            data = np.frombuffer(content, header.dtype, offset=header.start)
            if header.dtype == np.bool_ and data.view(np.uint8).max(initial=0) > 1:
                raise FormatError(f"array {name!r} must be True or False, got other bytes")
            array = data.reshape(header.shape, order="F" if header.fortran_order else "C")
            return array.astype(header.dtype.newbyteorder("="))

    def _read_header(self, name: str) -> Header:
        member = self._members[name]
        with self._archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                raise FormatError(f"array {name!r} must be .npy of version 1.0, got {version}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            start = stream.tell()
        header = Header(dtype, shape, fortran_order, start)
        if dtype.hasobject:
            raise FormatError(f"array {name!r} must hold numbers or text, got Python objects")
        if min(shape, default=0) < 0:
            raise FormatError(f"array {name!r} must have sizes >= 0, got {header}")
        declared = math.prod(shape) * dtype.itemsize
        if declared != member.file_size - start:
            raise FormatError(
                f"array {name!r} must have the {declared} bytes of {header}, "
                f"got {member.file_size - start}"
            )
        return header


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ArrayArchive]:
    """Opens an archive for reading.

    Raises:
      FormatError: if it is not one.
      OSError: if the file cannot be read.
    """
    if not path.is_file():  # opening a pipe would block until somebody writes into it
        kind = "something else" if path.exists() else "nothing"
        advice = "move that away" if path.exists() else "experiments.evaluate writes it"
        raise FormatError(f"expected a file, got {kind}", advice)
    with contextlib.ExitStack() as closing:
        stream = closing.enter_context(path.open("rb"))
        with _refusing("the archive"):
            archive = ArrayArchive(
                closing.enter_context(zipfile.ZipFile(stream)), path.stat().st_size
            )
        yield archive


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except FormatError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise FormatError(f"{what} is damaged (it points outside of the file)") from error
    except MemoryError as error:
        raise OSError(errno.ENOMEM, "not enough memory") from error
    except Exception as error:  # zipfile and numpy raise many types for damaged files
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"{what} is damaged ({type(error).__name__}: {reason})") from error

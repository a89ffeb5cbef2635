"""Reads the bytes of ONNX files: plain or compressed, with all weights inside or beside them.

What leaves this file is one message that holds everything, so that onnxruntime, which decides about
counterexamples, opens no file on behalf of another one.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from boundjax.onnx.node import STORED, OnnxError, check_bytes, quoted

_GZIP = b"\x1f\x8b"  # no ONNX file begins like this: it would be a field of an invalid type
_CHUNK = 2**20
_KEYS = ("location", "offset", "length", "checksum")
_MAX_DIGITS = 18


def read_message(path: str | os.PathLike[str], max_bytes: int) -> Any:
    """The `ModelProto` of a file, with the weights of other files in the model's folder put in.

    Raises:
      OnnxError: see `from_onnx`.
      ImportError: if the package onnx is not installed.
      OSError: if the file cannot be opened.
    """
    onnx = package()
    path = Path(path)
    content = _content(path, max_bytes)
    try:
        # `onnx.load` would choose the parser by the file's suffix.
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exceptions have no common public base
        raise OnnxError("expected an ONNX model, got a truncated or different file") from error
    left = max_bytes - len(content)
    for what, tensor in _external_tensors(onnx, model):
        left = _put_in(onnx, tensor, what, path.parent, left, max_bytes)
    return model


def package() -> Any:
    """The package onnx."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(
            "from_onnx needs the package onnx: pip install 'boundjax[onnx]'"
        ) from error
    return onnx


def text(value: str | bytes) -> str:
    """Checks a name; protobuf returns bytes for one that is not UTF-8."""
    if isinstance(value, bytes):
        raise OnnxError(f"expected names in UTF-8, got {quoted(repr(value))}; is the file damaged?")
    return value


def _content(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OnnxError("expected a regular file, got a device or a pipe")
        check_bytes("the file", status.st_size, max_bytes)
        content = stream.read(status.st_size)
    return _decompressed(content, max_bytes) if content.startswith(_GZIP) else content


def _decompressed(content: bytes, max_bytes: int) -> bytes:
    """Decompresses gzip; a bomb takes no more memory than the limit."""
    result = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            while part := stream.read(min(_CHUNK, max_bytes + 1 - len(result))):
                result += part
                if len(result) > max_bytes:
                    raise OnnxError(
                        f"the decompressed file needs more than {max_bytes} bytes; "
                        "raise max_bytes if you trust the file"
                    )
    except (EOFError, OSError, zlib.error) as error:
        raise OnnxError(f"expected a gzip file, got a damaged one: {error}") from error
    return bytes(result)


def _external_tensors(
    onnx: Any, message: Any, what: str = "tensor", of: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of a message whose content is in another file, as errors name them.

    The search includes parts that are never evaluated (branches, functions, unused nodes), because
    onnxruntime, which has the last word on counterexamples, would open their files, too.

    Args:
      onnx: the package.
      message: a protobuf message of any type.
      what: the role of the message in the one around it.
      of: the node around the message, or empty.
    """
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield f"{what} {quoted(text(message.name))}{of}", message
        return
    if isinstance(message, onnx.NodeProto) and not of:
        name = text(message.name) or text(next(iter(message.output), ""))
        of = f" of node {quoted(name)}"
    for field, value in message.ListFields():
        if field.message_type is not None:
            what = "initializer" if field.name == "initializer" else "tensor"
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _external_tensors(onnx, part, what, of)


def _put_in(onnx: Any, tensor: Any, what: str, folder: Path, left: int, max_bytes: int) -> int:
    """Reads a tensor's content from its file; returns how many more bytes may be read."""
    entries = _entries(tensor, what)
    if tensor.data_type not in STORED:
        raise OnnxError(f"{what}: expected numbers, got element type {tensor.data_type}")
    if min(tensor.dims, default=0) < 0:
        raise OnnxError(f"{what}: expected sizes of at least 0, got {tuple(tensor.dims)}")
    size = math.prod(tensor.dims) * STORED[tensor.data_type].itemsize
    offset, length = (_count(entries, name, what) for name in ("offset", "length"))
    if length is not None and length != size:
        raise OnnxError(f"{what}: expected {size} bytes in its file, got a length of {length}")
    if size > left:
        raise OnnxError(
            f"{what}: the file and its weights need more than {max_bytes} bytes; "
            "raise max_bytes if you trust the file"
        )
    stream = _opened(entries["location"], what, folder)
    with stream:
        rest = os.fstat(stream.fileno()).st_size - (offset or 0)
        if rest < size or (length is None and rest != size):
            raise OnnxError(
                f"{what}: expected {size} bytes in {quoted(entries['location'])}, got {rest}"
            )
        stream.seek(offset or 0)
        content = stream.read(size)
    if len(content) != size:
        raise OnnxError(f"{what}: its file {quoted(entries['location'])} changed while it was read")
    for field in ("external_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = content
    return left - size


def _entries(tensor: Any, what: str) -> Mapping[str, str]:
    entries = {text(entry.key): text(entry.value) for entry in tensor.external_data}
    unknown = sorted(entries.keys() - set(_KEYS))
    if unknown or len(entries) < len(tensor.external_data) or "location" not in entries:
        raise OnnxError(
            f"{what}: expected the location of a file, perhaps an offset and a length, "
            f"got {', '.join(map(quoted, sorted(entries)[:4])) or 'nothing'}"
        )
    return entries


def _count(entries: Mapping[str, str], name: str, what: str) -> int | None:
    value = entries.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal()) or len(value) > _MAX_DIGITS:
        raise OnnxError(f"{what}: expected a number of bytes as {name}, got {quoted(value)}")
    return int(value)


def _opened(location: str, what: str, folder: Path) -> io.BufferedReader:
    """Opens a regular file inside a folder, wherever links lead."""
    inside = f"{what}: expected a file inside the model's folder, got {quoted(location)}"
    parts = location.replace("\\", "/").split("/")
    if os.path.isabs(location) or ".." in parts or "\0" in location or ":" in location:
        raise OnnxError(inside)
    folder = folder.resolve()
    try:
        path = (folder / location).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise OnnxError(f"{inside}, which is a link to another folder")
        # Without blocking on a pipe, and without following a link made since.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OnnxError):
            raise
        reason = getattr(error, "strerror", None) or "it cannot be opened"
        raise OnnxError(f"{what}: its file {quoted(location)}: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OnnxError(f"{inside}, which is no regular file")
    return os.fdopen(descriptor, "rb")

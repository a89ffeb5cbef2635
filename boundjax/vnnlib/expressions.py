"""The text of a file as nested lists of atoms, with their positions."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from boundjax.vnnlib import limits
from boundjax.vnnlib.limits import VnnlibError

# Parentheses, comments, quoted symbols and strings, anything else.
_TOKEN = re.compile(r'[()]|;[^\n]*|\|[^|]*\||"[^"]*"|[^\s();]+')


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file, plain or compressed with gzip.

    Raises:
      OSError: if the file cannot be opened.
      VnnlibError: if it is too large, damaged, or no UTF-8.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        # read(n) decompresses no more than n bytes: a bomb costs no memory.
        with gzip.open(path) if compressed else path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise VnnlibError(
            f"{path.name}: expected a gzip file, got a damaged one: {error}"
        ) from None
    if len(content) > max_bytes:
        raise VnnlibError(
            f"{path.name}: expected at most {max_bytes} bytes of text, got more; pass max_bytes= "
            "if the file can be trusted"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise VnnlibError(f"{path.name}:{line}: expected UTF-8 text, got other bytes") from None


class Atom(NamedTuple):
    """A token that is no parenthesis, and where it starts in the text."""

    text: str
    position: int


class List(NamedTuple):
    """Expressions in parentheses, and where they start in the text."""

    items: list[Atom | List]
    position: int


Expression = Atom | List
Fail = Callable[[int, str], NoReturn]


def commands(text: str, fail: Fail) -> Iterator[List]:
    """Yields the lists of the top level, one at a time."""
    stack: list[List] = []
    for count, match in enumerate(_TOKEN.finditer(text)):
        token, position = match[0], match.start()
        if count >= limits.MAX_TOKENS:
            fail(
                position,
                f"expected at most {limits.MAX_TOKENS} tokens, got more; split the property",
            )
        if token[0] == ";":
            continue
        if token == "(":
            if len(stack) >= limits.MAX_DEPTH:
                fail(position, f"expected at most {limits.MAX_DEPTH} nested parentheses, got more")
            stack.append(List([], position))
        elif token == ")":
            if not stack:
                fail(position, "expected '(' or the end, got ')': one parenthesis too many")
            closed = stack.pop()
            if stack:
                stack[-1].items.append(closed)
            else:
                yield closed
        elif stack:
            stack[-1].items.append(Atom(token, position))
        else:
            fail(position, f"expected a command in parentheses, got {quoted(token)}")
    if stack:
        fail(stack[-1].position, "expected ')' to this '(', got the end of the file")


def quoted(text: str) -> str:
    """A token in quotation marks, shortened."""
    return repr(text if len(text) <= 40 else text[:37] + "...")

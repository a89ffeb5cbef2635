"""Reads from the text of a compiled program what its devices send each other."""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2}
_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# `%name = <result> all-reduce(`; an asynchronous operation counts at its start, not at its end.
_CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(?P<type>[a-z]+[0-9]*[a-z0-9]*)\[(?P<sizes>[0-9,]*)\]")


class Collective(NamedTuple):
    """One operation between devices; `size` is the bytes of its result on one device."""

    kind: str
    size: int


def collectives(text: str) -> list[Collective]:
    """Lists the collectives of `compiled.as_text()`, in its order."""
    return [
        Collective(match["kind"], sum(map(_size, _SHAPE.finditer(match["result"]))))
        for match in _CALL.finditer(text)
    ]


def summary(operations: list[Collective]) -> dict[str, tuple[int, int]]:
    """Returns per kind the number of operations and their total bytes."""
    totals: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for kind, size in operations:
        count, total = totals[kind]
        totals[kind] = count + 1, total + size
    return dict(totals)


def _size(shape: re.Match[str]) -> int:
    name = shape["type"]
    width = _BYTES.get(name)
    if width is None:
        bits = re.search(r"[0-9]+", name)
        assert bits is not None, f"expected a type with its number of bits, got {name}"
        width = int(bits[0]) // 8
    return width * math.prod(int(size) for size in shape["sizes"].split(",") if size)

"""What the devices of a compiled program send each other, read out of its text."""

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
# `%name = <result> all-reduce(`; of an asynchronous one the start counts, not the end.
_CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(?P<type>[a-z]+[0-9]*[a-z0-9]*)\[(?P<sizes>[0-9,]*)\]")


class Collective(NamedTuple):
    """One operation between devices; `size` is that of its result on a device, in bytes."""

    kind: str
    size: int


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, in the order in which `compiled.as_text()` has them."""
    return [
        Collective(match["kind"], sum(map(_size, _SHAPE.finditer(match["result"]))))
        for match in _CALL.finditer(text)
    ]


def summary(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Kind -> how many, and how many bytes together."""
    totals: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for kind, size in found:
        count, total = totals[kind]
        totals[kind] = count + 1, total + size
    return dict(totals)


def _size(shape: re.Match[str]) -> int:
    name = shape["type"]
    width = _BYTES[name] if name in _BYTES else int(re.search(r"[0-9]+", name)[0]) // 8
    return width * math.prod(int(size) for size in shape["sizes"].split(",") if size)

"""The table of nodes that are written in terms of other nodes while a file is read."""

from __future__ import annotations

from collections.abc import Mapping

from boundjax.onnx import control, stored
from boundjax.onnx.builder import Expansion

EXPANSIONS: Mapping[str, Expansion] = {
    "Cast": stored.cast,
    "DequantizeLinear": stored.dequantize,
    "If": control.if_,
    "Loop": control.loop,
    "QuantizeLinear": stored.quantize,
    "Scan": control.scan,
}

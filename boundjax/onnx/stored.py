"""Numbers that a file stores in other types than float32: casts, and quantized numbers.

The network computes in float32. A constant of another floating-point type can be moved and cast,
and nothing else. A cast that rounds (of doubles, of large integers) becomes a sum of float32 parts
that add up to the stored number exactly, so that bounds account for its rounding like for any
other. `DequantizeLinear` becomes its difference, which is exact, and its product with the scale;
`QuantizeLinear` its division, rounding and clipping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from boundjax.onnx.builder import Builder, Perturbed, Scope
from boundjax.onnx.node import DTYPES, KINDS, SMALL, STORED, Node, Value, kind_of
from boundjax.onnx.operators import Operator
from boundjax.ops.integers import LARGEST_EXACT

_FLOAT = 1
_UINT8 = 2
_LARGEST_SPLIT = 2**62


def cast(
    builder: Builder, node: Node, keys: Sequence[str], scope: Scope | None = None
) -> Sequence[str]:
    """Cast; of constants also from and to types that nothing is computed in."""
    to = node.integer("to")
    if len(keys) != 1 or not keys[0] or to not in STORED:
        return builder.apply(node, keys)  # which refuses it
    value, dtype = builder.value(keys[0], node.title), STORED[to]
    if isinstance(value, Perturbed) or keys[0] in builder.rounded:
        if to not in DTYPES:
            raise node.error(
                f"casts a computed value to {dtype}; boundjax computes in float32, so only stored "
                "weights may have this type; export in single precision"
            )
        return builder.apply(node, keys)
    if to == _FLOAT and value.dtype.kind != "b":
        parts = _parts(node, value)
        if len(parts) > 1:
            node.integer("saturate", 1)
            return [builder.emit(node, "Sum", [builder.fresh(node.name, p) for p in parts[::-1]])]
    elif kind_of(dtype) in "qh" or kind_of(value.dtype) == "h":
        _check_held(node, value, dtype)
    return builder.apply(node, keys)


def _check_held(node: Node, value: np.ndarray, dtype: np.dtype) -> None:
    """Refuses numbers that a type cannot hold, and those that a narrower one would round."""
    kind = kind_of(dtype)
    floating = kind_of(value.dtype) in "fh"
    if kind in "iq":
        info = np.iinfo(dtype)
        if floating:
            wide = np.trunc(value.astype(np.float64))
            held = (wide >= float(info.min)) & (wide < float(info.max) + 1)
        else:
            held = (value.astype(np.int64) >= info.min) & (value.astype(np.int64) <= info.max)
    elif kind == "h":
        with np.errstate(all="ignore"):
            back = value.astype(dtype).astype(value.dtype)
        held = (back == value) | (value != value)  # or NaN
    else:
        return
    held = np.asarray(held, np.bool_)
    if not held.all():
        raise node.error(
            f"expected numbers that {dtype} can hold, got {value[~held].reshape(-1)[0]}; "
            "boundjax does not round to this type"
        )


def _parts(node: Node, value: np.ndarray) -> list[np.ndarray]:
    """Float32 arrays that add up to a constant exactly, in falling order of size."""
    if (value.dtype.kind == "f" and value.dtype != np.float64) or kind_of(value.dtype) == "q":
        return [value]
    if value.dtype.kind in "iu":
        if value.size and max(-int(value.min()), int(value.max())) > _LARGEST_SPLIT:
            raise node.error("has integers beyond 2^62, which are not cast to float32")
        rest = value.astype(np.int64)
        exact = np.abs(rest) <= LARGEST_EXACT
    else:
        rest = value.astype(np.float64)
        exact = ~np.isfinite(rest)
    parts: list[np.ndarray] = []
    with np.errstate(all="ignore"):
        for _ in range(3):  # 53 and 62 bits are at most three times 24
            part = rest.astype(np.float32)
            parts.append(part)
            rest = np.where(exact, 0, rest - part.astype(rest.dtype)).astype(rest.dtype)
    if (rest != 0).any() or np.isinf(parts[0][~exact]).any():
        lost = value[(rest != 0) | (np.isinf(parts[0]) & ~exact)].reshape(-1)[0]
        raise node.error(f"{lost} is outside of what float32 can hold; export in single precision")
    return [part for k, part in enumerate(parts) if k == 0 or part.any()]


def _to_small(node: Node, x: Value) -> Value:
    """Small integers that float32 carries, as their own type if they are constants."""
    dtype = STORED[node.integer("to")]
    if node.xp is not np:
        return x
    if not np.isfinite(x).all():
        raise node.error("expected finite numbers to quantize, got others")
    return np.asarray(x).astype(dtype)


_SMALL_INTEGER = Operator(_to_small, lambda node, kinds: "q", selects=True)


def dequantize(builder: Builder, node: Node, keys: Sequence[str], scope: Scope) -> Sequence[str]:
    """DequantizeLinear: `(x - zero) scale`, per tensor, axis or block."""
    x, scale, zero = _operands(builder, node, keys)
    if (kind := _kind(builder, node, x)) not in "iq":
        raise node.error(f"expected integers to dequantize, got {KINDS[kind]}")
    _only_float32(node, node.integer("output_dtype", 0))
    shape = builder.value(x, node.title).shape
    scale, zero = _aligned(builder, node, shape, scale, zero)
    value = builder.value(x, node.title)
    if zero is not None and not _constant(builder, zero).any():
        zero = None
    if isinstance(value, np.ndarray) and x not in builder.rounded:
        if zero is not None:
            number = _constant(builder, zero)
            wide = np.int64 if value.dtype.itemsize > 2 else np.int32
            x = builder.fresh(node.name, value.astype(wide) - number.astype(wide))
        difference = _as_float(builder, node, x)
    else:
        difference = _as_float(builder, node, x)
        if zero is not None:
            zero = _as_float(builder, node, zero)
            difference = builder.emit(node, "Sub", [difference, zero])
    return [builder.emit(node, "Mul", [difference, scale])]


def quantize(builder: Builder, node: Node, keys: Sequence[str], scope: Scope) -> Sequence[str]:
    """QuantizeLinear: `clip(round(x / scale) + zero)`, halves to even; a step function."""
    x, scale, zero = _operands(builder, node, keys)
    if _kind(builder, node, x) != "f":
        raise node.error("expected float32 to quantize, got another type")
    node.integer("saturate", 1)  # affects only 8-bit floats
    _only_float32(node, node.integer("precision", 0))
    to = node.integer("output_dtype", 0)
    if zero is not None:
        types = [k for k, v in SMALL.items() if np.dtype(v) == _constant(builder, zero).dtype]
        if not types or to not in (0, types[0]):
            raise node.error("expected a zero point of 8 or 16 bits, and no other output_dtype")
        to = types[0]
    to = to or _UINT8
    if to not in SMALL:
        raise node.error(f"only integers of 8 and 16 bits are supported, got element type {to}")
    shape = builder.value(x, node.title).shape
    scale, zero = _aligned(builder, node, shape, scale, zero)
    quotient = builder.emit(node, "Div", [x, scale])
    steps = builder.emit(node, "Round", [quotient])
    info, shift = np.iinfo(STORED[to]), np.zeros((), np.float32)
    if zero is not None:
        shift = _constant(builder, zero).astype(np.float32)
    ends = [
        builder.fresh(node.name, np.asarray(end - shift, np.float32))
        for end in (np.float32(info.min), np.float32(info.max))
    ]
    if shift.size == 1:
        clipped = builder.emit(node, "Clip", [steps, *ends])
    else:
        clipped = builder.emit(node, "Max", [steps, ends[0]])
        clipped = builder.emit(node, "Min", [clipped, ends[1]])
    if shift.any():
        clipped = builder.emit(node, "Add", [clipped, builder.fresh(node.name, shift)])
    return [builder.emit(node, _SMALL_INTEGER, [clipped], to=to)]


def _operands(builder: Builder, node: Node, keys: Sequence[str]) -> tuple[str, str, str | None]:
    """The keys of the number, the scale and the zero point."""
    if not 2 <= len(keys) <= 3 or "" in keys[:2]:
        raise node.error(f"expected 2 or 3 operands, got {len(keys)}")
    x, scale, zero = [*keys, ""][:3]
    if _kind(builder, node, scale) != "f":
        raise node.error("expected a scale of float32; boundjax computes in no other precision")
    if zero and (isinstance(builder.value(zero, node.title), Perturbed) or zero in builder.rounded):
        raise node.error("its zero point depends on the network's input or on rounding")
    return x, scale, zero or None


def _constant(builder: Builder, key: str) -> np.ndarray:
    value = builder.values[key]
    assert isinstance(value, np.ndarray), "zero points are constants"
    return value


def _kind(builder: Builder, node: Node, key: str) -> str:
    value = builder.value(key, node.title)
    return value.kind if isinstance(value, Perturbed) else kind_of(value.dtype)


def _only_float32(node: Node, number: int) -> None:
    if number not in (0, _FLOAT):
        raise node.error(
            f"computes in element type {number}; only float32 is supported, export in it"
        )


def _as_float(builder: Builder, node: Node, key: str) -> str:
    attributes, outputs = {"to": _FLOAT}, (node.name,)
    part = dataclasses.replace(
        node, operator="Cast", attributes=attributes, outputs=outputs, read=set()
    )
    return cast(builder, part, [key])[0]


def _aligned(
    builder: Builder, node: Node, shape: tuple[int, ...], scale: str, zero: str | None
) -> tuple[str, str | None]:
    """The scale and the zero point, in shapes that broadcast to that of the number."""
    axis = node.integer("axis", 1)
    block = node.integer("block_size", 0)
    sizes = builder.value(scale, node.title).shape
    if zero is not None and builder.value(zero, node.title).shape != sizes:
        raise node.error("expected a scale and a zero point of one shape, got different ones")
    keys = [scale] if zero is None else [scale, zero]
    if sizes in ((), (1,)):
        target: tuple[int, ...] = ()
    elif block:
        keys = [_repeated(builder, node, shape, key, axis, block) for key in keys]
        target = shape
    else:
        axis = node.axis(axis, len(shape))
        if sizes != (shape[axis],):
            raise node.error(
                f"expected a scale of one number, or of {shape[axis]} for axis {axis} of {shape}, "
                f"got shape {sizes}"
            )
        target = tuple(n if k == axis else 1 for k, n in enumerate(shape))
    keys = [_reshaped(builder, node, key, target) for key in keys]
    return keys[0], keys[1] if zero is not None else None


def _reshaped(builder: Builder, node: Node, key: str, target: tuple[int, ...]) -> str:
    if builder.value(key, node.title).shape == target:
        return key
    sizes = builder.fresh(node.name, np.asarray(target, np.int64))
    return builder.emit(node, "Reshape", [key, sizes])


def _repeated(
    builder: Builder, node: Node, shape: tuple[int, ...], key: str, axis: int, block: int
) -> str:
    """One number per element, from one per block along an axis."""
    value, axis = builder.value(key, node.title), node.axis(axis, len(shape))
    blocks = tuple(-(-n // block) if k == axis else n for k, n in enumerate(shape))
    if block < 0 or value.shape != blocks or not isinstance(value, np.ndarray):
        raise node.error(f"expected constants of shape {blocks} for blocks, got {value.shape}")
    if key in builder.rounded:
        raise node.error("its scale is computed; expected a stored one for blocks")
    grown = np.repeat(value, min(block, shape[axis]), axis)
    return builder.fresh(node.name, np.take(grown, np.arange(shape[axis]), axis))

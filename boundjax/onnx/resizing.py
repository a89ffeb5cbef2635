"""Resize and Upsample: every axis by itself, at coordinates that are known.

A coordinate is computed three times by one formula: as a fraction, which decides; in float32, as
runtimes do, so that a decision that rounding would change is refused; and traced, so that bounds
account for the rounding of weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.onnx import indexing
from boundjax.onnx.node import Node, Value

_MODES = ("nearest", "linear", "cubic")
# Coordinates are fractions of Python, one by one.
_MAX_SIZE = 2**16


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How one axis is resized.

    Attributes:
      index: which axis.
      length, size: elements before and after.
      scale: numerator and denominator, both float32 numbers.
      part: start and end of what `tf_crop_and_resize` takes, relative to the axis.
    """

    index: int
    length: int
    size: int
    scale: tuple[float, float]
    part: tuple[float, float] = (0.0, 1.0)


# --- coordinates ----------------------------------------------------------------------------------

# A function of positions `k`, an axis, its scale, and a function that converts numbers.
_Formula = Callable[[Any, _Axis, Any, Callable[[float], Any]], Any]


def _half_pixel(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    return (k + of(0.5)) / scale - of(0.5)


def _pytorch_half_pixel(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    return _half_pixel(k, a, scale, of) if a.size > 1 else k * of(0)


def _half_pixel_for_nearest(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    return (k + of(0.5)) / scale


def _half_pixel_symmetric(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    adjustment = of(a.size) / (of(a.length) * scale)
    offset = of(a.length) / of(2) * (of(1) - adjustment)
    return offset + _half_pixel(k, a, scale, of)


def _asymmetric(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    return k / scale


def _align_corners(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    return k * of(a.length - 1) / of(a.size - 1) if a.size > 1 else k * of(0)


def _crop_and_resize(k: Any, a: _Axis, scale: Any, of: Callable[[float], Any]) -> Any:
    start, end, last = of(a.part[0]), of(a.part[1]), of(a.length - 1)
    if a.size == 1:
        return k * of(0) + of(0.5) * (start + end) * last
    return start * last + k * (end - start) * last / of(a.size - 1)


_CROP = "tf_crop_and_resize"
_COORDINATES: Mapping[str, _Formula] = {
    "align_corners": _align_corners,
    "asymmetric": _asymmetric,
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _half_pixel_symmetric,
    "pytorch_half_pixel": _pytorch_half_pixel,
    _CROP: _crop_and_resize,
    "tf_half_pixel_for_nn": _half_pixel_for_nearest,
}


class _Coordinates:
    """Where the elements of the result lie on the operand's axis.

    Attributes:
      axis: the axis.
      exact: `size` fractions.
    """

    def __init__(self, node: Node, mode: str, axis: _Axis) -> None:
        self.axis = axis
        self._node, self._formula = node, _COORDINATES[mode]
        self.exact: list[Fraction] = [self._of(Fraction(k), Fraction) for k in range(axis.size)]
        with np.errstate(all="ignore"):
            rounded = self._of(np.arange(axis.size, dtype=np.float32), np.float32)
        if not np.isfinite(rounded).all():
            raise node.error("expected finite coordinates, got others")
        self._rounded = [Fraction(float(c)) for c in rounded]

    def _of(self, k: Any, of: Callable[[float], Any]) -> Any:
        scale = of(self.axis.scale[0]) / of(self.axis.scale[1])
        return self._formula(k, self.axis, scale, of)

    def traced(self) -> Array:
        """Float32 numbers, of which each operation is traced."""

        def of(number: float) -> Array:
            return jnp.asarray(np.float32(number))

        return self._of(jnp.asarray(np.arange(self.axis.size, dtype=np.float32)), of)

    @property
    def identity(self) -> bool:
        """Whether the axis stays as it is."""
        whole = [Fraction(k) for k in range(self.axis.length)]
        return self.exact == whole == self._rounded

    def decide(self, choice: Callable[[Fraction], int]) -> np.ndarray:
        """An integer for each coordinate, if it is the same with and without rounding."""
        decided = [choice(c) for c in self.exact]
        for k, (one, other) in enumerate(zip(decided, map(choice, self._rounded), strict=True)):
            if one != other:
                raise self._node.error(
                    f"element {k} of axis {self.axis.index} lies at {float(self.exact[k])}, where "
                    "rounding decides which element it is; use a scale that is a ratio of small "
                    "integers"
                )
        return np.asarray(decided, np.int64)


# --- weights --------------------------------------------------------------------------------------


def _linear(at: _Coordinates) -> Array:
    """Weights `[size, length]`: hats around the coordinates, which the border stops."""
    last = np.float32(at.axis.length - 1)
    c = jnp.minimum(jnp.maximum(at.traced(), np.float32(0)), last)
    distance = jnp.abs(c[:, None] - np.arange(at.axis.length, dtype=np.float32)[None])
    # One formula on both sides of an element, so that rounding decides nothing.
    return jnp.maximum(np.float32(1) - distance, np.float32(0))


def _cubic(node: Node, at: _Coordinates) -> Array:
    """Weights `[size, length]` of cubic convolution (Keys, 1981).

    For `u = min(t, 1)` and `v = clip(t, 1, 2)` of the distance `t`, Keys' two polynomials are
    `(1 - u) (1 + u - (a + 2) u^2)` and `a (v - 1) (v - 2)^2`, one of which is 0.
    """
    a = jnp.asarray(np.float32(node.number("cubic_coeff_a", -0.75)))
    length = at.axis.length
    # One more than the four elements around each coordinate, in case its rounding is another's.
    first = min(0, math.floor(min(at.exact)) - 2)
    last = max(length - 1, math.ceil(max(at.exact)) + 2)
    node.check_size((at.axis.size, last - first + 1))
    one, two = np.float32(1), np.float32(2)
    t = jnp.abs(at.traced()[:, None] - np.arange(first, last + 1, dtype=np.float32)[None])
    u, v = jnp.minimum(t, one), jnp.minimum(jnp.maximum(t, one), two)
    near = (one - u) * ((one + u) - (a + two) * jnp.square(u))
    weights = near + a * (v - one) * jnp.square(v - two)
    inside = weights[:, -first : length - first]
    if node.flag("exclude_outside", False):
        return inside / jnp.sum(inside, axis=1, keepdims=True)
    # An element outside is the one at the border.
    return (
        jnp.concatenate(
            [
                jnp.sum(weights[:, : 1 - first], axis=1, keepdims=True),
                inside[:, 1:-1],
                jnp.sum(weights[:, length - 1 - first :], axis=1, keepdims=True),
            ],
            axis=1,
        )
        if length > 1
        else jnp.sum(weights, axis=1, keepdims=True)
    )


def _weighted(x: Value, weights: Array, axis: int) -> Array:
    """Sums over an axis with weights `[size, length]`."""
    rows = jnp.moveaxis(jnp.asarray(x), axis, -1)
    result = jnp.matmul(rows, weights.T[(None,) * (rows.ndim - 2)], precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(result, -1, axis)


# --- the operator ---------------------------------------------------------------------------------

_ROUNDINGS: Mapping[str, Callable[[Fraction], int]] = {
    "round_prefer_floor": lambda c: math.ceil(c - Fraction(1, 2)),
    "round_prefer_ceil": lambda c: math.floor(c + Fraction(1, 2)),
    "floor": math.floor,
    "ceil": math.ceil,
}
# Before opset 11, and where sizes shrink: elsewhere it is "floor".
_UNDEFINED = "undefined"


def resize(
    node: Node,
    x: Value,
    roi: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> Value:
    """Resize and Upsample, without antialiasing."""
    early = node.operator == "Upsample" or node.opset < 11
    if early:
        roi, scales = None, roi  # before opset 11 the second operand is the scales
    mode = _choice(node, "mode", "nearest", _MODES)
    coordinates, fill = "asymmetric", 0.0
    if not early:
        coordinates = _choice(node, "coordinate_transformation_mode", "half_pixel", _COORDINATES)
        fill = node.number("extrapolation_value", 0.0)
        node.number("cubic_coeff_a", -0.75)  # affects only cubic weights
        node.flag("exclude_outside", False)  # likewise
        node.only("antialias", 0)
    rounding = (
        _UNDEFINED if early else _choice(node, "nearest_mode", "round_prefer_floor", _ROUNDINGS)
    )
    before, same = x.shape, True  # whether all elements stay where they are
    outside = np.zeros((1,) * x.ndim, np.bool_)
    for axis in _axes(node, x, roi if coordinates == _CROP else None, scales, sizes):
        at = _Coordinates(node, coordinates, axis)
        if coordinates == _CROP:
            beyond = at.decide(lambda c, last=axis.length - 1: int(c < 0 or c > last))
            shape = [-1 if k == axis.index else 1 for k in range(x.ndim)]
            outside = outside | (beyond == 1).reshape(shape)
        x, moved = _resized(node, x, at, mode, rounding)
        if moved and axis.scale[0] == axis.scale[1]:
            raise node.error(
                f"expected a scale other than 1 for axis {axis.index}, which onnxruntime copies "
                "and the operator's definition resamples"
            )
        same = same and not moved
    if x.shape == before and (outside.any() or not same):
        raise node.error(
            f"expected another shape than {x.shape}, which onnxruntime copies and the operator's "
            "definition resamples; replace the node by Identity, or export with sizes"
        )
    if not outside.any():
        return x
    return node.xp.where(outside, np.full((1,) * x.ndim, fill, np.float32), x)


def _resized(
    node: Node, x: Value, at: _Coordinates, mode: str, rounding: str
) -> tuple[Value, bool]:
    """One axis resized, and whether that changed anything."""
    if at.identity:
        return x, False
    index = at.axis.index
    if mode == "nearest":
        elements = np.clip(_nearest(node, at, rounding), 0, at.axis.length - 1)
        same = np.array_equal(elements, np.arange(at.axis.length))
        return (x, False) if same else (indexing.take(node, x, elements, index), True)
    return _weighted(x, _linear(at) if mode == "linear" else _cubic(node, at), index), True


def _nearest(node: Node, at: _Coordinates, rounding: str) -> np.ndarray:
    """The nearest element for each coordinate; it may lie outside of the axis."""
    if rounding != _UNDEFINED:
        return at.decide(_ROUNDINGS[rounding])
    below = at.decide(math.floor)
    if at.axis.size < at.axis.length and (below != at.decide(math.ceil)).any():
        raise node.error(
            "expected scales of at least 1: before opset 11 it is undefined which element is the "
            "nearest; export for a newer opset"
        )
    return below


def _choice(node: Node, name: str, default: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    value = node.text(name, default)
    if value not in known:
        raise node.error(
            f"attribute {name}: only {', '.join(map(repr, known))} are supported, got {value!r}"
        )
    return value


def _axes(
    node: Node,
    x: Value,
    roi: np.ndarray | None,
    scales: np.ndarray | None,
    sizes: np.ndarray | None,
) -> list[_Axis]:
    """The axes that are resized, with checked sizes."""
    listed = node.integers("axes") if node.opset >= 18 else None
    indices = range(x.ndim) if listed is None else node.axes(listed, x.ndim)
    lengths = [x.shape[index] for index in indices]
    stated, factors = _scales(node, scales), []
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    if sizes is not None and sizes.size:
        if stated is not None:
            raise node.error("expected scales or sizes, got both")
        after = list(node.to_integers(sizes))
        if len(after) == len(lengths) and min((*lengths, *after), default=1) > 0:
            factors, after = _kept_ratio(node, policy, lengths, after)
    elif stated is not None:
        factors = [(float(v), 1.0) for v in stated]
        # In float32, as runtimes and the inference of shapes do.
        after = [int(np.float32(n) * v) for n, v in zip(lengths, stated, strict=False)]
    else:
        raise node.error(f"expected {len(lengths)} scales or sizes, got neither")
    if len(factors) != len(lengths) or min((*lengths, *after), default=1) < 1:
        raise node.error(f"expected {len(lengths)} positive scales or sizes, got {after}")
    shape = list(x.shape)
    for index, size in zip(indices, after, strict=True):
        shape[index] = size
    node.check_size(shape)
    if max(shape) > _MAX_SIZE:
        raise node.error(f"expected sizes of at most {_MAX_SIZE}, got the shape {tuple(shape)}")
    parts = _parts(node, roi, len(lengths))
    return [_Axis(*values) for values in zip(indices, lengths, after, factors, parts, strict=True)]


def _scales(node: Node, scales: np.ndarray | None) -> np.ndarray | None:
    attribute = node.attributes.get("scales")
    if node.operator == "Upsample" and type(attribute) is tuple:
        node.read.add("scales")
        scales = np.asarray(attribute, np.float32)
    if scales is None or not scales.size:
        return None
    if scales.ndim != 1 or scales.dtype != np.float32 or not (scales > 0).all():
        raise node.error(f"expected positive float32 scales, got {scales.dtype} {scales[:8]}")
    if not np.isfinite(scales).all() or (scales > _MAX_SIZE).any():
        raise node.error(f"expected scales of at most {_MAX_SIZE}, got {scales[:8]}")
    return scales


def _kept_ratio(
    node: Node, policy: str, lengths: list[int], sizes: list[int]
) -> tuple[list[tuple[float, float]], list[int]]:
    """The factors of axes, and sizes in the ratio of lengths if the policy asks for that."""
    pairs = [(float(size), float(length)) for size, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return pairs, sizes
    if policy not in ("not_larger", "not_smaller"):
        raise node.error(
            "attribute keep_aspect_ratio_policy: only 'stretch', 'not_larger' and 'not_smaller' "
            f"are supported, got {policy!r}"
        )
    ratios = [Fraction(size, length) for size, length in zip(sizes, lengths, strict=True)]
    ratio = (min if policy == "not_larger" else max)(ratios)
    factor = pairs[ratios.index(ratio)]
    return [factor] * len(pairs), [math.floor(ratio * n + Fraction(1, 2)) for n in lengths]


def _parts(node: Node, roi: np.ndarray | None, count: int) -> list[tuple[float, float]]:
    if roi is None:
        return [(0.0, 1.0)] * count
    if roi.dtype != np.float32 or roi.shape != (2 * count,) or not np.isfinite(roi).all():
        raise node.error(f"expected a roi of {2 * count} finite float32 numbers, got {roi[:8]}")
    return [(float(roi[k]), float(roi[k + count])) for k in range(count)]

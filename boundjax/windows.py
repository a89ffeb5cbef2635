"""Rows of coefficients that vanish outside a window, one window per row.

A unit of a convolutional network depends on a patch of every layer before it. Its row in a backward
walk starts as one number and grows with every convolution; coefficients outside that window are
zero and need not be computed. A row follows the position of its unit: along an axis its window
starts at `stride * position + offset`, so shapes are static and only the starts differ from row to
row. Windows may extend beyond the border of a value into the padding of the convolution after it;
their coefficients there are zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from boundjax.numerics import materialized


class Axis(NamedTuple):
    """One axis of a value, and where a row's window lies on it.

    Attributes:
      full: length of the axis.
      size: length of the window.
      origin: the coordinate of a row's unit that the window follows; None if it follows none and
        starts at `offset`.
      count: number of values of that coordinate.
      stride, offset: the window starts at `stride * coordinate + offset`.
    """

    full: int
    size: int
    origin: int | None = None
    count: int = 1
    stride: int = 0
    offset: int = 0

    @property
    def whole(self) -> bool:
        """Whether the window is the whole axis."""
        return self.origin is None and self.offset == 0 and self.size == self.full

    @property
    def outside(self) -> tuple[int, int]:
        """How far windows extend beyond the two ends of the axis."""
        last = self.stride * (self.count - 1) + self.offset
        return max(0, -self.offset), max(0, last + self.size - self.full)


Frame = tuple[Axis, ...]


def whole(shape: Sequence[int]) -> Frame:
    """The frame of rows that are not windowed."""
    return tuple(Axis(n, n) for n in shape)


def unit_frame(shape: Sequence[int]) -> Frame:
    """The frame of single elements of a value, each at its coordinates."""
    return tuple(
        Axis(n, 1, origin=k, count=n, stride=1) if n > 1 else Axis(1, 1)
        for k, n in enumerate(shape)
    )


def elements(frame: Frame) -> int:
    """The number of coefficients of one row."""
    return math.prod(axis.size for axis in frame)


def smaller(frame: Frame) -> bool:
    """Whether windows hold fewer coefficients than complete rows."""
    return elements(frame) < math.prod(axis.full for axis in frame)


def expanded(frame: Frame, axes: Sequence[int]) -> Frame:
    """The frame with some axes made whole."""
    return tuple(Axis(a.full, a.full) if k in axes else a for k, a in enumerate(frame))


def united(first: Frame, second: Frame) -> Frame | None:
    """The smallest frame that holds two frames of one value; None if they move differently."""
    axes = []
    for a, b in zip(first, second, strict=True):
        if (a.origin, a.stride) != (b.origin, b.stride):
            return None
        start = min(a.offset, b.offset)
        end = max(a.offset + a.size, b.offset + b.size)
        axes.append(a._replace(offset=start, size=end - start))
    return tuple(axes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "units"],
    meta_fields=["frame", "copies"],
)
@dataclasses.dataclass(frozen=True)
class Windowed:
    """Rows `[m, *value]` that are zero outside their windows.

    Attributes:
      values: the coefficients inside the windows, `[m, *window]`.
      units: the coordinates of the rows' units, `[m / copies, k]`.
      frame: where the windows lie.
      copies: number of rows of every unit, in the order `[units; units; ...]`.
    """

    values: Array
    units: Array
    frame: Frame
    copies: int = 1

    @classmethod
    def of_units(cls, indices: Array, shape: Sequence[int], dtype: np.dtype) -> Windowed:
        """One row per flat index in `indices`, `[m]`, with a 1 at that element."""
        frame = unit_frame(shape)
        # The one element of a scalar has no coordinates.
        coordinates = [jnp.zeros_like(indices), *jnp.unravel_index(indices, tuple(shape))]
        units = jnp.stack(coordinates, axis=-1)[:, 1:].astype(jnp.int32)
        return cls(jnp.ones((len(indices), *(a.size for a in frame)), dtype), units, frame)

    @property
    def dtype(self) -> np.dtype:
        """The type of the coefficients."""
        return self.values.dtype

    def with_values(self, values: Array) -> Windowed:
        """The same windows with other coefficients."""
        return dataclasses.replace(self, values=values)

    def repeated(self, per_unit: Array) -> Array:
        """Repeats an array of units for the rows, `[m / copies, ...] -> [m, ...]`."""
        many = jnp.broadcast_to(per_unit[None], (self.copies, *per_unit.shape))
        return many.reshape(-1, *per_unit.shape[1:])

    def starts(self, axis: int) -> Array:
        """Where the windows of the units begin on an axis, `[m / copies]`."""
        a = self.frame[axis]
        if a.origin is None:
            return jnp.full(self.units.shape[:1], a.offset, jnp.int32)
        return a.stride * self.units[:, a.origin] + a.offset

    def crop(self, value: Array, outside: Literal["zero", "nearest"] = "zero") -> Array:
        """Cuts `[*value]` to the windows, `[m, *window]` (`[1, *window]` if all are the same)."""
        border = [axis.outside for axis in self.frame]
        if any(low or high for low, high in border):
            value = jnp.pad(value, border, mode="constant" if outside == "zero" else "edge")
        # Keep XLA from fusing this into the gathers and products that follow, which would repeat it
        # per element.
        value = materialized(value)
        sizes = [axis.size for axis in self.frame]
        if all(axis.origin is None for axis in self.frame):
            offsets = [a.offset + low for a, (low, _) in zip(self.frame, border, strict=True)]
            return lax.dynamic_slice(value, offsets, sizes)[None]
        starts = [self.starts(k) + low for k, (low, _) in enumerate(border)]
        patches = jax.vmap(lambda *s: lax.dynamic_slice(value, s, sizes))(*starts)
        return self.repeated(patches)

    def masked(self) -> Windowed:
        """The rows with zeros where windows extend beyond the border."""
        inside = None
        for k, axis in enumerate(self.frame):
            if axis.outside != (0, 0):
                index = self.starts(k)[:, None] + jnp.arange(axis.size, dtype=jnp.int32)[None]
                shape = [len(index), *(1,) * k, axis.size, *(1,) * (len(self.frame) - k - 1)]
                valid = ((index >= 0) & (index < axis.full)).reshape(shape)
                inside = valid if inside is None else inside & valid
        if inside is None:
            return self
        return self.with_values(jnp.where(self.repeated(inside), self.values, 0.0))

    def expand(self, axes: Sequence[int]) -> Windowed:
        """The same rows with some axes made whole."""
        values = self.values
        for k in axes:
            axis = self.frame[k]
            if axis.whole:
                continue
            index = self.starts(k)[:, None] + jnp.arange(axis.size, dtype=jnp.int32)[None]
            selection = jax.nn.one_hot(index, axis.full, dtype=values.dtype)
            selection = self.repeated(selection)  # [m, size, full]
            if axis.size == 1:
                shape = [len(selection), *(1,) * k, axis.full, *(1,) * (len(self.frame) - k - 1)]
                values = values * selection.reshape(shape)
                continue
            # Products with zeros and ones are exact, and fast where a scatter is slow.
            product = lax.dot_general(
                values,
                selection,
                (((1 + k,), (1,)), ((0,), (0,))),
                precision=lax.Precision.HIGHEST,
            )
            values = jnp.moveaxis(product, -1, 1 + k)
        return dataclasses.replace(self, values=values, frame=expanded(self.frame, axes))

    def dense(self) -> Array:
        """The rows `[m, *value]`."""
        return self.expand(range(len(self.frame))).values

    def reframed(self, frame: Frame) -> Windowed:
        """The same rows in a larger frame, see `united`."""
        config = [(0, 0, 0)]
        for a, b in zip(self.frame, frame, strict=True):
            low = a.offset - b.offset
            config.append((low, b.size - a.size - low, 0))
        values = lax.pad(self.values, jnp.zeros((), self.dtype), config)
        return dataclasses.replace(self, values=values, frame=frame)


Rows = Array | Windowed


def dense(rows: Rows) -> Array:
    """Rows as one array `[m, *value]`."""
    return rows.dense() if isinstance(rows, Windowed) else rows


def values_of(rows: Rows) -> Array:
    """The coefficients, in the windows or of complete rows."""
    return rows.values if isinstance(rows, Windowed) else rows


def with_values(rows: Rows, values: Array) -> Rows:
    """The same rows, in windows or complete, with other coefficients."""
    return rows.with_values(values) if isinstance(rows, Windowed) else values


def crop(rows: Rows, value: Array) -> Array:
    """Cuts `[*value]` to where the rows have coefficients, `[1 or m, ...]`."""
    return rows.crop(value) if isinstance(rows, Windowed) else value[None]


def add(first: Rows, second: Rows) -> Rows:
    """The sum of two sets of rows that belong to the same units and the same value."""
    if isinstance(first, Windowed) and isinstance(second, Windowed):
        frame = united(first.frame, second.frame)
        if frame is not None:
            first, second = first.reframed(frame), second.reframed(frame)
            return first.with_values(first.values + second.values)
    return dense(first) + dense(second)


def double(rows: Rows) -> Rows:
    """`[rows; -rows]`."""
    if isinstance(rows, Windowed):
        values = jnp.concatenate([rows.values, -rows.values])
        return dataclasses.replace(rows, values=values, copies=2 * rows.copies)
    return jnp.concatenate([rows, -rows])


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """Splits rows that were doubled, `[a; b] -> a, b`."""
    values = values_of(rows)
    parts = values[: len(values) // 2], values[len(values) // 2 :]
    if isinstance(rows, Windowed):
        half = dataclasses.replace(rows, copies=rows.copies // 2)
        return half.with_values(parts[0]), half.with_values(parts[1])
    return parts


def negative(rows: Rows) -> Rows:
    """`-rows`."""
    return with_values(rows, -values_of(rows))

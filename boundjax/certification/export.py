"""Networks as plain lists of ops, for programs that know neither JAX nor Flax.

A traced model becomes the nodes of `boundjax/check.py`: flat values, and products that read them by
an index. Dense layers, convolutions, pooling and whatever moves elements all become such products;
their weights stay as they are, bit for bit.
"""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from boundjax import check
from boundjax.certification.models import PureModel
from boundjax.ir.families import Extremum
from boundjax.ir.node import Graph, Node, Perturbed
from boundjax.ir.table import UnsupportedOpError
from boundjax.tracing.trace import trace

# Elements of a flat value are counted in digits of this base, which float32 holds exactly.
_BASE = 4096
_ZERO, _ONE, _INFINITE = np.float32(0.0), np.float32(1.0), np.float32(np.inf)
# Ops that move elements of their perturbed operands, and put constants beside them.
_MOVES = (
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "rev", "pad"),
    *("concatenate", "copy", "stop_gradient", "convert_element_type", "gather", "dynamic_slice"),
)


def export_weights(model: Any, x: Float[ArrayLike, "B ..."], path: str | os.PathLike[str]) -> None:
    """Writes a model as a file that `python -m boundjax.check --weights` reads.

    Args:
      model: logits `[B, C]` from a batch `[B, ...]`, anything that `certify` accepts.
      x: a batch of inputs `[B, ...]`, float32 or float64; only its shape and dtype are used.
      path: of the file, an npz without pickles; see `docs/certificates.md`.

    Raises:
      UnsupportedOpError: at an op that the checker does not know, by name.
      ValueError, TypeError: as `certify`, for the model and the input.
      OSError: if the file cannot be written.
    """
    write(path, weights_of(model, np.asarray(x)).arrays)


class Weights(NamedTuple):
    """The entries of the file that `export_weights` writes, and the number of logits."""

    arrays: dict[str, np.ndarray]
    logits: int


def weights_of(model: Any, x: np.ndarray) -> Weights:
    """A model as the checker reads it; arguments and errors as of `export_weights`."""
    if x.ndim < 1 or not x.size:
        raise ValueError(f"x must be a batch [B, ...] of inputs, got shape {x.shape}")
    pure = PureModel.of(model)
    # The form that programs compute: a file in which factors are folded into kernels, or variances
    # rewritten, would hide what a certificate for float32 has to account for.
    graph = trace(pure.of_one_example(pure.variables), jnp.asarray(x[0]), "float32")
    exporter = _Exporter(graph)
    exporter.run()
    names = [[node.op, *node.inputs] for node in exporter.nodes]
    header = {"format": "boundjax-weights", "version": 1, "nodes": names}
    arrays = {**exporter.arrays, "json": encoded(header)}
    return Weights(arrays, exporter.nodes[-1].size)


def encoded(content: Any) -> np.ndarray:
    """JSON as UTF-8 bytes, `[n]`."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def write(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], compressed: bool = False
) -> None:
    """Writes an npz file, which appears only once it is complete."""
    save = np.savez_compressed if compressed else np.savez
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as stream:
        # No array has objects, so nothing is pickled; NumPy 2.1 has no `allow_pickle` to say so.
        save(stream, **arrays)  # pyright: ignore[reportArgumentType]
    os.replace(partial, path)


class _Exporter:
    """Translates the nodes of a graph.

    Attributes:
      graph: what is translated.
      nodes: those of the checker so far; it has accepted them.
      arrays: their arrays, by the names in the file.
      places: index of a node in the graph -> index of the checker's node with its value.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[check.Node] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.places: dict[int, int] = {}

    def run(self) -> None:
        """Translates all nodes; the last one has the logits."""
        source = self.graph.nodes[0]
        self.places[0] = self.add("input", (), size=np.array([source.size]))
        for node in self.graph.nodes[1:]:
            self.places[node.index] = self.translated(node)
        (output,) = self.graph.outputs
        if not isinstance(output, Perturbed):
            raise ValueError("the model's logits do not depend on its input")
        place = self.places[output.index]
        if place != len(self.nodes) - 1:
            self.moved(place, np.arange(self.nodes[place].size))

    def add(self, op: str, inputs: Sequence[int], **arrays: np.ndarray) -> int:
        """Appends a node of the checker."""
        place = check.append(self.nodes, op, inputs, **arrays)
        self.arrays |= {f"{place}.{name}": np.asarray(value) for name, value in arrays.items()}
        return place

    def moved(self, place: int, index: np.ndarray) -> int:
        """A value whose element p is element `index[p]` of another; 0 where it is -1."""
        size = self.nodes[place].size
        if index.size == size and (index.reshape(-1) == np.arange(size)).all():
            return place
        kernel = np.ones((1, 1, 1), np.float32)
        return self.add("product", (place,), index=_index(index.reshape(-1, 1)), kernel=kernel)

    def affine(self, place: int, factor: Any = 1.0, divisor: Any = 1.0, constant: Any = 0.0) -> int:
        """`x factor / divisor + constant`, without a node where that is `x`."""
        values = [_compact(v, self.nodes[place].size) for v in (factor, divisor, constant)]
        if all((v == n).all() for v, n in zip(values, (1, 1, 0), strict=True)):
            return place
        names = ("factor", "divisor", "constant")
        return self.add("affine", (place,), **dict(zip(names, values, strict=True)))

    def translated(self, node: Node) -> int:
        """The place of a node's value."""
        name = node.primitive
        inputs = [self.places[i] for i in node.inputs]
        translate = _TRANSLATIONS.get(name)
        if translate is not None:
            place = translate(self, node, inputs)
        elif isinstance(node.op, Extremum) and len(inputs) == 1:
            place = _maximum(self, node, inputs)
        elif name in _MOVES:
            place = _movement(self, node, inputs)
        else:
            place = None
        if place is None:
            raise UnsupportedOpError(
                f"the certificate checker does not know the op {name!r} in this form, at "
                f"{node.location}; it knows {', '.join(sorted({*_TRANSLATIONS, *_MOVES}))} and "
                "maxima over windows"
            )
        if self.nodes[place].size != node.size:
            raise AssertionError(f"{name} has {node.size} elements, not {self.nodes[place].size}")
        return place


# How an op is translated; None where it has another form than the checker knows.
_Translation = Callable[[_Exporter, Node, list[int]], "int | None"]


def _index(index: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(index, np.int32)


def _compact(value: Any, size: int) -> np.ndarray:
    """A constant as few numbers: one, or as many as repeat; float32 numbers, exactly."""
    flat = np.asarray(value).reshape(-1)
    if flat.dtype.kind != "f":
        flat = flat.astype(np.float32)
    for period in (1, *(p for p in range(2, min(4096, flat.size)) if flat.size % p == 0)):
        if (flat == np.tile(flat[:period], flat.size // period)).all():
            return np.ascontiguousarray(flat[:period])
    return np.ascontiguousarray(flat)


def _full(node: Node, value: Any) -> np.ndarray:
    """A constant operand at every element of the node's value."""
    return np.broadcast_to(np.asarray(value), node.shape)


def _constant(node: Node) -> np.ndarray:
    (constant,) = node.constants
    return np.asarray(constant)


def _entries(apply: Callable[[Array], Array], shape: Sequence[int]) -> np.ndarray:
    """The index of a map that moves elements: of each of its elements, and -1 for a zero.

    `apply` is run on the digits of the elements' numbers, counted from 1.
    """
    numbers = np.arange(1, math.prod(shape) + 1).reshape(shape)
    digits = (numbers % _BASE, numbers // _BASE)
    low, high = (np.asarray(apply(jnp.asarray(d, jnp.float32))).astype(int) for d in digits)
    return low + _BASE * high - 1


def _movement(exporter: _Exporter, node: Node, inputs: list[int]) -> int:
    """The sum of the moved operands, and of the constants that stand beside them."""
    shapes = [shape.shape for shape in node.input_shapes]

    def without(constant: Array) -> Array:
        floating = jnp.issubdtype(constant.dtype, jnp.floating)
        return jnp.zeros_like(constant) if floating else constant

    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in node.input_shapes]
    parts: list[int] = []
    for k, place in enumerate(inputs):

        def alone(x: Array, k: int = k) -> Array:
            operands = [x.astype(z.dtype) if i == k else z for i, z in enumerate(zeros)]
            return node.apply(*operands, constants=without)

        parts.append(exporter.moved(place, _entries(alone, shapes[k])))
    total = parts[0]
    for part in parts[1:]:
        total = exporter.add("add", (total, part))
    return exporter.affine(total, constant=np.asarray(node.apply(*zeros)))


def _sum(exporter: _Exporter, node: Node, inputs: list[int]) -> int:
    (shape,) = node.input_shapes
    axes = tuple(node.params["axes"])
    grid = np.arange(math.prod(shape.shape)).reshape(shape.shape)
    grid = np.moveaxis(grid, axes, range(-len(axes), 0)).reshape(node.size, -1)
    return _of_windows(exporter, inputs[0], grid)


def _of_windows(exporter: _Exporter, place: int, index: np.ndarray) -> int:
    kernel = np.ones((index.shape[1], 1, 1), np.float32)
    return exporter.add("product", (place,), index=_index(index), kernel=kernel)


def _window_sum(exporter: _Exporter, node: Node, inputs: list[int]) -> int:
    (shape,) = node.input_shapes
    params = node.params
    index = window_index(
        shape.shape,
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
    )
    return _of_windows(exporter, inputs[0], index)


def window_index(
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> np.ndarray:
    """The elements of every window over a value, `[places, taps]`; -1 for padding."""
    grid = np.arange(math.prod(shape)).reshape(shape)
    for axis, ((low, high), dilation) in enumerate(zip(padding, base_dilation, strict=True)):
        size = (grid.shape[axis] - 1) * dilation + 1
        spread = np.full((*grid.shape[:axis], size, *grid.shape[axis + 1 :]), -1)
        place: list[slice] = [slice(None)] * grid.ndim
        place[axis] = slice(None, None, dilation)
        spread[tuple(place)] = grid
        place[axis] = slice(max(-low, 0), size - max(-high, 0))  # negative padding crops
        widths = [(0, 0)] * grid.ndim
        widths[axis] = (max(low, 0), max(high, 0))
        grid = np.pad(spread[tuple(place)], widths, constant_values=-1)
    reach = [(n - 1) * d + 1 for n, d in zip(window, window_dilation, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(grid, reach)
    steps = (
        *(slice(None, None, s) for s in strides),
        *(slice(None, None, d) for d in window_dilation),
    )
    return views[steps].reshape(-1, math.prod(window))


def _maximum(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    op = node.op
    assert isinstance(op, Extremum), "only maxima and minima come here"
    (shape,) = node.input_shapes
    index = _entries(lambda x: op.windows(node, x), shape.shape)
    valid = op.valid(node)
    if valid is not None:
        index = np.where(np.asarray(valid), index, -1)
    index = index.reshape(node.size, -1)
    if (index < 0).all(axis=1).any():
        return None  # a window that holds only padding: -inf
    place = exporter.affine(inputs[0], factor=np.float32(op.sign))
    place = exporter.add("max", (place,), index=_index(index))
    return exporter.affine(place, factor=np.float32(op.sign))


def _dense(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    """A product with a constant matrix, whichever of its operands is perturbed."""
    (contract, batch), first = node.params["dimension_numbers"], node.perturbed[0]
    if any(batch):
        return None
    weights = _constant(node)
    of_x, of_w = contract if first else contract[::-1]
    (shape,) = node.input_shapes
    kept = [axis for axis in range(len(shape.shape)) if axis not in of_x]
    grid = np.arange(math.prod(shape.shape)).reshape(shape.shape)
    place = exporter.moved(inputs[0], grid.transpose(*kept, *of_x))
    count = math.prod(shape.shape[axis] for axis in of_x)
    free = [axis for axis in range(weights.ndim) if axis not in of_w]
    matrix = weights.transpose(*of_w, *free).reshape(count, -1)
    index = _index(np.arange(exporter.nodes[place].size // count)[:, None])
    place = exporter.add(
        "product", (place,), index=index, kernel=np.ascontiguousarray(matrix[None])
    )
    if first:
        return place
    grid = np.arange(exporter.nodes[place].size).reshape(len(index), -1)
    return exporter.moved(place, grid.T)  # constant axes come first


def _convolution(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    params = node.params
    of_x, of_kernel, of_y = params["dimension_numbers"]
    (shape,) = node.input_shapes
    if params["batch_group_count"] != 1 or shape.shape[of_x[0]] != 1:
        return None
    sizes = [shape.shape[axis] for axis in of_x[2:]]
    channels = shape.shape[of_x[1]]
    grid = np.arange(math.prod(shape.shape)).reshape(shape.shape)
    place = exporter.moved(inputs[0], grid.transpose(*of_x[2:], of_x[0], of_x[1]))
    kernel = _constant(node).transpose(*of_kernel[2:], of_kernel[1], of_kernel[0])
    index = window_index(
        sizes,
        kernel.shape[:-2],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    kernel = kernel.reshape(-1, *kernel.shape[-2:])
    kernel = _without_groups(kernel, params["feature_group_count"], channels)
    place = exporter.add("product", (place,), index=_index(index), kernel=kernel)
    # From [*sites, channels] to the order of the result's axes.
    grid = np.arange(node.size).reshape(
        [node.shape[axis] for axis in (*of_y[2:], of_y[0], of_y[1])]
    )
    order = np.argsort((*of_y[2:], of_y[0], of_y[1]))
    return exporter.moved(place, grid.transpose(order))


def _without_groups(kernel: np.ndarray, groups: int, channels: int) -> np.ndarray:
    """A kernel `[taps, in / groups, out]` with zeros between the groups, `[taps, in, out]`."""
    if groups == 1:
        return np.ascontiguousarray(kernel)
    taps, width, outputs = kernel.shape
    full = np.zeros((taps, channels, outputs), kernel.dtype)
    share = outputs // groups
    for g in range(groups):
        columns = slice(g * share, (g + 1) * share)
        full[:, g * width : (g + 1) * width, columns] = kernel[..., columns]
    return full


def _sum_of_two(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    """`add` and `sub`, of two perturbed values or with a constant."""
    sign = np.float32(-1.0 if node.primitive == "sub" else 1.0)
    if any(shape.shape != node.shape for shape in node.input_shapes):
        return None
    if len(inputs) == 2:
        return exporter.add("add", (inputs[0], exporter.affine(inputs[1], factor=sign)))
    constant = _full(node, _constant(node))
    if node.perturbed[0]:
        return exporter.affine(inputs[0], constant=sign * constant)
    return exporter.affine(inputs[0], factor=sign, constant=constant)


def _scaled(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    constants = len(inputs) == 1 and node.input_shapes[0].shape == node.shape
    if node.primitive == "div":
        if not (constants and node.perturbed[0]):
            return None
        return exporter.affine(inputs[0], divisor=_full(node, _constant(node)))
    return exporter.affine(inputs[0], factor=_full(node, _constant(node))) if constants else None


def _negative(exporter: _Exporter, node: Node, inputs: list[int]) -> int:
    return exporter.affine(inputs[0], factor=-_ONE)


def _ramp(exporter: _Exporter, place: int, low: Any, high: Any, slope: Any) -> int:
    size = exporter.nodes[place].size
    arrays = {"low": low, "high": high, "slope": slope}
    return exporter.add("ramp", (place,), **{k: _compact(v, size) for k, v in arrays.items()})


def _between(low: float, high: float) -> _Translation:
    def translate(exporter: _Exporter, node: Node, inputs: list[int]) -> int:
        return _ramp(exporter, inputs[0], np.float32(low), np.float32(high), _ZERO)

    return translate


def _leaky(exporter: _Exporter, node: Node, inputs: list[int]) -> int:
    left = -np.asarray(node.apply(-jnp.ones(node.shape, node.dtype)))
    return _ramp(exporter, inputs[0], _ZERO, _INFINITE, left)


def _hinge(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    """`where(x < 0, left x, right x)`; the checker's ramp rises with slope 1 on its right."""
    left, right = (_full(node, c) for c in node.constants)
    if not (right == 1.0).all():
        return None
    return _ramp(exporter, inputs[0], _ZERO, _INFINITE, left)


def _clip(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    if len(inputs) != 1 or len(node.constants) != 2:
        return None
    low, high = (_full(node, np.asarray(c, node.dtype)) for c in node.constants)
    # jnp.clip gives `high` wherever low > high.
    return _ramp(exporter, inputs[0], np.minimum(low, high), high, _ZERO)


def _bounded(exporter: _Exporter, node: Node, inputs: list[int]) -> int | None:
    """The maximum or the minimum with a constant."""
    if len(inputs) != 1 or node.input_shapes[0].shape != node.shape:
        return None
    constant = _full(node, _constant(node))
    if not np.isfinite(constant).all():
        return None
    if node.primitive == "max":
        return _ramp(exporter, inputs[0], constant, _INFINITE, _ZERO)
    return _ramp(exporter, inputs[0], -_INFINITE, constant, _ZERO)


def _smooth(name: str) -> _Translation:
    return lambda exporter, node, inputs: exporter.add(name, (inputs[0],))


_TRANSLATIONS: dict[str, _Translation] = {
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "reduce_sum": _sum,
    "reduce_window_sum": _window_sum,
    "add": _sum_of_two,
    "add_any": _sum_of_two,
    "sub": _sum_of_two,
    "mul": _scaled,
    "div": _scaled,
    "neg": _negative,
    "relu": _between(0.0, np.inf),
    "relu6": _between(0.0, 6.0),
    "hard_tanh": _between(-1.0, 1.0),
    "leaky_relu": _leaky,
    "hinge": _hinge,
    "abs": lambda exporter, node, inputs: _ramp(exporter, inputs[0], _ZERO, _INFINITE, -_ONE),
    "clip": _clip,
    "max": _bounded,
    "min": _bounded,
    "tanh": _smooth("tanh"),
    "logistic": _smooth("sigmoid"),
    "exp": _smooth("exp"),
}

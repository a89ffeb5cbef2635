"""The one table of ops: what is known of each, stated once, for every transform.

An op belongs to a family; a transform has one rule per family and never asks for an op by name.

* ``Structural``: a linear map whose matrix holds only 0 and 1 (or -1), plus constants.
* ``Weighted``: a linear map in the perturbed operand, with constant weights.
* ``Scalar``: an elementwise function of one perturbed operand.
* ``Extremum``: the maximum or minimum over windows of the perturbed operands.
* ``Joint``: any other function of several perturbed values at once (products, log-softmax).
* ``Loop``: a loop too long to unroll; its rule is the interval walk's.
* ``Expansion``: an op that is written in terms of others while the function is traced.

``register`` adds an op; ``supported_ops()`` prints the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax.numpy as jnp
from chex import Array, ArrayTree

if TYPE_CHECKING:
    from boundjax.graph import Node
    from boundjax.sets import Interval
    from boundjax.windows import Frame, Windowed


class UnsupportedOpError(NotImplementedError):
    """An op of the function is not in the table; the message says which, where and what to do."""


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """An operand that depends on the input: the index of the node that makes it."""

    index: int


class Lines(NamedTuple):
    """``lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept``, elementwise.

    ``None`` stands for 0 that is known while tracing, so that a walk can skip the work.
    """

    lower_slope: Array | None
    lower_intercept: Array | None
    upper_slope: Array | None
    upper_intercept: Array | None


class Planes(NamedTuple):
    """Two linear functions of several operands, one below and one above a joint op.

    ``product(lower_weights, *x) + lower_offset <= f(*x) <= product(upper_weights, *x) +
    upper_offset``. ``product`` is linear in its weights, a pytree, and linear in the floating-point
    perturbed operands, which are all that it is given; where a weight is positive it grows with
    every operand, as the forward walk needs. If ``lower_weights is upper_weights`` the
    planes are parallel and a walk does the work once.
    """

    product: Callable[..., Array]
    lower_weights: ArrayTree
    lower_offset: Array
    upper_weights: ArrayTree
    upper_offset: Array


class Position(Protocol):
    """Where in ``[0, 1]`` a free line of a relaxation stands; any answer is sound.

    With two arguments the bounds are those around a kink at 0, and the user's slope policy answers.
    With ``default`` the op has an optimum of its own, which the policy does not change; the answer
    is the default unless positions are given or optimised. Every call is another free line.
    """

    def __call__(self, lower: Array, upper: Array, default: Array | None = None) -> Array:
        """Positions of the shape of ``lower``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """What every op has.

    Attributes:
      name: the primitive's (or the named composite's) name in a jaxpr.
      note: one line for the printed table.
      accepts: whether this entry covers a given equation, e.g. a product with one constant factor.
    """

    name: str
    note: str = ""
    accepts: Callable[[Node], bool] = lambda node: True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """How rows in windows (``boundjax.windows``) pass a linear op.

    Attributes:
      frames: ``(node, frame) -> frames`` of the perturbed operands; None if the equation needs
        complete rows.
      transpose: ``(node, rows, frames) -> coefficients`` ``[m, *window]``, one per operand; what
        reaches over the border of an operand is cut off afterwards.
      whole: the axes of the op's value along which rows must be complete.
    """

    frames: Callable[[Node, Frame], tuple[Frame, ...] | None]
    transpose: Callable[[Node, Windowed, tuple[Frame, ...]], tuple[Array, ...]]
    whole: Callable[[Node], tuple[int, ...]] = lambda node: ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structural(Op):
    """A 0/1 (or -1) matrix plus constants.

    ``sign(node)`` gives +1 or -1 per perturbed operand: how that operand enters the result.
    ``moves`` says that, with one perturbed operand, every element of it reaches at most one element
    of the result unless the result is larger: values are moved and shifted, not mixed.
    ``transpose(node, rows)`` overrides ``jax.linear_transpose`` of the equation; ``local`` says how
    rows in windows pass it.
    """

    moves: bool = False

    sign: Callable[[Node], tuple[int, ...]] = lambda node: (1,) * len(node.inputs)
    transpose: Callable[[Node, Array], tuple[Array, ...]] | None = None
    local: Local | None = None


def _with_absolute_weights(node: Node, radius: Array) -> Array:
    return node.apply(radius, constants=jnp.abs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Op):
    """Linear in its one perturbed operand; its constant operands are the weights.

    ``transpose(node, rows)`` overrides ``jax.linear_transpose`` of the equation; ``local`` says how
    rows in windows pass it.
    ``diagonal`` says that every output depends on one input only (a product with a constant).
    ``magnitude(node, radius)`` is the map whose weights are the absolute values of these.
    """

    diagonal: bool = False
    transpose: Callable[[Node, Array], tuple[Array, ...]] | None = None
    local: Local | None = None
    magnitude: Callable[[Node, Array], Array] = _with_absolute_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scalar(Op):
    """An elementwise function.

    Attributes:
      image: ``(node, lower, upper) -> (lower, upper)``, the range of the function on the interval.
      lines: ``(node, lower, upper, position) -> Lines``, valid on the interval.
      lipschitz: ``(node, lower, upper) -> L``, the largest absolute slope on the interval.
      monotone: whether the image of an exact interval is exact.
      partial: whether lines may be infinite, where the interval leaves the function's domain.
      pieces: whether it is piecewise linear: where both lines coincide, a tighter interval could
        not change them.
      jumps: whether it has steps, so that its slope may be infinite.
    """

    image: Callable[[Node, Array, Array], tuple[Array, Array]]
    lines: Callable[[Node, Array, Array, Position], Lines]
    lipschitz: Callable[[Node, Array, Array], Array]
    monotone: bool = True
    partial: bool = False
    pieces: bool = False
    jumps: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extremum(Op):
    """Maximum (``sign`` = 1) or minimum (-1) over windows.

    ``windows(node, *perturbed)`` is a linear map to ``[*out, K]``; ``valid(node)`` a boolean
    ``[*out, K]`` that is False at padding, or None. Lines may be infinite (``partial``, as of
    ``Scalar``): a window of nothing but padding has the value -inf (inf).
    """

    sign: int
    windows: Callable[..., Array]
    valid: Callable[[Node], Array | None] = lambda node: None
    partial: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Op):
    """A function of several perturbed values that no other family covers.

    Attributes:
      image: ``(node, *intervals) -> Interval`` of the op's value; one interval per perturbed
        operand (boolean ends at a boolean operand).
      planes: ``(node, *intervals, position=) -> Planes``; intervals of the floating-point operands
        and of boolean ones alike. None where the value is boolean.
    """

    image: Callable[..., Interval]
    planes: Callable[..., Planes] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Op):
    """A loop that is not unrolled: bounded by intervals, step by step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expansion(Op):
    """An op that others can express: ``expand(node)`` is traced in its place.

    ``expand(node)`` returns a JAX function of all the equation's operands.
    """

    expand: Callable[[Node], Callable[..., Any]]


LINEAR = (Structural, Weighted)
NONLINEAR = (Scalar, Extremum, Joint, Loop)

_TABLE: dict[str, list[Op]] = {}


def register(op: Op) -> Op:
    """Adds an entry to the table; of several that accept an equation the first registered wins."""
    if not isinstance(op, (*LINEAR, *NONLINEAR, Expansion)):
        raise TypeError(f"expected an op of a known family, got {type(op).__name__}")
    _TABLE.setdefault(op.name, []).append(op)
    return op


def resolve(node: Node) -> Op | None:
    """The entry that covers ``node``, or None.

    An empty operand does not depend on the input: a value with one is expanded to the same op of an
    empty constant. Layers are not, so that ``lipschitz`` can name one that has no units.
    """
    op = next((op for op in _TABLE.get(node.primitive, ()) if op.accepts(node)), None)
    empty = not all(math.prod(shape.shape) for shape in node.input_shapes)
    if empty and node.size and isinstance(op, (Structural, Scalar, Extremum, Joint)):
        return _OF_EMPTY_CONSTANTS
    return op


def _with_empty_constants(node: Node) -> Callable[..., Array]:
    """The node's function, with constants in place of its perturbed operands that are empty."""

    def function(*operands: Array) -> Array:
        shapes = iter(node.input_shapes)
        values = []
        for operand, perturbed in zip(operands, node.perturbed, strict=True):
            shape = next(shapes) if perturbed else None
            empty = shape is not None and not math.prod(shape.shape)
            values.append(jnp.zeros(shape.shape, shape.dtype) if empty else operand)
        return node.evaluate(*values)

    return function


_OF_EMPTY_CONSTANTS = Expansion(name="of empty constants", expand=_with_empty_constants)


def all_ops() -> Iterator[Op]:
    """Every registered entry."""
    for entries in _TABLE.values():
        yield from entries


def supported_ops() -> None:
    """Prints the table: op, family, note; one line each, sorted by family and name.

    ``boundjax.ops.all_ops()`` gives the entries themselves.
    """
    rows = sorted((type(op).__name__.lower(), op.name, op.note) for op in all_ops())
    width = max(len(name) for _, name, _ in rows)
    print(f"{'op':<{width}}  {'family':<10}  note")
    for family, name, note in rows:
        print(f"{name:<{width}}  {family:<10}  {note}".rstrip())

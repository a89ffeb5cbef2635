"""The families of ops: each op states its facts once, for every transform.

An op belongs to a family; a transform has one rule per family and never asks for an op by name.

* `Structural`: a linear map whose matrix holds only 0 and 1 (or -1), plus constants.
* `Weighted`: a linear map in the perturbed operand, with constant weights.
* `Scalar`: an elementwise function of one perturbed operand.
* `Extremum`: the maximum or minimum over windows of the perturbed operands.
* `Joint`: any other function of several perturbed values at once (products, log-softmax).
* `Loop`: a loop too long to unroll, which the interval walk bounds step by step.
* `Expansion`: an op that tracing rewrites in terms of other ops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from boundjax.ir.node import Node, Op
from boundjax.sets.interval import Interval
from boundjax.sets.rounding import Arithmetic
from boundjax.typing import PyTree
from boundjax.windows import Frame, Windowed


class Lines(NamedTuple):
    """`lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept`, elementwise.

    `None` is a 0 known while tracing, so that a walk can skip the work.
    """

    lower_slope: Array | None
    lower_intercept: Array | None
    upper_slope: Array | None
    upper_intercept: Array | None


class Planes(NamedTuple):
    """Two linear functions of several operands, one below and one above a joint op.

    `product(lower_weights, *x) + lower_offset <= f(*x) <= product(upper_weights, *x) +
    upper_offset`. `product` takes the floating-point perturbed operands only. It is linear in them
    and in its weights, a pytree; where a weight is positive it increases with every operand, as the
    forward walk needs. If `lower_weights is upper_weights` the planes are parallel, and a walk does
    the work once.
    """

    product: Callable[..., Array]
    lower_weights: PyTree
    lower_offset: Array
    upper_weights: PyTree
    upper_offset: Array


class Error(NamedTuple):
    """How far a computed value may be from the exact one: `absolute + relative |value|`."""

    absolute: Array | float
    relative: float


def no_error(node: Node, sizes: Sequence[Array], arithmetic: Arithmetic) -> Error:
    """The error of a `Joint` whose value is one of its operands' or of its constants' numbers."""
    del node, sizes, arithmetic
    return Error(0.0, 0.0)


class Ball(NamedTuple):
    """Rows of a value along these axes have an l2 norm of at most `radius`."""

    axes: tuple[int, ...]
    radius: float


class Position(Protocol):
    """The position in `[0, 1]` of a free line of a relaxation; any answer is sound.

    With two arguments the bounds enclose a kink at 0, and the user's slope policy answers. With
    `default` the op states its optimum, which the policy does not change: the answer is the default
    unless the caller passes or optimises positions. Every call places another free line.
    """

    def __call__(self, lower: Array, upper: Array, /, default: Array | None = None) -> Array:
        """Returns positions of the shape of `lower`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """How windowed rows (`boundjax.windows`) pass back through a linear op.

    Attributes:
      frames: `(node, frame) -> frames` of the perturbed operands; None if the equation needs
        complete rows.
      transpose: `(node, rows, frames) -> coefficients`, one array `[m, *window]` per operand; the
        caller zeroes those beyond the operand's border.
      whole: the axes of the op's value along which rows must be complete.
    """

    frames: Callable[[Node, Frame], tuple[Frame, ...] | None]
    transpose: Callable[[Node, Windowed, tuple[Frame, ...]], tuple[Array, ...]]
    whole: Callable[[Node], tuple[int, ...]] = lambda node: ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structural(Op):
    """A 0/1 (or -1) matrix plus constants.

    Attributes:
      moves: whether values are moved and shifted, not mixed: with one perturbed operand, each of
        its elements reaches at most one element of the result, unless the result is larger.
      sign: `node -> signs`, the sign (1 or -1) with which each perturbed operand enters the result.
      transpose: `(node, rows) -> coefficients` per perturbed operand, in place of
        `jax.linear_transpose` of the equation.
      local: how windowed rows pass; None if the op needs complete rows.
    """

    is_linear: ClassVar[bool] = True

    moves: bool = False
    sign: Callable[[Node], tuple[int, ...]] = lambda node: (1,) * len(node.inputs)
    transpose: Callable[[Node, Array], tuple[Array, ...]] | None = None
    local: Local | None = None


def one(node: Node) -> int:
    """The number of terms, or the reach, of an op that moves numbers one to one."""
    return 1


def copies(node: Node) -> int:
    """The reach of an op that repeats its smallest operand evenly."""
    smallest = min(math.prod(shape.shape) for shape in node.input_shapes)
    return node.size // max(1, smallest)


def _of_planes(node: Node) -> int:
    return 8 + sum(math.prod(shape.shape) for shape in node.input_shapes)


def _with_absolute_weights(node: Node, radius: Array) -> Array:
    return node.apply(radius, constants=jnp.abs)


def _with_other_weights(node: Node, size: Array, errors: Mapping[int, Array]) -> Array:
    return node.with_constants(errors).apply(size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Op):
    """Linear in its one perturbed operand; its constant operands are the weights.

    Attributes:
      diagonal: whether every output depends on one input only (a product with a constant).
      transpose, local: as of `Structural`.
      magnitude: `(node, radius) -> value` of the map with the absolute values of these weights.
      change: `(node, size, errors) -> change`, at least by how much the value of an operand of this
        magnitude changes if the weights are off by these errors (by the position of the operand);
        by default for an op that is linear in them. None if nobody states it.
    """

    is_linear: ClassVar[bool] = True

    diagonal: bool = False
    transpose: Callable[[Node, Array], tuple[Array, ...]] | None = None
    local: Local | None = None
    magnitude: Callable[[Node, Array], Array] = _with_absolute_weights
    change: Callable[[Node, Array, Mapping[int, Array]], Array] | None = _with_other_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scalar(Op):
    """An elementwise function.

    Attributes:
      image: `(node, lower, upper) -> (lower, upper)`, the range of the function on the interval.
      lines: `(node, lower, upper, position) -> Lines`, valid on the interval.
      lipschitz: `(node, lower, upper) -> L`, the largest absolute slope on the interval.
      monotone: whether the image of an exact interval is exact.
      partial: whether lines may be infinite, where the interval leaves the function's domain.
      pieces: whether it is piecewise linear, so that a tighter interval cannot change lines that
        coincide.
      jumps: whether it has steps, so that its slope may be infinite.
      kinks: `node -> points` that cut the line into parts on which the function is linear, numbers
        or arrays that broadcast to the operand's shape; none if it has no such parts, or too many.
      change: `(node, position) -> (relative, absolute)`: the value changes by at most `error *
        (relative * |operand| + absolute)` if the constant operand at this position is off by
        `error`. None where nobody states that; an exact function is off by `error` itself.
    """

    is_nonlinear: ClassVar[bool] = True

    image: Callable[[Node, Array, Array], tuple[Array, Array]]
    lines: Callable[[Node, Array, Array, Position], Lines]
    lipschitz: Callable[[Node, Array, Array], Array]
    monotone: bool = True
    partial: bool = False
    pieces: bool = False
    jumps: bool = False
    kinks: Callable[[Node], tuple[Array | float, ...]] = lambda node: ()
    change: Callable[[Node, int], tuple[float, float] | None] = lambda node, position: None
    terms: Callable[[Node], int] = one
    reach: Callable[[Node], int] = one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extremum(Op):
    """Maximum (`sign` = 1) or minimum (-1) over windows.

    Lines may be infinite (`partial`, as of `Scalar`): a window that holds only padding has the
    value -inf (inf).

    Attributes:
      sign: 1 for the maximum, -1 for the minimum.
      windows: `(node, *perturbed) -> [*out, K]`, a linear map to the entries of every window.
      valid: `node -> [*out, K]`, False at padding; None without padding.
    """

    is_nonlinear: ClassVar[bool] = True
    partial: ClassVar[bool] = True

    sign: int
    windows: Callable[..., Array]
    valid: Callable[[Node], Array | None] = lambda node: None
    terms: Callable[[Node], int] = one
    reach: Callable[[Node], int] = one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Op):
    """A function of several perturbed values that no other family covers.

    Attributes:
      image: `(node, *intervals) -> Interval` of the op's value, from one interval per perturbed
        operand (with boolean ends if the operand is boolean).
      planes: `(node, *intervals, position=) -> Planes`, from the same intervals; None if the value
        is boolean.
      error: `(node, sizes, arithmetic) -> Error` of one evaluation, from the largest magnitudes of
        its floating-point operands; None if nobody states it.
      lipschitz: `node -> constants`, numbers `L_k` between l2 norms, valid everywhere: the value
        changes by at most `sum_k L_k |change of operand k|_2`. Infinite if there is none.
      lipschitz_with: `(node, then) -> L` of the node and the elementwise node behind it together
        (softmax is the exponential of log-softmax); None if nothing better is known.
      ball: a ball that holds the value wherever it is finite; None if none is known.
    """

    is_nonlinear: ClassVar[bool] = True

    image: Callable[..., Interval]
    planes: Callable[..., Planes] | None = None
    error: Callable[[Node, Sequence[Array], Arithmetic], Error] | None = None
    lipschitz: Callable[[Node], tuple[float, ...]] | None = None
    lipschitz_with: Callable[[Node, Node], float | None] | None = None
    ball: Callable[[Node], Ball] | None = None
    terms: Callable[[Node], int] = _of_planes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Op):
    """A loop that is not unrolled: bounded by intervals, step by step."""

    is_nonlinear: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused(Op):
    """An op without bounds, with a reason for the error message.

    Attributes:
      reason: why it has no bounds, and what to do instead.
    """

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expansion(Op):
    """An op written in terms of others, which are traced in its place.

    Attributes:
      expand: `node -> function`, a JAX function of all the equation's operands.
    """

    expand: Callable[[Node], Callable[..., Any]]


def linear_op(node: Node) -> Structural | Weighted:
    """The op of a linear node."""
    op = node.op
    assert isinstance(op, Structural | Weighted), f"{node.primitive} is not linear"
    return op

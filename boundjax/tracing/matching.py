"""Compares the values of a graph under construction as functions; patterns build on this."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from boundjax.ir import table
from boundjax.ir.node import Node, Perturbed

_LARGEST_CONSTANT = 1 << 16
# Depth, in equations, to which two formulas are compared; the patterns need five.
_DEPTH = 6


class GraphView:
    """The nodes of a graph under construction, seen through ops that only move elements.

    *Places* are an integer array that holds, for every element of a value, the flat index of the
    element of another value that it equals.
    """

    def __init__(self, nodes: list[Node], is_rounded: Callable[[Any], bool] | None = None) -> None:
        """Begins with these nodes; `is_rounded` says which constants are rounded results."""
        self.nodes = nodes
        self._is_rounded = is_rounded or (lambda constant: False)
        self._numbers: dict[int, tuple[Any, float]] = {}
        self._broadcasts: dict[int, tuple[Any, Any, tuple[int, ...]]] = {}

    def note(
        self, name: str, params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]
    ) -> None:
        """Records that a constant was made from one number, or from fewer elements."""
        if name == "broadcast_in_dim" and len(operands) == 1 and np.ndim(operands[0]):
            axes = tuple(params["broadcast_dimensions"])
            self._broadcasts[id(results[0])] = (results[0], operands[0], axes)
        if not (table.moves_only(name) or name == "convert_element_type") or len(operands) != 1:
            return
        (result,) = results
        if isinstance(result, Tracer) and jnp.issubdtype(result.dtype, jnp.floating):
            number = self.number(operands[0])
            if number is not None:
                number = float(np.asarray(number, result.dtype))
                self._numbers[id(result)] = (result, number)  # holding it reserves its id

    def number(self, operand: Any) -> float | None:
        """The number that fills a constant; None if it has several, is rounded or not readable."""
        if isinstance(operand, Perturbed) or self._is_rounded(operand):
            return None
        if id(operand) in self._numbers:
            return self._numbers[id(operand)][1]
        if isinstance(operand, Tracer) or not 0 < np.size(operand) <= _LARGEST_CONSTANT:
            return None
        if jnp.issubdtype(jnp.result_type(operand), jax.dtypes.extended):
            return None
        values = np.asarray(operand).reshape(-1)
        return float(values[0]) if (values == values[0]).all() else None

    def along(self, operand: Any, axis: int) -> Any | None:
        """A constant's values `[n]` along an axis, if it is constant along all other axes.

        A scalar if the constant is one number; None if it varies along other axes, or may vary.
        """
        number = self.number(operand)
        if number is not None:
            return jnp.asarray(number, operand.dtype)
        if np.ndim(operand) == 0:
            return jnp.asarray(operand)
        _, source, axes = self._broadcasts.get(id(operand), (None, operand, range(operand.ndim)))
        long = [k for k, n in zip(axes, source.shape, strict=True) if n > 1]
        return source.reshape(-1) if long == [axis] else None

    def node(self, operand: Any) -> Node | None:
        """The node that makes an operand; None for a constant."""
        return self.nodes[operand.index] if isinstance(operand, Perturbed) else None

    def maker(self, operand: Any) -> Node:
        """The node that makes an operand, which must be perturbed."""
        assert isinstance(operand, Perturbed)
        return self.nodes[operand.index]

    def made_by(self, operand: Any, *primitives: str) -> Node | None:
        """The node that makes an operand, if it is one of these ops."""
        node = self.node(operand)
        return node if node is not None and node.primitive in primitives else None

    def shape(self, operand: Any) -> tuple[int, ...]:
        """The shape of an operand's value."""
        node = self.node(operand)
        return tuple(np.shape(operand)) if node is None else node.shape

    def passed(self, node: Node) -> Any | None:
        """The operand whose elements a node only moves; None if the node does anything else."""
        if table.moves_only(node.primitive):
            # A reshape may permute the axes first, but jax.numpy never traces to such a one.
            plain = node.primitive != "reshape" or node.params["dimensions"] is None
            return node.operands[0] if plain else None
        if node.primitive == "convert_element_type":
            (shape,) = node.input_shapes
            return node.operands[0] if shape.dtype == node.dtype else None
        if node.primitive in ("add", "sub", "mul", "div"):
            first, second = node.operands
            neutral = 0.0 if node.primitive in ("add", "sub") else 1.0
            if self.number(second) == neutral and self.shape(first) == node.shape:
                return first
            commutes = table.is_commutative(node.primitive)
            if commutes and self.number(first) == neutral and self.shape(second) == node.shape:
                return second
        if node.primitive == "select_n" and len(node.operands) == 3:
            number = self.number(node.operands[0])
            return None if number is None else node.operands[1 + int(number)]
        return None

    def plain(self, operand: Any) -> Any:
        """The same value without copies and casts to the dtype that it already has."""
        while (node := self.made_by(operand, "copy", "stop_gradient", "convert_element_type")) and (
            source := self.passed(node)
        ) is not None:
            operand = source
        return operand

    def walk(self, operand: Any, through: Callable[[Node], Any] | None = None) -> Walked:
        """Walks back from an operand through moves to the first value that is computed."""
        step = through or self.passed
        path = []
        node = self.node(operand)
        while node is not None:
            source = step(node)
            if source is None:
                break
            path.append(node)
            operand, node = source, self.node(source)
        return Walked(operand, tuple(reversed(path)))

    def places(self, walked: Walked, shape: tuple[int, ...]) -> np.ndarray:
        """Maps the elements of the walk's start, broadcast to a shape, to those of its end."""
        start = self.shape(walked.operand)
        places = count(start)
        for node in walked.path:
            places = moved(node, places)
        return np.broadcast_to(places, shape)

    def constant_in(
        self, operand: Any, places: np.ndarray, groups: np.ndarray, depth: int = _DEPTH
    ) -> bool:
        """Whether the elements of an operand at `places` are equal within every group."""
        if self.number(operand) is not None:
            return True
        walked = self.walk(operand)
        shape = self.shape(operand)
        inner = self.places(walked, shape).reshape(-1)[places]
        first = np.zeros(groups.size, inner.dtype)
        first[groups.reshape(-1)] = inner.reshape(-1)
        if (first[groups] == inner).all():
            return True
        node = self.node(walked.operand)
        if node is None:
            operand = walked.operand
            if isinstance(operand, Tracer) or operand.size > _LARGEST_CONSTANT:
                return False
            values = np.asarray(operand).reshape(-1)[inner]
            representatives = np.zeros(groups.size, values.dtype)
            representatives[groups.reshape(-1)] = values.reshape(-1)
            return bool((representatives[groups] == values).all())
        if not table.is_elementwise(node.primitive) or depth == 0:
            return False
        return all(
            self.constant_in(o, self._inner(o, node, inner), groups, depth - 1)
            for o in node.operands
        )

    def _inner(self, operand: Any, node: Node, places: np.ndarray) -> np.ndarray:
        """Converts places in an elementwise node's value to places in one of its operands."""
        shape = self.shape(operand)
        return np.broadcast_to(count(shape), node.shape).reshape(-1)[places]

    def equal(
        self, one: Any, here: np.ndarray, other: Any, there: np.ndarray, depth: int = _DEPTH
    ) -> bool:
        """Whether two operands are the same function of the input, element by element.

        `here` and `there` have one shape and select the elements to compare.
        """
        first, second = self.walk(one), self.walk(other)
        here = self.places(first, self.shape(one)).reshape(-1)[here]
        there = self.places(second, self.shape(other)).reshape(-1)[there]
        left, right = self.node(first.operand), self.node(second.operand)
        if left is None or right is None:
            return left is right and self._same_constant(first.operand, here, second.operand, there)
        if left is right:
            return bool((here == there).all())
        if left.primitive != right.primitive or left.dtype != right.dtype or depth == 0:
            return False
        if left.primitive == "reduce_sum":
            if left.params["axes"] != right.params["axes"] or not (here == there).all():
                return False
            shape = self.shape(left.operands[0])
            whole = count(shape).reshape(-1)
            return shape == self.shape(right.operands[0]) and self.equal(
                left.operands[0], whole, right.operands[0], whole, depth - 1
            )
        if not table.is_elementwise(left.primitive) or left.params.get("y") != right.params.get(
            "y"
        ):
            return False
        return all(
            self.equal(a, self._inner(a, left, here), b, self._inner(b, right, there), depth - 1)
            for a, b in zip(left.operands, right.operands, strict=True)
        )

    def _same_constant(self, one: Any, here: np.ndarray, other: Any, there: np.ndarray) -> bool:
        number = self.number(one)
        if number is not None and number == self.number(other):
            return True
        if self.same_constant(one, other):
            return bool((here == there).all())
        if any(isinstance(c, Tracer) or np.size(c) > _LARGEST_CONSTANT for c in (one, other)):
            return False
        ours, theirs = np.asarray(one).reshape(-1)[here], np.asarray(other).reshape(-1)[there]
        return bool((ours == theirs).all())

    def same_constant(self, one: Any, other: Any) -> bool:
        """Whether two constants are one, possibly broadcast twice in the same way."""
        if one is other:
            return True
        first, second = (self._broadcasts.get(id(constant)) for constant in (one, other))
        if first is None or second is None or one.shape != other.shape:
            return False
        return first[1] is second[1] and first[2] == second[2]

    def covers(self, name: str, node: Node, *operands: Any, **params: Any) -> bool:
        """Whether the table has an entry for an op of this name on these operands."""
        shapes = tuple(
            jax.ShapeDtypeStruct(made.shape, made.dtype)
            for o in operands
            if (made := self.node(o)) is not None
        )
        candidate = dataclasses.replace(
            node, primitive=name, operands=tuple(operands), params=params, input_shapes=shapes
        )
        return table.resolve(candidate) is not None


class Walked(NamedTuple):
    """Where a walk ended, and the nodes that it passed, in the order of evaluation."""

    operand: Any
    path: tuple[Node, ...]


def moved(node: Node, places: np.ndarray) -> np.ndarray:
    """Converts places in a node's operand to places in its value: a move, slice or broadcast."""
    if node.primitive == "broadcast_in_dim":
        shape = [1] * len(node.shape)
        for size, axis in zip(places.shape, node.params["broadcast_dimensions"], strict=True):
            shape[axis] = size
        return np.broadcast_to(places.reshape(shape), node.shape)
    if node.primitive in ("reshape", "squeeze"):
        return places.reshape(node.shape)
    if node.primitive == "transpose":
        return places.transpose(node.params["permutation"])
    if node.primitive == "slice":
        ends = (node.params[name] for name in ("start_indices", "limit_indices", "strides"))
        return places[tuple(map(slice, *(end or [None] * places.ndim for end in ends)))]
    return np.broadcast_to(places, node.shape)


def count(shape: Sequence[int]) -> np.ndarray:
    """The places of a value in itself: every element's own flat index."""
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def groups_of(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """Maps every element of a value to the element of its reduction over `axes` it goes into."""
    kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
    return np.broadcast_to(count(kept), shape)


def times_constant(node: Node) -> Any | None:
    """The perturbed operand of a product or quotient with a constant, else None."""
    if node.primitive in ("mul", "div") and sum(node.perturbed) == 1:
        position = node.perturbed.index(True)
        return node.operands[position] if node.primitive == "mul" or position == 0 else None
    return None

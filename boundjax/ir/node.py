"""Graphs of perturbed values: the form of a traced function.

A `Graph` lists, in evaluation order, the equations that depend on the function's input (its
*perturbed values*). Tracing evaluates everything else (weights, masks, batch statistics), which
appears as constant operands, so gradients with respect to weights simply flow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


class NoProofError(NotImplementedError):
    """Bounds were to hold in floating point, but nobody states how much something rounds."""


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """An operand that depends on the input: the index of the node that makes it."""

    index: int


def _every_operand(node: Node) -> int:
    return 1 + sum(math.prod(shape.shape) for shape in node.input_shapes)


def _every_element(node: Node) -> int:
    return node.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """The fields that every op has; each family adds its own.

    Attributes:
      name: the primitive's (or the named composite's) name in a jaxpr.
      note: one line for the printed table.
      accepts: whether this entry covers an equation, e.g. a product with one constant factor.
      traced_as: JAX's function of this name. A `jit` of that name is this op if it holds exactly
        the equations that JAX's function traces to.
      elementwise: whether formulas that contain it may be compared: every element depends on the
        operands' elements at the same place, and on no parameter but `y`.
      commutative: whether its two operands may be exchanged.
      moves_only: whether it only moves the elements of its one operand, perhaps to several places.
      terms: for error bounds, the largest number of products or terms that an element of the value
        sums; 1 if numbers are only moved or negated. Of a joint op: that an element of its planes
        sums.
      reach: the largest number of elements of the value that an element of an operand reaches.
    """

    name: str
    note: str = ""
    accepts: Callable[[Node], bool] = lambda node: True
    traced_as: Callable[..., Any] | None = None
    elementwise: bool = False
    commutative: bool = False
    moves_only: bool = False
    terms: Callable[[Node], int] = _every_operand
    reach: Callable[[Node], int] = _every_element

    is_linear: ClassVar[bool] = False
    is_nonlinear: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation on perturbed values.

    Attributes:
      index: position in the graph, after all operands.
      primitive: the primitive's name, or a named composite's (`relu`).
      operands: `Perturbed` references and constant arrays, in the equation's order.
      params: the equation's parameters.
      evaluate: all operands' values -> the node's value.
      shape, dtype: of the node's value.
      input_shapes: shape and dtype of every perturbed operand.
      scope: the enclosing Flax scope (`block1/Dense_2`), possibly empty.
      location: `file:line (function)` in the user's source.
      formulas: position of a constant operand that is itself a rounded result -> the node of
        `Graph.constants` that computes it. Under rounding `"nearest"` nothing is recorded.
      label: a readable unique name, for layers (`block1/Dense_2`) and for nonlinear nodes, whose
        pre-activations and slopes it names (`block1/Dense_2/relu`); empty for other nodes.
      op: the entry in the table of ops; None at the input.
    """

    index: int
    primitive: str
    operands: tuple[Perturbed | Array, ...]
    params: Mapping[str, Any]
    evaluate: Callable[..., Array]
    shape: tuple[int, ...]
    dtype: np.dtype
    input_shapes: tuple[jax.ShapeDtypeStruct, ...]
    scope: str
    location: str
    formulas: Mapping[int, int] = dataclasses.field(default_factory=dict[int, int])
    label: str = ""
    op: Op | None = None

    @property
    def size(self) -> int:
        """Number of elements of the node's value."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def perturbed(self) -> tuple[bool, ...]:
        """Which operands are perturbed, in the equation's order."""
        return tuple(isinstance(o, Perturbed) for o in self.operands)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the perturbed operands, in the equation's order."""
        return tuple(o.index for o in self.operands if isinstance(o, Perturbed))

    @property
    def constants(self) -> tuple[Array, ...]:
        """The constant operands, in the equation's order."""
        return tuple(o for o in self.operands if not isinstance(o, Perturbed))

    def constant(self, position: int) -> Array:
        """The constant operand at this position of the equation."""
        operand = self.operands[position]
        assert not isinstance(operand, Perturbed), "the operand is perturbed"
        return operand

    @property
    def is_linear(self) -> bool:
        """Whether its op is a linear map of its perturbed operands."""
        return self.op is not None and self.op.is_linear

    @property
    def is_nonlinear(self) -> bool:
        """Whether its op is relaxed; False for linear ops and for the input."""
        return self.op is not None and self.op.is_nonlinear

    def unit_rows(self) -> Array:
        """Rows `[size, *shape]` of coefficients, each of which picks one element of the value."""
        return jnp.eye(self.size, dtype=self.dtype).reshape(self.size, *self.shape)

    def renumbered(self, numbers: Mapping[int, int]) -> Node:
        """The same node in a graph in which the nodes have other numbers."""

        def renumber(operand: Perturbed | Array) -> Perturbed | Array:
            return Perturbed(numbers[operand.index]) if isinstance(operand, Perturbed) else operand

        operands = tuple(map(renumber, self.operands))
        return dataclasses.replace(self, index=numbers[self.index], operands=operands)

    def with_constants(self, constants: Mapping[int, Array]) -> Node:
        """The same node with other constants at these positions of its operands."""
        operands = [constants.get(k, operand) for k, operand in enumerate(self.operands)]
        return dataclasses.replace(self, operands=tuple(operands))

    def apply(self, *perturbed: Array, constants: Callable[[Array], Array] | None = None) -> Array:
        """The node's value at these perturbed operands; `constants` maps the constant ones."""
        values = iter(perturbed)

        def value_of(operand: Perturbed | Array) -> Array:
            if isinstance(operand, Perturbed):
                return next(values)
            return constants(operand) if constants else operand

        return self.evaluate(*map(value_of, self.operands))


class Constants(NamedTuple):
    """How a function computes its rounded constants from its weights, as a graph of its own.

    A constant for which nobody can say what rounds, such as a random number, is a node without an
    op behind the weights.

    Attributes:
      nodes: in evaluation order, the weights first.
      weights: the exact values of the first nodes.
    """

    nodes: tuple[Node, ...] = ()
    weights: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The perturbed part of a function of one example.

    Attributes:
      nodes: in evaluation order; `nodes[0]` is the input.
      outputs: per output leaf a `Perturbed` reference or a constant array.
      output_tree: the outputs' tree structure.
      constants: how its rounded constants are computed; empty under rounding `"nearest"`.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Perturbed | Array, ...]
    output_tree: Any
    constants: Constants = dataclasses.field(default_factory=Constants)

    @property
    def nonlinear_labels(self) -> set[str]:
        """The names of the nonlinear nodes."""
        return {node.label for node in self.nodes if node.is_nonlinear}

    def detached(self) -> Graph:
        """The same graph, through whose constants no gradient flows."""

        def detach(operand: Perturbed | Array) -> Perturbed | Array:
            return jax.lax.stop_gradient(operand) if _is_traced(operand) else operand

        nodes = [
            dataclasses.replace(n, operands=tuple(map(detach, n.operands))) for n in self.nodes
        ]
        return dataclasses.replace(self, nodes=tuple(nodes))


def _is_traced(value: object) -> bool:
    return isinstance(value, Tracer)

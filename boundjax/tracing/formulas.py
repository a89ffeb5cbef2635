"""Keeps the formulas of constants that a function computes from its weights.

The network in real arithmetic has the exact result of such a formula, and every program its own
rounded one, but a walk computes with one number. How far they may be apart follows from bounds on
the formula, a graph like any other, whose inputs are the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.ir import table
from boundjax.ir.node import Constants, Perturbed
from boundjax.ops import accuracy
from boundjax.tracing import jaxprs
from boundjax.tracing.builder import Builder, Rule
from boundjax.tracing.jaxprs import Place


class _FormulaBuilder(Builder):
    """Appends formulas of weights to one graph; exact results stay constants.

    Attributes:
      weights: the values of the nodes that are inputs, by index.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__(rules, None)
        self.weights: dict[int, Array] = {}
        self._inputs: dict[int, tuple[Any, Perturbed]] = {}  # the value reserves its id

    def _constant(self, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
        name = eqn.primitive.name
        if name in jaxprs.CALLS:
            return self.run(jaxprs.called(eqn), operands, place)
        results = jaxprs.evaluate(eqn, operands)
        floating = any(map(_is_floating, results))
        if not floating or _is_exact(name, operands, results):
            return results
        return self.rounded(eqn, operands, place)

    def rounded(self, eqn: Any, operands: Sequence[Any], place: Place) -> list[Any]:
        """Appends an equation that rounds; its operands may all be exact."""
        lifted = [self._lifted(o) if _is_floating(o) else o for o in operands]
        if any(isinstance(operand, Perturbed) for operand in lifted):
            return self.equation(eqn, lifted, place)
        return [self.unknown(eqn.primitive.name, place, v.aval) for v in eqn.outvars]

    def _lifted(self, value: Any) -> Perturbed:
        if isinstance(value, Perturbed):
            return value
        if id(value) not in self._inputs:
            shape = jax.ShapeDtypeStruct(np.shape(value), jnp.result_type(value))
            node = self.input(shape)
            self._inputs[id(value)] = value, node
            self.weights[node.index] = jnp.asarray(value)
        return self._inputs[id(value)][1]


class Formulas:
    """The formulas of the constants of a graph under construction.

    A constant is recognised by the identity of its array, so code that traces must not copy one.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        """Begins without formulas; `rules` are the builder's."""
        self._builder = _FormulaBuilder(rules)
        self._nodes: dict[int, tuple[Any, int | None]] = {}  # the array reserves its id

    def of(self, constant: Any) -> int | None:
        """The node that computes a constant; None if it is exact."""
        return self._nodes.get(id(constant), (constant, None))[1]

    def add_exact(self, constants: Sequence[Any]) -> None:
        """Declares that constants are exact: weights, not results."""
        for constant in constants:
            self._nodes.setdefault(id(constant), (constant, None))

    def add_unknown(self, name: str, place: Place, constants: Sequence[Any]) -> None:
        """Declares that nobody can say how constants are rounded, unless they are known already.

        A single number in numpy is known: code that traces writes it down as it is meant.
        """
        for constant in constants:
            written = isinstance(constant, np.ndarray | np.generic) and np.size(constant) == 1
            if id(constant) in self._nodes or written or not _is_floating(constant):
                continue
            shape = jax.ShapeDtypeStruct(np.shape(constant), jnp.result_type(constant))
            node = self._builder.unknown(name, place, shape)
            self._nodes[id(constant)] = constant, node.index

    def add(self, eqn: Any, operands: Sequence[Any], results: Sequence[Any], place: Place) -> None:
        """Adds an equation whose operands are constants; `results` are its values."""
        indices = [self.of(operand) for operand in operands]
        computed = any(index is not None for index in indices)
        floating = any(map(_is_floating, results))
        nodes: Sequence[Any] = results
        if computed or (floating and not _is_exact(eqn.primitive.name, operands, results)):
            pairs = zip(indices, operands, strict=True)
            arguments = [operand if i is None else Perturbed(i) for i, operand in pairs]
            nodes = self._builder.rounded(eqn, arguments, place)
        for result, node in zip(results, nodes, strict=True):
            index = node.index if isinstance(node, Perturbed) else None
            self._nodes.setdefault(id(result), (result, index))

    def graph(self, needed: Sequence[int]) -> tuple[Constants, Mapping[int, int]]:
        """The graph of the nodes that compute some constants, and the new numbers of its nodes.

        Args:
          needed: the nodes of these constants, as `of` gave them.
        """
        nodes, weights = self._builder.nodes, self._builder.weights
        kept = set(needed)
        for node in reversed(nodes):
            if node.index in kept:
                kept.update(node.inputs)
        order = sorted(kept, key=lambda index: (index not in weights, index))
        numbers = {old: new for new, old in enumerate(order)}
        values = tuple(weights[old] for old in order if old in weights)
        return Constants(tuple(nodes[old].renumbered(numbers) for old in order), values), numbers


def _is_floating(value: Any) -> bool:
    return isinstance(value, Perturbed) or jnp.issubdtype(jnp.result_type(value), jnp.inexact)


# Besides the table's ops. Numbers from bits, and those of `iota`, are exact by definition.
_EXACT = frozenset(["bitcast_convert_type", "copy", "iota", "optimization_barrier", "sort"])


def _is_exact(name: str, operands: Sequence[Any], results: Sequence[Any]) -> bool:
    """Whether an equation on exact operands has exact results."""
    if name == "convert_element_type":
        return _converts_exactly(operands[0], jnp.result_type(results[0]))
    if name in accuracy.STATED:
        # A step at 0 has two possible values where a weight is subnormal.
        return accuracy.STATED[name] == accuracy.EXACT and not table.jumps(name)
    return name in _EXACT or table.selects_numbers(name)


def _converts_exactly(operand: Any, to: np.dtype[Any]) -> bool:
    dtype = jnp.result_type(operand)
    if dtype == jnp.bool_:
        return True
    if not jnp.issubdtype(to, jnp.floating):
        return False
    if jnp.issubdtype(dtype, jnp.floating):
        wide, narrow = jnp.finfo(to), jnp.finfo(dtype)
        return bool(wide.nmant >= narrow.nmant and wide.maxexp >= narrow.maxexp)
    if not jnp.issubdtype(dtype, jnp.integer):
        return False
    largest = 2.0 ** (jnp.finfo(to).nmant + 1)
    if jnp.iinfo(dtype).max <= largest:
        return True
    # Small integers are concrete while tracing, see `jaxprs.evaluate`.
    concrete = not isinstance(operand, Tracer)
    return concrete and bool((np.abs(np.asarray(operand, np.float64)) <= largest).all())

"""Builds a graph by appending one node per equation.

Calls are inlined, constants folded and composite activations named. The rules for control flow and
the rewrites are arguments, so that both can build graphs themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir import table
from boundjax.ir.composite import primitive as composite_primitive
from boundjax.ir.families import Expansion, Scalar
from boundjax.ir.node import Constants, Node, Perturbed
from boundjax.ir.table import UnsupportedOpError, resolve
from boundjax.tracing import jaxprs, matching, refusals
from boundjax.tracing.jaxprs import Place


class Replacement(Protocol):
    """A function to trace in place of a node, and its operands."""

    @property
    def function(self) -> Callable[..., Any]:
        """The JAX function."""
        ...

    @property
    def operands(self) -> Sequence[Any]:
        """Its arguments: constants and `Perturbed` references."""
        ...


# (nodes so far, new node) -> what to trace in place of the new node; None keeps it.
Rewriter = Callable[[matching.GraphView, Node], Replacement | None]


class Formulas(Protocol):
    """Keeps the formulas of constants, see `formulas.Formulas`."""

    def of(self, constant: Any) -> int | None:
        """The node that computes a constant; None if it is exact."""
        ...

    def add_exact(self, constants: Sequence[Any]) -> None:
        """Declares that constants are exact."""
        ...

    def add_unknown(self, name: str, place: Place, constants: Sequence[Any]) -> None:
        """Declares that nobody can say how constants are rounded, unless they are known."""
        ...

    def add(self, eqn: Any, operands: Sequence[Any], results: Sequence[Any], place: Place) -> None:
        """Adds an equation on constants and its values."""
        ...

    def graph(self, needed: Sequence[int]) -> tuple[Constants, Mapping[int, int]]:
        """The graph of these nodes, and the new numbers of its nodes."""
        ...


# (builder, equation, operands, place) -> the operands that stand for the equation's outputs; an
# empty list if the equation is like any other.
Rule = Callable[["Builder", Any, list[Any], Place], list[Any]]

# The key of the rule for equations on perturbed integers, which no primitive is called.
ON_INTEGERS = "on integers"


class Built(NamedTuple):
    """The perturbed values of a jaxpr.

    Attributes:
      nodes: in evaluation order.
      outputs: `Perturbed` references and constants.
      constants: the formulas of rounded constants among the nodes' operands.
      rounded: positions of the outputs that are rounded constants.
    """

    nodes: list[Node]
    outputs: list[Any]
    constants: Constants = Constants()
    rounded: tuple[int, ...] = ()


def build(
    body: jaxprs.Body,
    arguments: Sequence[Any],
    rules: Mapping[str, Rule],
    rewrite: Rewriter | None,
    formulas: Formulas | None = None,
) -> Built:
    """Builds the perturbed nodes and the outputs of a jaxpr.

    Args:
      body: the jaxpr.
      arguments: a `ShapeDtypeStruct` for every perturbed argument, the value of every other one.
        The perturbed arguments become the first nodes, in this order.
      rules: handlers by primitive (`control.RULES`), and that of `ON_INTEGERS`.
      rewrite: recognises composite functions by their structure (`patterns.rewrite`); None
        rewrites nothing.
      formulas: keeps the formulas of constants, see `Constants`; None keeps none.

    Raises:
      UnsupportedOpError: at the first equation on a perturbed value that the table does not cover.
    """
    builder = Builder(rules, rewrite, formulas)
    operands = [builder.input(a) if isinstance(a, jax.ShapeDtypeStruct) else a for a in arguments]
    inputs = len(builder.nodes)
    outputs = builder.run(body, operands, Place())
    nodes, outputs = _pruned(builder.nodes, outputs, inputs)
    unsupported = [n for n in nodes[inputs:] if n.op is None or refusals.is_half_precision(n)]
    if unsupported:
        # Name the op that uses an index rather than the cast to it, which says less.
        node = next((n for n in unsupported if not refusals.says_little(n)), unsupported[0])
        raise UnsupportedOpError(refusals.unsupported(node))
    built = Built(nodes, outputs)
    return built if formulas is None else _with_formulas(built, formulas)


def _with_formulas(built: Built, formulas: Formulas) -> Built:
    """Tells every node which of its constants are computed, and by which formulas."""
    computed = [
        {k: index for k, o in enumerate(node.operands) if (index := formulas.of(o)) is not None}
        for node in built.nodes
    ]
    constants, numbers = formulas.graph([i for of_node in computed for i in of_node.values()])
    nodes = [
        dataclasses.replace(node, formulas={k: numbers[i] for k, i in of_node.items()})
        for node, of_node in zip(built.nodes, computed, strict=True)
    ]
    rounded = [k for k, o in enumerate(built.outputs) if formulas.of(o) is not None]
    return Built(nodes, built.outputs, constants, tuple(rounded))


def _pruned(nodes: list[Node], outputs: list[Any], inputs: int = 1) -> tuple[list[Node], list[Any]]:
    """Drops the nodes that no output depends on and renumbers the rest; inputs always stay."""
    needed = {*range(inputs), *(o.index for o in outputs if isinstance(o, Perturbed))}
    for node in reversed(nodes):
        if node.index in needed:
            needed.update(node.inputs)
    new = {old: index for index, old in enumerate(sorted(needed))}
    kept = [nodes[old].renumbered(new) for old in new]
    return kept, [Perturbed(new[o.index]) if isinstance(o, Perturbed) else o for o in outputs]


class Builder:
    """Interprets jaxprs on operands that are either constants or `Perturbed` references.

    Attributes:
      nodes: the nodes appended so far.
      rules: handlers of control flow, by primitive.
      rewrite: what to trace in place of a node about to be appended; None rewrites nothing.
      view: the nodes as `rewrite` sees them.
      formulas: those of the constants so far; None keeps none.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        rewrite: Rewriter | None,
        formulas: Formulas | None = None,
    ) -> None:
        self.rules, self.rewrite, self.formulas = rules, rewrite, formulas
        self.nodes: list[Node] = []
        is_rounded = None if formulas is None else lambda c: formulas.of(c) is not None
        self.view = matching.GraphView(self.nodes, is_rounded)

    def input(self, shape: jax.ShapeDtypeStruct) -> Perturbed:
        """Appends a perturbed value that no equation computes."""
        return self._without_equation("input", "the input", shape)

    def unknown(self, name: str, place: Place, aval: Any) -> Perturbed:
        """Appends a value of an equation about which nothing is known, not even its operands."""
        return self._without_equation(name, place.location, aval)

    def _without_equation(self, name: str, location: str, aval: Any) -> Perturbed:
        index = len(self.nodes)
        self.nodes.append(
            Node(
                index=index,
                primitive=name,
                operands=(),
                params={},
                evaluate=_not_computed,
                shape=tuple(aval.shape),
                dtype=aval.dtype,
                input_shapes=(),
                scope="",
                location=location,
                label=name,
            )
        )
        return Perturbed(index)

    def run(self, body: jaxprs.Body, arguments: Sequence[Any], outer: Place) -> list[Any]:
        """Appends the equations of a jaxpr and returns its outputs."""
        jaxpr, consts = body
        environment: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            value = jaxprs.literal(atom)
            return environment[atom] if value is None else value

        environment.update(zip(jaxpr.constvars, consts, strict=True))
        environment.update(zip(jaxpr.invars, arguments, strict=True))
        if self.formulas is not None and not outer.fixed:
            self.formulas.add_exact(consts)
        elif self.formulas is not None:
            # Constants that this library makes on the way: nobody keeps their formulas.
            self.formulas.add_unknown("constant", outer, consts)
        for eqn in jaxprs.live(jaxpr):
            operands = [read(atom) for atom in eqn.invars]
            place = jaxprs.place(eqn, outer)
            perturbed = any(isinstance(o, Perturbed) for o in operands)
            results = (self.equation if perturbed else self._constant)(eqn, operands, place)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
        """Evaluates an equation that depends on no perturbed value."""
        name = eqn.primitive.name
        if self.formulas is not None and name in jaxprs.CALLS:
            return self.run(jaxprs.called(eqn), operands, place)
        results = jaxprs.evaluate(eqn, operands)
        if self.formulas is not None:
            self.formulas.add(eqn, operands, results, place)
        if self.rewrite is not None:
            self.view.note(name, eqn.params, operands, results)
        return results

    def equation(self, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
        """Appends an equation on perturbed values; returns the operands for its outputs."""
        name = eqn.primitive.name
        if name in jaxprs.CALLS:
            composite = self._composite(eqn, operands, place)
            if composite is not None:
                return composite
            return self.run(jaxprs.called(eqn), operands, place)
        if name in self.rules:
            return self.rules[name](self, eqn, operands, place)
        if ON_INTEGERS in self.rules and self._on_integers(eqn, operands):
            carried = self.rules[ON_INTEGERS](self, eqn, operands, place)
            if carried:
                return carried
        evaluate = jaxprs.evaluator(eqn)
        results: list[Any] = []
        for k, variable in enumerate(eqn.outvars):
            node = self._node(
                name, eqn.params, operands, place, lambda *v, k=k: evaluate(*v)[k], variable.aval
            )
            if eqn.primitive is composite_primitive:
                params = dict(eqn.params["items"])
                function = functools.partial(eqn.params["function"], **params)
                name = eqn.params["name"]
                node = self._node(name, params, operands, place, function, variable.aval)
            if self.rewrite is not None:
                replacement = self.rewrite(self.view, node)
                if replacement is not None:
                    return self.inline(replacement.function, replacement.operands, place)
            if isinstance(node.op, Expansion):
                return self.inline(node.op.expand(node), operands, place)
            if _repeats(node):
                return self.inline(_with_repetition(node), operands, place)
            # An op without an entry is an error only if an output depends on it, see `build`.
            self.nodes.append(node)
            results.append(Perturbed(node.index))
        return results

    def _on_integers(self, eqn: Any, operands: list[Any]) -> bool:
        """Whether an equation takes or makes perturbed integers."""
        pairs = zip(operands, eqn.invars, strict=True)
        avals = [atom.aval for o, atom in pairs if isinstance(o, Perturbed)]
        avals += jaxprs.outputs_of(eqn)
        return any(jnp.issubdtype(aval.dtype, jnp.integer) for aval in avals)

    def inline(
        self, function: Callable[..., Any], operands: Sequence[Any], place: Place
    ) -> list[Any]:
        """Traces a JAX function of the operands and appends it; returns its flat outputs."""
        closed = jax.make_jaxpr(function)(*(self.shape(o) for o in operands))
        return self.run(jaxprs.body_of(closed), list(operands), place._replace(fixed=True))

    def shape(self, operand: Any) -> jax.ShapeDtypeStruct:
        """The shape and dtype of an operand's value."""
        if isinstance(operand, Perturbed):
            node = self.nodes[operand.index]
            return jax.ShapeDtypeStruct(node.shape, node.dtype)
        return jax.ShapeDtypeStruct(np.shape(operand), jnp.result_type(operand))

    def nested(self, body: jaxprs.Body, arguments: Sequence[Any]) -> Built:
        """Builds a body as a graph of its own (`build`): its nodes do not join this graph."""
        return build(body, arguments, self.rules, self.rewrite)

    def append(
        self,
        name: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        place: Place,
        evaluate: Callable[..., Array],
        aval: Any,
    ) -> Perturbed:
        """Appends one node, which may lack an entry in the table."""
        self.nodes.append(self._node(name, params, operands, place, evaluate, aval))
        return Perturbed(len(self.nodes) - 1)

    def _composite(self, eqn: Any, operands: list[Any], place: Place) -> list[Any] | None:
        """Appends a named function if the call is JAX's own and in the table.

        A user's function that happens to be called `relu` is inlined like any other. Only an
        expansion may have several outputs.
        """
        name = eqn.params.get("name")
        aval = eqn.outvars[0].aval
        for op, function in table.traced_as(name):
            is_expansion = isinstance(op, Expansion)
            # An integer is carried as a float, see `integers`.
            if not is_expansion and (
                len(eqn.outvars) > 1 or jnp.issubdtype(aval.dtype, jnp.integer)
            ):
                continue
            node = self._node(name, eqn.params, operands, place, function, aval)
            if not op.accepts(node) or not jaxprs.calls_the_same(eqn, name, function):
                continue
            if is_expansion:
                return self.inline(op.expand(node), operands, place)
            node = dataclasses.replace(node, op=op)
            if _repeats(node):
                return self.inline(_with_repetition(node), operands, place)
            self.nodes.append(node)
            return [Perturbed(node.index)]
        return None

    def _node(
        self,
        name: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        place: Place,
        evaluate: Callable[..., Array],
        aval: Any,
    ) -> Node:
        node = Node(
            index=len(self.nodes),
            primitive=name,
            operands=tuple(operands),
            params=params,
            evaluate=evaluate,
            shape=tuple(aval.shape),
            dtype=aval.dtype,
            input_shapes=tuple(self.shape(o) for o in operands if isinstance(o, Perturbed)),
            scope=place.scope,
            location=place.location,
        )
        return dataclasses.replace(node, op=resolve(node))


def _not_computed(*operands: Array) -> Array:
    raise TypeError("the input of a graph has no equation to evaluate")


def _repeats(node: Node) -> bool:
    """Whether an elementwise op broadcasts its operand against a larger constant."""
    return isinstance(node.op, Scalar) and node.input_shapes[0].shape != node.shape


def _with_repetition(node: Node) -> Callable[..., Array]:
    """The node's function with its operand broadcast first: elementwise ops keep the shape."""

    def function(*operands: Array) -> Array:
        pairs = zip(operands, node.perturbed, strict=True)
        return node.evaluate(*(jnp.broadcast_to(o, node.shape) if p else o for o, p in pairs))

    return function

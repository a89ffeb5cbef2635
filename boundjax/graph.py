"""function -> Graph: trace, inline calls, fold constants, name composite functions.

A ``Graph`` lists, in evaluation order, the equations that depend on the function's input (its
*perturbed values*). Everything else (weights, masks, batch statistics) has been evaluated while
tracing and appears as a constant operand, so gradients with respect to weights simply flow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import Array

from boundjax import control, jaxprs, matching, patterns
from boundjax.jaxprs import Place
from boundjax.jaxprs import program as program
from boundjax.jaxprs import unroll_limit as unroll_limit
from boundjax.ops import registry
from boundjax.ops.composite import primitive as composite_primitive
from boundjax.ops.registry import Perturbed

# Composite activations, recognised before they are inlined. A jit called `relu` is only taken for
# jax.nn.relu if it holds the very equations that JAX's own function traces to.
_COMPOSITES: dict[str, Callable[..., Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "hard_tanh": jax.nn.hard_tanh,
    "softplus": jax.nn.softplus,
    "clip": jnp.clip,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "hard_silu": jax.nn.hard_silu,
    "soft_sign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "squareplus": jax.nn.squareplus,
    "sparse_plus": jax.nn.sparse_plus,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation on perturbed values.

    Attributes:
      index: position in the graph; operands come before.
      primitive: the primitive's name, or a named composite's (``relu``).
      operands: ``Perturbed`` references and constant arrays, in the equation's order.
      params: the equation's parameters.
      evaluate: all operands' values -> the node's value.
      shape, dtype: of the node's value.
      input_shapes: shape and dtype of every perturbed operand.
      scope: the Flax scope it stands in (``block1/Dense_2``), possibly empty.
      label: a readable unique name, of layers (``block1/Dense_2``) and of nonlinear nodes for their
        pre-activations and slopes (``block1/Dense_2/relu``); empty for other nodes.
      location: ``file:line (function)`` in the user's source.
      op: the entry of the op table; None at the input.
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
    label: str = ""
    op: registry.Op | None = None

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

    def apply(self, *perturbed: Array, constants: Callable[[Array], Array] | None = None) -> Array:
        """The node's value for given perturbed operands; ``constants`` maps the constant ones."""
        values = iter(perturbed)
        change = constants or (lambda constant: constant)
        return self.evaluate(
            *(next(values) if isinstance(o, Perturbed) else change(o) for o in self.operands)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The perturbed part of a function of one example.

    Attributes:
      nodes: in evaluation order; ``nodes[0]`` is the input.
      outputs: per output leaf a ``Perturbed`` reference or a constant array.
      output_tree: the outputs' tree structure.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Perturbed | Array, ...]
    output_tree: Any

    @property
    def nonlinear_labels(self) -> set[str]:
        """The names of the nonlinear nodes."""
        return {node.label for node in self.nodes if isinstance(node.op, registry.NONLINEAR)}

    def detached(self) -> Graph:
        """The same graph; constants that are being differentiated are plain constants."""

        def detach(operand: Perturbed | Array) -> Perturbed | Array:
            traced = isinstance(operand, jax.core.Tracer)
            return jax.lax.stop_gradient(operand) if traced else operand

        nodes = [
            dataclasses.replace(n, operands=tuple(map(detach, n.operands))) for n in self.nodes
        ]
        return dataclasses.replace(self, nodes=tuple(nodes))


def trace(function: Callable[[Array], Any], example: Array) -> Graph:
    """Traces a function of one example.

    Args:
      function: any JAX function of one array; it may close over (traced) weights.
      example: an array or tracer of the input's shape; its values are not used.

    Raises:
      TypeError: if the example is neither float32 nor float64.
      UnsupportedOpError: at the first equation on a perturbed value that the table does not cover.
    """
    if jnp.result_type(example) not in (jnp.float32, jnp.float64):
        # Half precision would round the bounds themselves in the third digit.
        raise TypeError(
            f"the input set must be float32 or float64, got {jnp.result_type(example)}; "
            "convert it, e.g. x.astype(jnp.float32)"
        )
    closed, output_shape = jax.make_jaxpr(function, return_shape=True)(example)
    shape = jax.ShapeDtypeStruct(jnp.shape(example), jnp.result_type(example))
    nodes, outputs = trace_body(jaxprs.body_of(closed), [shape])
    return Graph(
        nodes=_label(nodes),
        outputs=tuple(outputs),
        output_tree=jax.tree.structure(output_shape),
    )


def trace_body(
    body: jaxprs.Body, arguments: Sequence[Any], rewrite: bool = True
) -> tuple[list[Node], list[Any]]:
    """The perturbed nodes and the outputs of a jaxpr.

    Args:
      body: the jaxpr.
      arguments: a ``ShapeDtypeStruct`` for every perturbed one, which become the first nodes in
        this order; the values of the others.
      rewrite: whether composite functions are named by their structure, see ``patterns``.

    Raises:
      UnsupportedOpError: at the first equation on a perturbed value that the table does not cover.
    """
    builder = _Builder(rewrite)
    operands = [builder.input(a) if isinstance(a, jax.ShapeDtypeStruct) else a for a in arguments]
    inputs = len(builder.nodes)
    outputs = builder.run(body, operands, Place())
    nodes, outputs = _pruned(builder.nodes, outputs, inputs)
    unsupported = [n for n in nodes[inputs:] if n.op is None or control.is_half_precision(n)]
    if unsupported:
        # Of a value that is cast to an index, what it indexes says more than the cast.
        node = next((n for n in unsupported if not control.is_index(n)), unsupported[0])
        raise registry.UnsupportedOpError(_unsupported(node))
    return nodes, outputs


def _pruned(nodes: list[Node], outputs: list[Any], inputs: int = 1) -> tuple[list[Node], list[Any]]:
    """The nodes that outputs depend on, renumbered, and the outputs; the inputs always stay."""
    needed = {*range(inputs), *(o.index for o in outputs if isinstance(o, Perturbed))}
    for node in reversed(nodes):
        if node.index in needed:
            needed.update(node.inputs)
    new = {old: index for index, old in enumerate(sorted(needed))}

    def renumber(operand: Any) -> Any:
        return Perturbed(new[operand.index]) if isinstance(operand, Perturbed) else operand

    kept = [
        dataclasses.replace(
            nodes[old], index=index, operands=tuple(map(renumber, nodes[old].operands))
        )
        for old, index in new.items()
    ]
    return kept, [renumber(output) for output in outputs]


class _Builder:
    """Interprets jaxprs on operands that are either constants or ``Perturbed`` references."""

    def __init__(self, rewrite: bool = True) -> None:
        self.nodes: list[Node] = []
        self.view = matching.View(self.nodes) if rewrite else None

    def input(self, shape: jax.ShapeDtypeStruct) -> Perturbed:
        """A perturbed value that nothing computes."""
        index = len(self.nodes)
        self.nodes.append(
            Node(
                index=index,
                primitive="input",
                operands=(),
                params={},
                evaluate=lambda: None,
                shape=tuple(shape.shape),
                dtype=shape.dtype,
                input_shapes=(),
                scope="",
                location="the input",
                label="input",
            )
        )
        return Perturbed(index)

    def run(self, body: jaxprs.Body, arguments: Sequence[Any], outer: Place) -> list[Any]:
        """Appends the equations of a jaxpr; its outputs."""
        jaxpr, consts = body
        environment: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            value = jaxprs.literal(atom)
            return environment[atom] if value is None else value

        environment.update(zip(jaxpr.constvars, consts, strict=True))
        environment.update(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxprs.live(jaxpr):
            operands = [read(atom) for atom in eqn.invars]
            if any(isinstance(o, Perturbed) for o in operands):
                results = self._perturbed(eqn, operands, jaxprs.place(eqn, outer))
            else:
                results = jaxprs.evaluate(eqn, operands)
                if self.view is not None:
                    self.view.note(eqn.primitive.name, eqn.params, operands, results)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _perturbed(self, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
        name = eqn.primitive.name
        if name in jaxprs.CALLS:
            composite = self._composite(eqn, operands, place)
            if composite is not None:
                return [composite]
            return self.run(jaxprs.called(eqn), operands, place)
        if name in control.RULES:
            return control.RULES[name](self, eqn, operands, place)
        evaluate = jaxprs.evaluator(eqn)
        results = []
        for k, variable in enumerate(eqn.outvars):
            node = self._node(
                name, eqn.params, operands, place, lambda *v, k=k: evaluate(*v)[k], variable.aval
            )
            if eqn.primitive is composite_primitive:
                params = dict(eqn.params["items"])
                function = functools.partial(eqn.params["function"], **params)
                name = eqn.params["name"]
                node = self._node(name, params, operands, place, function, variable.aval)
            elif self.view is not None:
                found = patterns.rewrite(self.view, node)
                if found is not None:
                    return self.inline(found.function, found.operands, place)
            if isinstance(node.op, registry.Expansion):
                return self.inline(node.op.expand(node), operands, place)
            if _repeats(node):
                return self.inline(_with_repetition(node), operands, place)
            # An op without an entry is an error only if an output depends on it, see `trace_body`.
            self.nodes.append(node)
            results.append(Perturbed(node.index))
        return results

    def inline(
        self, function: Callable[..., Any], operands: Sequence[Any], place: Place
    ) -> list[Any]:
        """Traces a JAX function of the operands and appends its equations; its outputs, flat."""
        closed = jax.make_jaxpr(function)(*(self.shape(o) for o in operands))
        return self.run(jaxprs.body_of(closed), list(operands), place._replace(fixed=True))

    def shape(self, operand: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an operand's value."""
        if isinstance(operand, Perturbed):
            node = self.nodes[operand.index]
            return jax.ShapeDtypeStruct(node.shape, node.dtype)
        return jax.ShapeDtypeStruct(np.shape(operand), jnp.result_type(operand))

    def nested(self, body: jaxprs.Body, arguments: Sequence[Any]) -> tuple[list[Node], list[Any]]:
        """``trace_body`` of a body that stays one: its nodes are no part of this graph."""
        return trace_body(body, arguments, self.view is not None)

    def append(
        self,
        name: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        place: Place,
        evaluate: Callable[..., Array],
        aval: Any,
    ) -> Perturbed:
        """Appends one node; it may have no entry in the table."""
        self.nodes.append(self._node(name, params, operands, place, evaluate, aval))
        return Perturbed(len(self.nodes) - 1)

    def _composite(self, eqn: Any, operands: list[Any], place: Place) -> Perturbed | None:
        """A named activation, where the call is really JAX's own and the table covers it."""
        name = eqn.params.get("name")
        function = _COMPOSITES.get(name) if len(eqn.outvars) == 1 else None
        if function is None or not jaxprs.calls_the_same(eqn, name, function):
            return None
        node = self._node(name, eqn.params, operands, place, function, eqn.outvars[0].aval)
        if node.op is None:
            return None
        if _repeats(node):
            (result,) = self.inline(_with_repetition(node), operands, place)
            return result
        self.nodes.append(node)
        return Perturbed(node.index)

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
        return dataclasses.replace(node, op=registry.resolve(node))


def _repeats(node: Node) -> bool:
    """Whether an elementwise function repeats its operand along axes of a larger constant."""
    return isinstance(node.op, registry.Scalar) and node.input_shapes[0].shape != node.shape


def _with_repetition(node: Node) -> Callable[..., Array]:
    """The node's function, which repeats its operand first: elementwise ops keep its shape."""

    def function(*operands: Array) -> Array:
        pairs = zip(operands, node.perturbed, strict=True)
        return node.evaluate(*(jnp.broadcast_to(o, node.shape) if p else o for o, p in pairs))

    return function


def _unsupported(node: Node) -> str:
    where = f" in scope {node.scope}" if node.scope else ""
    advice = control.advice(node)
    if advice is not None:
        return f"no bounds for the op '{node.primitive}' at {node.location}{where}: {advice}"
    kinds = ", ".join(
        "perturbed" if isinstance(o, Perturbed) else f"constant {np.shape(o)}"
        for o in node.operands
    )
    return (
        f"no bounds are known for the op '{node.primitive}' ({kinds}) at {node.location}{where}; "
        "replace it by a supported op (boundjax.supported_ops() prints them) or add it with "
        "boundjax.ops.register(boundjax.ops.Scalar(name="
        f"'{node.primitive}', image=..., lines=..., lipschitz=...)), see CONTRIBUTING.md"
    )


def _label(nodes: list[Node]) -> tuple[Node, ...]:
    """Names layers and nonlinear nodes, ``Dense_0`` and ``Dense_0/relu``, without the root scope.

    A nonlinear node's name starts with that of the layer before it; a layer outside of any scope is
    named by its primitive.
    """
    scopes = [_modules(n.scope) for n in nodes if n.scope]
    root = scopes[0][0] if scopes and all(s[0] == scopes[0][0] for s in scopes) else None
    seen: dict[str, int] = {}
    labelled = []
    for node in nodes:
        nonlinear = isinstance(node.op, registry.NONLINEAR)
        if nonlinear or (isinstance(node.op, registry.Weighted) and not node.op.diagonal):
            scope = _modules(_producing_scope(nodes, node) if nonlinear else node.scope)
            if root is not None and scope[:1] == [root]:
                scope = scope[1:]
            label = "/".join([*(p for p in scope if p), *([node.primitive] if nonlinear else [])])
            label = label or node.primitive
            count = seen[label] = seen.get(label, -1) + 1
            node = dataclasses.replace(node, label=f"{label}_{count}" if count else label)
        labelled.append(node)
    return tuple(labelled)


def _modules(scope: str) -> list[str]:
    """The modules of a scope: Flax writes a method other than ``__call__`` as ``Module.method``."""
    names = [part.split(".")[0] for part in scope.split("/")]
    return [name for k, name in enumerate(names) if k == 0 or name != names[k - 1]]


def _producing_scope(nodes: list[Node], node: Node) -> str:
    """The scope of the nearest weighted op that feeds ``node``, else its own."""
    current = node
    while current.inputs:
        current = nodes[current.inputs[0]]
        if isinstance(current.op, registry.Weighted) and current.scope:
            return current.scope
        if isinstance(current.op, registry.NONLINEAR):
            break
    return node.scope

"""function -> Graph: trace, inline calls, fold constants, name composite activations.

The only file that touches jaxprs. ``jax.extend.core`` has no stability promise, so equations are
recognised by their primitive's name, and whatever moved between JAX releases is handled here.

A ``Graph`` lists, in evaluation order, the equations that depend on the function's input (its
*perturbed values*). Everything else (weights, masks, batch statistics) has been evaluated while
tracing and appears as a constant operand, so gradients with respect to weights simply flow.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from chex import Array
from jax.extend import core as jex_core

from boundjax.ops import registry
from boundjax.ops.composite import primitive as composite_primitive
from boundjax.ops.registry import Perturbed

# Calls that only wrap a jaxpr; where it stands in their parameters differs between releases.
_CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "remat",
        "remat2",
        "checkpoint",
        "custom_lin",
    ]
)
_CALL_JAXPRS = ("call_jaxpr", "jaxpr", "fun_jaxpr")

# Composite activations, recognised before they are inlined. A jit called `relu` is only taken for
# jax.nn.relu if it holds the very equations that JAX's own function traces to.
_COMPOSITES: dict[str, Callable[..., Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "hard_tanh": jax.nn.hard_tanh,
    "softplus": jax.nn.softplus,
    "clip": jnp.clip,
}

_LIBRARIES = (
    *(
        os.path.dirname(os.path.abspath(module.__file__)) + os.sep
        for module in (jax, flax, __import__("jaxlib"), registry)
    ),
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
)


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
      label: a readable unique name for pre-activations and slopes (``block1/Dense_2/relu``).
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
    builder = _Builder(jnp.shape(example), jnp.result_type(example))
    outputs = builder.run(closed.jaxpr, closed.consts, [Perturbed(0)], _Place("", _UNKNOWN))
    nodes, outputs = _pruned(builder.nodes, outputs)
    for node in nodes[1:]:
        if node.op is None:
            raise registry.UnsupportedOpError(_unsupported(node))
    return Graph(
        nodes=_label(nodes),
        outputs=tuple(outputs),
        output_tree=jax.tree.structure(output_shape),
    )


def _pruned(nodes: list[Node], outputs: list[Any]) -> tuple[list[Node], list[Any]]:
    """The nodes that outputs depend on, renumbered, and the outputs; the input always stays."""
    needed = {0, *(o.index for o in outputs if isinstance(o, Perturbed))}
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
    """Interprets a jaxpr on operands that are either constants or ``Perturbed`` references."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.nodes = [
            Node(
                0, "input", (), {}, lambda: None, tuple(shape), dtype, (), "", "the input", "input"
            )
        ]

    def run(self, jaxpr: Any, consts: Any, arguments: list[Any], outer: _Place) -> list[Any]:
        environment: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            if isinstance(atom, jex_core.Literal):
                return np.asarray(atom.val, dtype=atom.aval.dtype)
            return environment[atom]

        environment.update(zip(jaxpr.constvars, consts, strict=True))
        environment.update(zip(jaxpr.invars, arguments, strict=True))
        for eqn in _live(jaxpr):
            operands = [read(atom) for atom in eqn.invars]
            if any(isinstance(o, Perturbed) for o in operands):
                results = self._perturbed(eqn, operands, _place(eqn, outer))
            else:
                results = _evaluate(eqn, operands)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _perturbed(self, eqn: Any, operands: list[Any], place: _Place) -> list[Any]:
        name = eqn.primitive.name
        if name in _CALLS:
            composite = self._composite(eqn, operands, place)
            if composite is not None:
                return [composite]
            inner = next(eqn.params[key] for key in _CALL_JAXPRS if key in eqn.params)
            return self.run(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, place
            )
        evaluate = _evaluator(eqn)
        results = []
        for k, variable in enumerate(eqn.outvars):
            node = self._node(
                name, eqn, operands, place, lambda *v, k=k: evaluate(*v)[k], variable.aval
            )
            if eqn.primitive is composite_primitive:
                params = dict(eqn.params["items"])
                function = functools.partial(eqn.params["function"], **params)
                name = eqn.params["name"]
                node = dataclasses.replace(node, primitive=name, params=params, evaluate=function)
            node = dataclasses.replace(node, op=registry.resolve(node))
            if isinstance(node.op, registry.Expansion):
                return self.inline(node.op.expand(node), operands, place)
            # An op without an entry is an error only if an output depends on it, see `trace`.
            self.nodes.append(node)
            results.append(Perturbed(node.index))
        return results

    def inline(
        self, function: Callable[..., Any], operands: Sequence[Any], place: _Place
    ) -> list[Any]:
        """Traces a JAX function of the operands and appends its equations; its outputs, flat."""
        shapes = [
            jax.ShapeDtypeStruct(self.nodes[o.index].shape, self.nodes[o.index].dtype)
            if isinstance(o, Perturbed)
            else jax.ShapeDtypeStruct(np.shape(o), jnp.result_type(o))
            for o in operands
        ]
        closed = jax.make_jaxpr(function)(*shapes)
        return self.run(closed.jaxpr, closed.consts, list(operands), place)

    def _composite(self, eqn: Any, operands: list[Any], place: _Place) -> Perturbed | None:
        """A named activation, where the call is really JAX's own and the table covers it."""
        name = eqn.params.get("name")
        function = _COMPOSITES.get(name) if len(eqn.outvars) == 1 else None
        if function is None:
            return None
        reference = _reference(name, function, tuple(atom.aval for atom in eqn.invars))
        if reference is None or reference != _fingerprint(eqn.params["jaxpr"]):
            return None
        node = self._node(name, eqn, operands, place, function, eqn.outvars[0].aval)
        op = registry.resolve(node)
        if op is None:
            return None
        self.nodes.append(dataclasses.replace(node, op=op))
        return Perturbed(node.index)

    def _node(
        self,
        name: str,
        eqn: Any,
        operands: list[Any],
        place: _Place,
        evaluate: Callable[..., Array],
        aval: Any,
    ) -> Node:
        return Node(
            index=len(self.nodes),
            primitive=name,
            operands=tuple(operands),
            params=eqn.params,
            evaluate=evaluate,
            shape=tuple(aval.shape),
            dtype=aval.dtype,
            input_shapes=tuple(
                jax.ShapeDtypeStruct(self.nodes[o.index].shape, self.nodes[o.index].dtype)
                for o in operands
                if isinstance(o, Perturbed)
            ),
            scope=place.scope,
            location=place.location,
        )


def _live(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on, in order (an unused op must not raise)."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
    return live[::-1]


def _evaluator(eqn: Any) -> Callable[..., tuple[Array, ...]]:
    """The equation as a function of its operands' values.

    Bounds of matrix products need full float32: the default on GPU (TF32) and TPU (bf16) is wrong
    in the third digit, so the precision that the model was traced with is overridden.
    """
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        eqn = eqn.replace(params={**eqn.params, "precision": _full_precision()})
    if not any(_subjaxpr(value) is not None for value in eqn.params.values()):

        def bind(*values: Array) -> tuple[Array, ...]:
            result = eqn.primitive.bind(*values, **eqn.params)
            return tuple(result) if eqn.primitive.multiple_results else (result,)

        return bind

    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex_core.Literal)))
    closed = _one_equation(eqn, variables)

    def replay(*values: Array) -> tuple[Array, ...]:
        # A one-equation jaxpr keeps a custom_jvp's own derivative (grad relu(0) = 0).
        by_variable = {
            v: value
            for v, value in zip(eqn.invars, values, strict=True)
            if not isinstance(v, jex_core.Literal)
        }
        return tuple(jex_core.jaxpr_as_fun(closed)(*(by_variable[v] for v in variables)))

    return replay


def _full_precision() -> Any:
    return (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def _one_equation(eqn: Any, variables: list[Any]) -> Any:
    probe = jax.make_jaxpr(lambda: 0)()
    jaxpr = probe.jaxpr.replace(
        constvars=[], invars=variables, outvars=list(eqn.outvars), eqns=[eqn]
    )
    if hasattr(jaxpr, "debug_info"):
        jaxpr = jaxpr.replace(debug_info=jaxpr.debug_info.with_unknown_names())
    return jex_core.ClosedJaxpr(jaxpr, [])


def _evaluate(eqn: Any, operands: list[Any]) -> list[Any]:
    """Folds an equation on constants."""
    return list(_evaluator(eqn)(*operands))


def _subjaxpr(value: Any) -> Any | None:
    inner = getattr(value, "jaxpr", value)
    return inner if hasattr(inner, "eqns") and hasattr(inner, "invars") else None


def _fingerprint(jaxpr: Any) -> Any:
    """A comparable description of a jaxpr: primitives, wiring, literals and plain parameters."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    numbers: dict[Any, int] = {}

    def atom(a: Any) -> Any:
        if isinstance(a, jex_core.Literal):
            return ("literal", str(a.aval.dtype), a.aval.shape, np.asarray(a.val).tobytes())
        return numbers.setdefault(a, len(numbers))

    def parameter(value: Any) -> Any:
        if _subjaxpr(value) is not None:
            return _fingerprint(value)
        # Functions (custom derivative rules) have no stable text beyond their name.
        return getattr(value, "__name__", "function") if callable(value) else repr(value)

    invars = tuple(atom(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    equations = tuple(
        (
            eqn.primitive.name,
            tuple(atom(a) for a in eqn.invars),
            tuple((key, parameter(value)) for key, value in sorted(eqn.params.items())),
            tuple(atom(v) for v in eqn.outvars),
        )
        for eqn in jaxpr.eqns
    )
    return invars, equations, tuple(atom(v) for v in jaxpr.outvars)


def program(function: Callable[..., Any], *arguments: Any) -> tuple[Hashable, Any]:
    """What a function computes now, as a key that is equal for equal programs, and its outputs.

    Compiled code may only be used again for the very same program: a module's equality does not see
    what its code reads from elsewhere (a global, a mutable attribute), and stale code would give a
    wrong certificate.

    Args:
      function: a JAX function of pytrees.
      *arguments: arrays or shapes.

    Returns:
      The key, from the traced equations and the values of all constants; and the shapes of the
      function's outputs.
    """
    # A new function object, so that no trace of an earlier call is found for an equal module.
    closed, shapes = jax.make_jaxpr(lambda *values: function(*values), return_shape=True)(
        *arguments
    )
    digest = hashlib.sha256()
    pending = [closed]
    while pending:
        part = pending.pop()
        for constant in getattr(part, "consts", ()):
            if jnp.issubdtype(jnp.result_type(constant), jax.dtypes.extended):
                return object(), shapes  # no bytes to compare (random keys): equal to nothing
            array = np.asarray(constant)
            digest.update(f"{array.dtype} {array.shape};".encode())
            digest.update(array.tobytes())
        for eqn in getattr(part, "jaxpr", part).eqns:
            for value in eqn.params.values():
                branches = value if isinstance(value, (tuple, list)) else (value,)
                pending += [b for b in branches if _subjaxpr(b) is not None]
    return (str(closed), _fingerprint(closed), digest.hexdigest()), shapes


def _reference(name: str, function: Callable[..., Array], avals: tuple[Any, ...]) -> Any | None:
    """The fingerprint of JAX's composite on operands of these shapes, None if it cannot trace."""
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False))
        for a in avals
    ]
    try:
        outer = jax.make_jaxpr(function)(*shapes)
    except TypeError:  # another number of operands than the function takes
        return None
    pending = [outer.jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            if eqn.params.get("name") == name and "jaxpr" in eqn.params:
                return _fingerprint(eqn.params["jaxpr"])
            pending += [j for v in eqn.params.values() if (j := _subjaxpr(v)) is not None]
    return None


_FRAME = re.compile(r"^(jit|pjit|jvp|vmap|transpose|remat|checkpoint|rematted_computation)\b")


_UNKNOWN = "unknown source line"


class _Place(NamedTuple):
    """Where an equation stands: its Flax scope, and the line in the user's source."""

    scope: str
    location: str


def _place(eqn: Any, outer: _Place) -> _Place:
    """The place of an equation inside a call that stands at ``outer``."""
    stack = (*outer.scope.split("/"), *str(eqn.source_info.name_stack).split("/"))
    scope = "/".join(part for part in stack if part and not _FRAME.match(part))
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        # The innermost frame that is the user's; equations inside JAX's own calls may have none.
        if not frame.file_name.startswith((*_LIBRARIES, "<")):
            location = f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
            return _Place(scope, location)
    return _Place(scope, outer.location)


def _unsupported(node: Node) -> str:
    kinds = ", ".join(
        "perturbed" if isinstance(o, Perturbed) else f"constant {np.shape(o)}"
        for o in node.operands
    )
    where = f" in scope {node.scope}" if node.scope else ""
    return (
        f"no bounds are known for the op '{node.primitive}' ({kinds}) at {node.location}{where}; "
        "replace it by a supported op (boundjax.supported_ops() prints them) or add it with "
        "boundjax.ops.register(boundjax.ops.Scalar(name="
        f"'{node.primitive}', image=..., lines=..., lipschitz=...)), see CONTRIBUTING.md"
    )


def _label(nodes: list[Node]) -> tuple[Node, ...]:
    """Names nonlinear nodes by the layer before them, ``Dense_0/relu``, without the root scope."""
    scopes = [n.scope.split("/") for n in nodes if n.scope]
    root = scopes[0][0] if scopes and all(s[0] == scopes[0][0] for s in scopes) else None
    seen: dict[str, int] = {}
    labelled = []
    for node in nodes:
        if isinstance(node.op, registry.NONLINEAR):
            scope = _producing_scope(nodes, node).split("/")
            if root is not None and scope[:1] == [root]:
                scope = scope[1:]
            label = "/".join([*(p for p in scope if p), node.primitive])
            count = seen[label] = seen.get(label, -1) + 1
            node = dataclasses.replace(node, label=f"{label}_{count}" if count else label)
        labelled.append(node)
    return tuple(labelled)


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

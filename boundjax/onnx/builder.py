"""Processes the nodes of a file in order: folds constants in numpy, keeps other nodes as steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.onnx.file import Function, Graph, Operation
from boundjax.onnx.node import (
    DTYPES,
    STORED,
    Node,
    OnnxError,
    Reference,
    check_bytes,
    kind_of,
    quoted,
)
from boundjax.onnx.operators import OPERATORS, Operator
from boundjax.onnx.steps import Step, as_tuple

# A small file may describe loops in loops, or functions that call each other twice.
MAX_NODES = 20_000
MAX_DEPTH = 30
_SEPARATOR = "\0"

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """A value that depends on an input.

    Attributes:
      shape: its shape, with the batch dimension.
      kind: "f", "i" or "q" (both carried as float32) or "b".
    """

    shape: tuple[int, ...]
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class Missing:
    """A value that boundjax does not compute; using it is an error."""

    reason: str


Known = np.ndarray | Perturbed
# The functions that write a node in terms of others: they return the keys of its values.
Expansion = Callable[["Builder", Node, Sequence[str], "Scope"], Sequence[str]]


@dataclasses.dataclass(eq=False)
class Scope:
    """The names that a graph can see.

    Values have keys that are unique in the whole network, because the nodes of a loop compute new
    ones in every step.

    Attributes:
      outer: the scope of the graph around it; None for the network and for functions.
      keys: name -> key; empty for an operand of a function that is omitted.
      attributes: those of the function whose body it belongs to.
      depth: how many graphs and functions are around it.
    """

    outer: Scope | None = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    depth: int = 0
    keys: dict[str, str] = dataclasses.field(default_factory=dict)

    def find(self, name: str) -> str | None:
        """The key of a name, None if there is no such value."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.keys:
                return scope.keys[name]
            scope = scope.outer
        return None


class Builder:
    """Processes nodes in order; folds those without perturbed operands, keeps the rest as steps.

    A folded node that rounds is kept as a step, too. Loops, branches and functions are written out.

    Attributes:
      values: what is known of each value, by key.
      steps: those so far.
      rounded: the keys of the constants that steps compute again.
      decided: the keys of constant predicates and integers that rounding may have decided.
    """

    def __init__(
        self,
        functions: Mapping[tuple[str, str, str], Function],
        expansions: Mapping[str, Expansion],
        max_bytes: int,
    ) -> None:
        self.functions = functions
        self.expansions = expansions
        self.max_bytes = max_bytes
        self.values: dict[str, Known | Missing] = {}
        self.steps: list[Step] = []
        self.rounded: set[str] = set()
        self.decided: set[str] = set()
        self._folded = 0
        self._written_out = 0

    def fresh(self, name: str, value: Known | Missing) -> str:
        """Adds a value; returns its key, which begins with a name."""
        key, number = name, len(self.values)
        while not key or key in self.values:
            key, number = f"{name}{_SEPARATOR}{number}", number + 1
        self.values[key] = value
        return key

    def define(self, scope: Scope, name: str, key: str, what: str) -> None:
        """Gives a value a name in a scope."""
        if scope.find(name) is not None:
            raise OnnxError(f"{what}: gives the value {quoted(name)}, which exists already")
        scope.keys[name] = key

    def key(self, scope: Scope, name: str, what: str) -> str:
        """Looks up a name; `what` names its user in errors."""
        key = scope.find(name)
        if key is None:
            raise OnnxError(
                f"{what}: no earlier node, initializer or input gives the value {quoted(name)}"
            )
        return key

    def value(self, key: str, what: str) -> Known:
        """Looks up what is known of a value."""
        value = self.values[key]
        if isinstance(value, Missing):
            raise OnnxError(f"{what}: {value.reason}")
        return value

    def run(self, graph: Graph, scope: Scope, node: Node) -> list[str]:
        """Writes out a graph of a node in a scope; returns the keys of its outputs."""
        if scope.depth > MAX_DEPTH:
            raise node.error(f"graphs and functions are nested more than {MAX_DEPTH} deep")
        self._written_out += 1 + len(graph.constants) + len(graph.operations)
        if self._written_out > MAX_NODES:
            raise node.error(
                f"needs more than {MAX_NODES} nodes once loops and functions are written out, "
                "which is the limit"
            )
        for name, constant in graph.constants.items():
            self.define(scope, name, self.fresh(name, constant), f"initializer {quoted(name)}")
        for operation in graph.operations:
            self.add(operation, scope)
        return [self.key(scope, name, f"a graph of {node.title}") for name in graph.outputs]

    def add(self, operation: Operation, scope: Scope) -> None:
        """Adds the next node."""
        node = operation.node
        if any(isinstance(v, Reference) for v in node.attributes.values()):
            node = dataclasses.replace(node, attributes=dict(_referred(node, scope.attributes)))
        expansion = self.expansions.get(node.operator)
        call = self.functions.get(operation.function) if operation.function else None
        if call is None and expansion is None and node.operator not in OPERATORS:
            raise node.error("this operator is not supported; boundjax reads inference networks")
        keys = [self.key(scope, name, node.title) if name else "" for name in operation.operands]
        while keys and not keys[-1]:
            keys.pop()
        if call is not None:
            results = self._call(call, node, keys, scope)
        elif expansion is not None:
            results = expansion(self, node, keys, scope)
            self._refuse_unread(node)
        else:
            results = self.apply(node, keys)
        for k, name in enumerate(node.outputs):
            if name:
                missing = Missing(f"value {k + 1} of {node.title} is not supported")
                key = results[k] if k < len(results) else self.fresh(name, missing)
                self.define(scope, name, key, node.title)

    def emit(
        self,
        node: Node,
        operator: str | Operator,
        keys: Sequence[str],
        **attributes: Any,
    ) -> str:
        """Adds a node of one value that stands for a part of another one; returns its key."""
        name = operator if isinstance(operator, str) else node.operator
        part = dataclasses.replace(
            node,
            operator=name,
            attributes=attributes,
            outputs=(next(filter(None, node.outputs), node.name),),
            read=set(),
        )
        return self.apply(part, keys, operator if isinstance(operator, Operator) else None)[0]

    def apply(self, node: Node, keys: Sequence[str], operator: Operator | None = None) -> list[str]:
        """Adds a node of the table; returns the keys of its values."""
        operator = operator or OPERATORS[node.operator]
        fewest, most = operator.operands
        if not fewest <= len(keys) <= most or "" in keys[:fewest]:
            raise node.error(f"expected {fewest} to {most} operands, got {len(keys)}")
        operands = [self.value(key, node.title) if key else None for key in keys]
        # Steps are appended while values are computed, so their outputs need keys beforehand.
        outputs = [
            self.fresh(name, Missing(f"value {k + 1} of {node.title} is not supported"))
            for k, name in enumerate(node.outputs)
        ]
        named = dataclasses.replace(node, outputs=tuple(outputs))
        if operator.shape_only:
            (operand,) = operands
            assert operand is not None, "the one operand is required"
            results: Sequence[Known] = [operator.function(named, operand.shape)]
        else:
            results = self._apply(named, operator, keys, operands)
        self._refuse_unread(node)
        self.values.update(zip(outputs, results, strict=False))
        return outputs

    def _refuse_unread(self, node: Node) -> None:
        unread = set(node.attributes) - node.read
        if unread:
            raise node.error(f"attribute {quoted(min(unread))} is not supported")

    def _call(
        self, function: Function, node: Node, keys: Sequence[str], scope: Scope
    ) -> Sequence[str]:
        graph = function.graph
        unknown = set(node.attributes) - set(function.attributes)
        if len(keys) > len(graph.inputs) or len(node.outputs) > len(graph.outputs) or unknown:
            raise node.error(
                f"expected at most {len(graph.inputs)} operands, {len(graph.outputs)} values and "
                f"the attributes {', '.join(map(quoted, function.attributes)) or 'none'}"
            )
        inner = Scope(attributes={**function.attributes, **node.attributes}, depth=scope.depth + 1)
        padded = [*keys, *[""] * (len(graph.inputs) - len(keys))]
        inner.keys.update(zip(graph.inputs, padded, strict=True))
        return self.run(graph, inner, node)

    def _apply(
        self,
        node: Node,
        operator: Operator,
        keys: Sequence[str],
        operands: list[Known | None],
    ) -> Sequence[Known]:
        for k in operator.constant_operands:
            if k < len(operands):
                _check_constant(node, k, keys[k], operands[k])
        constants = [v for v in operands if not isinstance(v, Perturbed)]
        values = {
            k: v
            for k, v in enumerate(operands)
            if v is not None and k not in operator.constant_operands
        }
        rounded = {k for k, key in enumerate(keys) if key in self.rounded}
        rounded -= set(operator.constant_operands) - set(operator.numbers)
        if not values:
            # Operators whose operands are all constant check the size of their value themselves.
            results = self._fold(node, operator, constants)
            self._recompute(node, operator, keys, operands, rounded, results)
            return results
        kind = operator.kinds(node, [_kind(v) for v in values.values()])
        if len(constants) == len(operands):
            # Compute the shapes first, because a small file may describe a large value.
            call = _function_of(node, operator, operands, list(values))
            for shape in _shapes(node, call, values.values()):
                node.check_size(shape)
            results = self._fold(node, operator, constants)
            if kind == "q":  # float32 carries the computed ones, and so the others
                operands = [
                    node.carried(v) if k in values and isinstance(v, np.ndarray) else v
                    for k, v in enumerate(operands)
                ]
            self._recompute(node, operator, keys, operands, rounded, results)
            return results
        if kind == "i" and operator.constant_integers:
            raise node.error("divides integers that depend on the input, which is not supported")
        kinds = tuple(_kind(values[k]) if k in values else "" for k in range(len(operands)))
        node = dataclasses.replace(node, kinds=kinds)
        perturbed = {k: v for k, v in values.items() if isinstance(v, Perturbed)}
        # Constants beside perturbed values stay numpy arrays, here and when the step is run.
        carried = {k: node.carried(v) for k, v in values.items() if isinstance(v, np.ndarray)}
        operands = [carried.get(k, v) for k, v in enumerate(operands)]
        call = _function_of(node, operator, operands, list(perturbed))
        shapes = _shapes(node, call, perturbed.values())
        for shape in shapes:
            node.check_size(shape)
        self._step(node, operator, keys, operands, rounded, shapes)
        return [Perturbed(shape, kind) for shape in shapes]

    def _recompute(
        self,
        node: Node,
        operator: Operator,
        keys: Sequence[str],
        operands: Sequence[Known | None],
        rounded: set[int],
        results: Sequence[np.ndarray],
    ) -> None:
        """Appends the step of a folded node, if its results may be rounded."""
        carried = all(kind_of(result.dtype) in "fq" for result in results)
        if not carried and (rounded or not self.decided.isdisjoint(keys)):
            self.decided.update(node.outputs)
        if carried and (rounded or not operator.selects):
            self.rounded.update(node.outputs)
            shapes = [result.shape for result in results]
            self._step(node, operator, keys, operands, rounded, shapes, constant=True)

    def _step(
        self,
        node: Node,
        operator: Operator,
        keys: Sequence[str],
        operands: Sequence[Known | None],
        rounded: set[int],
        shapes: Sequence[tuple[int, ...]],
        constant: bool = False,
    ) -> None:
        """Appends a step; earlier ones compute the perturbed and the rounded operands."""
        values = (
            keys[k] if k in rounded or isinstance(v, Perturbed) else v
            for k, v in enumerate(operands)
        )
        self.steps.append(Step(node, operator, tuple(values), tuple(shapes), constant))

    def _fold(
        self, node: Node, operator: Operator, operands: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        def fold() -> list[np.ndarray]:
            with np.errstate(all="ignore"), jax.ensure_compile_time_eval():
                values = operator.function(dataclasses.replace(node, xp=np), *operands)
                return [np.asarray(v) for v in as_tuple(values)]

        results = _guarded(node, fold)
        for value in results:
            if value.dtype not in STORED.values():
                raise node.error(f"expected operands of one type, got a value of {value.dtype}")
            self._folded += value.nbytes
        check_bytes(f"{node.title}: all constants together", self._folded, self.max_bytes)
        return results


def _referred(node: Node, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The attributes of a node in a function; one that the function was not given is left out."""
    for name, value in node.attributes.items():
        if isinstance(value, Reference):
            if value.name not in attributes:
                raise node.error(f"attribute {quoted(name)}: expected to stand in a function")
            value = attributes[value.name]
            if value is None:
                continue
        yield name, value


def _check_constant(node: Node, k: int, key: str, operand: Known | None) -> None:
    """Refuses a perturbed operand, and a constant of a type that would be converted unseen."""
    what = f"operand {k + 1}, {quoted(key.split(_SEPARATOR)[0])},"
    if isinstance(operand, Perturbed):
        raise node.error(f"{what} depends on the network's input; only constants are supported")
    if operand is not None and operand.dtype not in map(np.dtype, DTYPES.values()):
        raise node.error(f"{what} is {operand.dtype}; expected float32, int32, int64 or bool")


def _function_of(
    node: Node,
    operator: Operator,
    operands: Sequence[Known | None],
    positions: Sequence[int],
) -> Callable[..., tuple[Array, ...]]:
    """A node's values as a function of its operands at these positions."""

    def call(*values: Array) -> tuple[Array, ...]:
        arguments: list[Any] = list(operands)
        for k, value in zip(positions, values, strict=True):
            arguments[k] = value
        return as_tuple(operator.function(node, *arguments))

    return call


def _kind(value: Known) -> str:
    return value.kind if isinstance(value, Perturbed) else kind_of(value.dtype)


def _shapes(
    node: Node, call: Callable[..., Any], operands: Iterable[Known]
) -> list[tuple[int, ...]]:
    """The shapes of a function's values at operands of these shapes and kinds."""
    structures = [
        jax.ShapeDtypeStruct(v.shape, jnp.bool_ if _kind(v) == "b" else jnp.float32)
        for v in operands
    ]
    return [tuple(s.shape) for s in _guarded(node, lambda: jax.eval_shape(call, *structures))]


def _guarded(node: Node, compute: Callable[[], _Result]) -> _Result:
    """Computes a result; errors of numpy and JAX about its operands become errors of the node."""
    try:
        return compute()
    except OnnxError:
        raise
    except Exception as error:  # whatever an untrusted file can provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise node.error(f"its operands do not fit: {reason}") from error

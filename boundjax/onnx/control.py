"""Branches and loops of ONNX, which are written out: conditions and trip counts must be constants.

What a loop computes in each step is processed as if the file had the nodes that often, so constants
of a step are folded, and bounds see no loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from boundjax.onnx.builder import Builder, Missing, Perturbed, Scope
from boundjax.onnx.file import Graph
from boundjax.onnx.node import Node


def if_(builder: Builder, node: Node, keys: Sequence[str], scope: Scope) -> Sequence[str]:
    """If: one of two graphs, chosen by a constant."""
    branches = [_graph(node, name) for name in ("then_branch", "else_branch")]
    if len(keys) != 1 or any(branch.inputs for branch in branches):
        raise node.error(f"expected one condition and graphs without inputs, got {len(keys)}")
    branch = branches[0 if _condition(builder, node, keys[0]) else 1]
    if len(branch.outputs) < len(node.outputs):
        raise node.error(f"expected {len(node.outputs)} outputs, got {len(branch.outputs)}")
    return builder.run(branch, _inner(scope), node)


def loop(builder: Builder, node: Node, keys: Sequence[str], scope: Scope) -> Sequence[str]:
    """Loop: a graph of a step number, a condition and carried values.

    Its outputs are the next condition, the carried values, and values that the loop stacks.
    """
    body = _graph(node, "body")
    count, condition, *carried = [*keys, "", ""][: max(2, len(keys))]
    stacked = len(body.outputs) - 1 - len(carried)
    if len(body.inputs) != 2 + len(carried) or stacked < 0:
        raise node.error(
            f"expected a body of {2 + len(carried)} inputs and at least {1 + len(carried)} "
            f"outputs, got {len(body.inputs)} and {len(body.outputs)}"
        )
    if "" in carried:
        raise node.error("expected all carried values, got one left out")
    most = _trip_count(builder, node, count) if count else None
    goes_on = _condition(builder, node, condition) if condition else True
    condition = condition or builder.fresh("condition", np.asarray(True))
    rows: list[list[str]] = [[] for _ in range(stacked)]
    step = 0
    while goes_on and (most is None or step < most):
        inner = _inner(scope)
        number = builder.fresh("step", np.asarray(step, np.int64))
        for name, key in zip(body.inputs, [number, condition, *carried], strict=True):
            builder.define(inner, name, key, node.title)
        condition, *values = builder.run(body, inner, node)
        goes_on = _condition(builder, node, condition)
        carried = values[: len(carried)]
        for row, key in zip(rows, values[len(carried) :], strict=True):
            row.append(key)
        step += 1
    return [*carried, *_stacks(builder, node, rows, [0] * stacked, len(carried))]


def scan(builder: Builder, node: Node, keys: Sequence[str], scope: Scope) -> Sequence[str]:
    """Scan: a graph of carried values and one slice of each scanned operand."""
    if node.opset < 9:
        raise node.error("only the form since operator set 9 is supported; export with a newer one")
    body = _graph(node, "body")
    scanned = node.integer("num_scan_inputs")
    states = len(keys) - scanned
    stacked = len(body.outputs) - states
    if scanned < 1 or states < 0 or len(body.inputs) != len(keys) or stacked < 0 or "" in keys:
        raise node.error(
            f"expected a body of {len(keys)} inputs and at least {states} outputs, "
            f"got {len(body.inputs)} and {len(body.outputs)}"
        )
    axes = _list(node, "scan_input_axes", scanned)
    backwards = _list(node, "scan_input_directions", scanned)
    stacked_axes = _list(node, "scan_output_axes", stacked)
    prepended = _list(node, "scan_output_directions", stacked)
    carried, operands = list(keys[:states]), keys[states:]
    shapes = [builder.value(key, node.title).shape for key in operands]
    axes = [node.axis(axis, len(shape)) for axis, shape in zip(axes, shapes, strict=True)]
    lengths = {shape[axis] for axis, shape in zip(axes, shapes, strict=True)}
    if len(lengths) != 1:
        raise node.error(f"expected scanned operands of one length, got {sorted(lengths)}")
    (length,) = lengths
    rows: list[list[str]] = [[] for _ in range(stacked)]
    for step in range(length):
        inner = _inner(scope)
        slices = []
        for key, axis, back in zip(operands, axes, backwards, strict=True):
            index = np.asarray(length - 1 - step if back else step, np.int64)
            position = builder.fresh("position", index)
            slices.append(builder.emit(node, "Gather", [key, position], axis=axis))
        for name, key in zip(body.inputs, [*carried, *slices], strict=True):
            builder.define(inner, name, key, node.title)
        values = builder.run(body, inner, node)
        carried = values[:states]
        for row, key in zip(rows, values[states:], strict=True):
            row.append(key)
    rows = [row[::-1] if back else row for row, back in zip(rows, prepended, strict=True)]
    return [*carried, *_stacks(builder, node, rows, stacked_axes, states)]


def _graph(node: Node, name: str) -> Graph:
    node.read.add(name)
    graph = node.attributes.get(name)
    if not isinstance(graph, Graph):
        raise node.error(f"attribute {name}: expected a graph, got none")
    return graph


def _list(node: Node, name: str, count: int) -> list[int]:
    values = node.integers(name) or (0,) * count
    if len(values) != count:
        raise node.error(f"attribute {name}: expected {count} integers, got {len(values)}")
    return list(values)


def _inner(scope: Scope) -> Scope:
    return Scope(scope, scope.attributes, scope.depth + 1)


def _single(builder: Builder, node: Node, key: str, what: str) -> Any:
    """A constant of one element."""
    value = builder.value(key, node.title)
    if isinstance(value, Perturbed):
        raise node.error(
            f"its {what} depends on the network's input; only constant ones are supported"
        )
    if key in builder.rounded or key in builder.decided:
        raise node.error(f"its {what} depends on rounding; expected an exact constant")
    return node.to_number(value)


def _condition(builder: Builder, node: Node, key: str) -> bool:
    value = _single(builder, node, key, "condition") if key else None
    if not isinstance(value, np.bool_):
        raise node.error(f"expected a condition of bool, got {getattr(value, 'dtype', 'none')}")
    return bool(value)


def _trip_count(builder: Builder, node: Node, key: str) -> int:
    value = _single(builder, node, key, "trip count")
    if not isinstance(value, np.integer):
        raise node.error(f"expected an integer as trip count, got {value.dtype}")
    return int(value)


def _stacks(
    builder: Builder,
    node: Node,
    rows: Sequence[Sequence[str]],
    axes: Sequence[int],
    first: int,
) -> list[str]:
    """What the steps of a loop gave, along new axes: its outputs from number `first` on."""
    keys = []
    for k, (row, axis) in enumerate(zip(rows, axes, strict=True), first):
        if row:
            wide = [builder.emit(node, "Unsqueeze", [key], axes=(axis,)) for key in row]
            keys.append(builder.emit(node, "Concat", wide, axis=axis))
            continue
        reason = f"value {k + 1} of {node.title}, a loop of no steps, has no known shape"
        keys.append(builder.fresh(node.name, Missing(reason)))
    return keys

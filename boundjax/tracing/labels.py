"""Readable labels for layers and nonlinear nodes."""

from __future__ import annotations

import dataclasses

from boundjax.ir.families import Weighted
from boundjax.ir.node import Node


def label(nodes: list[Node]) -> tuple[Node, ...]:
    """Labels layers (`Dense_0`) and nonlinear nodes (`Dense_0/relu`), without the root scope.

    A nonlinear node's label starts with that of the layer before it; the label of a layer outside
    any scope is its primitive.
    """
    scopes = [_modules(n.scope) for n in nodes if n.scope]
    root = scopes[0][0] if scopes and all(s[0] == scopes[0][0] for s in scopes) else None
    seen: dict[str, int] = {}
    labelled = []
    for node in nodes:
        nonlinear = node.is_nonlinear
        if nonlinear or (isinstance(node.op, Weighted) and not node.op.diagonal):
            scope = _modules(_producing_scope(nodes, node) if nonlinear else node.scope)
            if root is not None and scope[:1] == [root]:
                scope = scope[1:]
            name = "/".join([*(p for p in scope if p), *([node.primitive] if nonlinear else [])])
            name = name or node.primitive
            count = seen[name] = seen.get(name, -1) + 1
            node = dataclasses.replace(node, label=f"{name}_{count}" if count else name)
        labelled.append(node)
    return tuple(labelled)


def _modules(scope: str) -> list[str]:
    """The modules of a scope, in which Flax writes methods but `__call__` as `Module.method`."""
    names = [part.split(".")[0] for part in scope.split("/")]
    return [name for k, name in enumerate(names) if k == 0 or name != names[k - 1]]


def _producing_scope(nodes: list[Node], node: Node) -> str:
    """The scope of the nearest weighted op that feeds `node`, or the node's scope without one."""
    current = node
    while current.inputs:
        current = nodes[current.inputs[0]]
        if isinstance(current.op, Weighted) and current.scope:
            return current.scope
        if current.is_nonlinear:
            break
    return node.scope

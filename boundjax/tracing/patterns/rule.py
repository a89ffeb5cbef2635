"""The result of a pattern, and the moves of elements that it has to repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from boundjax.ir import table
from boundjax.ir.node import Node


class Rewrite(NamedTuple):
    """What to trace in place of a node: a JAX function of these operands."""

    function: Callable[..., Any]
    operands: Sequence[Any]


def replayed(path: Sequence[Node], value: Any) -> Any:
    """Moves a value as the nodes of a path move their operands."""
    for node in path:
        moves = table.moves_only(node.primitive) or node.primitive == "slice"
        value = node.apply(value) if moves else jnp.broadcast_to(value, node.shape)
    return value

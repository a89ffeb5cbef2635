"""What a pattern gives, and the moves of elements that it has to repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from boundjax.ir.node import Node
from boundjax.tracing.matching import MOVES


class Rewrite(NamedTuple):
    """What is traced instead: a JAX function of these operands."""

    function: Callable[..., Any]
    operands: Sequence[Any]


def replayed(path: Sequence[Node], value: Any) -> Any:
    """A value moved as the nodes of a path move their operands."""
    for node in path:
        moves = node.primitive in MOVES
        value = node.apply(value) if moves else jnp.broadcast_to(value, node.shape)
    return value

"""What is left of control flow and of indexing once a function is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.families import Loop, Structural, Weighted
from boundjax.ir.node import Node
from boundjax.ir.table import register


def _constant_places(node: Node) -> bool:
    """Whether a scatter's indices are constant."""
    return not node.perturbed[1]


def _operand_only(node: Node) -> bool:
    return node.perturbed == (True, False, False)


def _subtracted_signs(node: Node) -> tuple[int, ...]:
    signs = zip((1, 0, -1), node.perturbed, strict=True)
    return tuple(sign for sign, perturbed in signs if perturbed)


def _set_transpose(node: Node, rows: Array) -> tuple[Array, ...]:
    """Coefficients through ``x.at[indices].set(updates)``, as those of a gather.

    JAX transposes a scatter only where the caller vouches for distinct indices. Every element of
    the result is one of the operand's or of the updates'; which one, the scatter itself tells when
    it moves their numbers, so that repeated and out-of-range indices do as they do in the function.
    """
    _, indices, _ = node.operands
    shapes = iter(node.input_shapes)
    operand_shape, updates_shape = (
        next(shapes).shape if node.perturbed[k] else np.shape(node.operands[k]) for k in (0, 2)
    )
    first, second = int(np.prod(operand_shape)), int(np.prod(updates_shape))
    numbers = jnp.arange(first + second, dtype=jnp.int32)
    source = node.evaluate(
        numbers[:first].reshape(operand_shape), indices, numbers[first:].reshape(updates_shape)
    )

    def gathered(*perturbed: Array) -> Array:
        values = iter(perturbed)
        parts = [
            next(values).reshape(-1) if p else jnp.zeros((size,), rows.dtype)
            for p, size in ((node.perturbed[0], first), (node.perturbed[2], second))
        ]
        return jnp.concatenate(parts)[source]

    return tuple(jax.vmap(jax.linear_transpose(gathered, *node.input_shapes))(rows))


register(
    Structural(
        name="scatter",
        note="x.at[...].set with constant indices",
        accepts=_constant_places,
        transpose=_set_transpose,
    )
)
register(
    Structural(
        name="scatter-add",
        note="x.at[...].add with constant indices",
        accepts=_constant_places,
    )
)
register(
    Structural(
        name="scatter-sub",
        note="x.at[...].subtract with constant indices",
        accepts=_constant_places,
        sign=_subtracted_signs,
    )
)
register(
    Weighted(
        name="scatter-mul",
        note="x.at[...].multiply by constants, with constant indices",
        accepts=_operand_only,
        diagonal=True,
    )
)
register(
    Loop(
        name="scan",
        note="longer than the unroll limit: interval bounds, step by step",
        accepts=lambda node: "loop" in node.params,
    )
)

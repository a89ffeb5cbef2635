"""Control flow and indexed updates that remain once a function is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.families import Loop, Structural, Weighted, one
from boundjax.ir.node import Node, Perturbed
from boundjax.ir.table import register


def _constant_indices(node: Node) -> bool:
    return not node.perturbed[1]


def _operand_only(node: Node) -> bool:
    return node.perturbed == (True, False, False)


def _subtracted_signs(node: Node) -> tuple[int, ...]:
    signs = zip((1, 0, -1), node.perturbed, strict=True)
    return tuple(sign for sign, perturbed in signs if perturbed)


def _set_transpose(node: Node, rows: Array) -> tuple[Array, ...]:
    """Pulls coefficients back through `x.at[indices].set(updates)`, written as a gather.

    JAX transposes a scatter only if the caller declares its indices unique. Every element of the
    result is an element of the operand or of the updates. To learn which, the scatter is applied to
    their numbers, so that repeated and out-of-range indices act as they do in the function.
    """
    operand, indices, updates = node.operands
    shapes = iter(node.input_shapes)
    operand_shape, updates_shape = (
        next(shapes).shape if isinstance(o, Perturbed) else np.shape(o) for o in (operand, updates)
    )
    size, updates_size = int(np.prod(operand_shape)), int(np.prod(updates_shape))
    numbers = jnp.arange(size + updates_size, dtype=jnp.int32)
    source = node.evaluate(
        numbers[:size].reshape(operand_shape), indices, numbers[size:].reshape(updates_shape)
    )

    def gathered(*perturbed: Array) -> Array:
        values = iter(perturbed)
        parts = [
            next(values).reshape(-1) if isinstance(o, Perturbed) else jnp.zeros((n,), rows.dtype)
            for o, n in ((operand, size), (updates, updates_size))
        ]
        return jnp.concatenate(parts)[source]

    return tuple(jax.vmap(jax.linear_transpose(gathered, *node.input_shapes))(rows))


register(
    Structural(
        name="scatter",
        note="x.at[...].set with constant indices",
        accepts=_constant_indices,
        transpose=_set_transpose,
        terms=one,
        reach=one,
    )
)
register(
    Structural(
        name="scatter-add",
        note="x.at[...].add with constant indices",
        accepts=_constant_indices,
    )
)
register(
    Structural(
        name="scatter-sub",
        note="x.at[...].subtract with constant indices",
        accepts=_constant_indices,
        sign=_subtracted_signs,
    )
)
register(
    Weighted(
        name="scatter-mul",
        note="x.at[...].multiply by constants, with constant indices",
        accepts=_operand_only,
        diagonal=True,
        change=None,
    )
)
register(
    Loop(
        name="scan",
        note="longer than the unroll limit: interval bounds, step by step",
        accepts=lambda node: "loop" in node.params,
    )
)

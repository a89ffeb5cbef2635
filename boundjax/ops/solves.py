"""Linear systems with a constant matrix and a perturbed right-hand side: products with the inverse.

The inverse is computed while tracing, from the columns of the identity, so that the bounds of a
solution are those of a linear layer: exact for one solve.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from boundjax.ir.families import Expansion, Refused
from boundjax.ir.node import Node
from boundjax.ir.table import register

_MATRIX = (
    "it factors or inverts a matrix that depends on the perturbed input (jnp.linalg.solve, inv, "
    "det, ...), and only right-hand sides may; write the formula of a small matrix out, or move "
    "this op out of the bounded function"
)


def _only_right_hand_side(node: Node) -> bool:
    *matrix, right = node.perturbed
    return right and not any(matrix) and jnp.issubdtype(node.dtype, jnp.floating)


def _triangular(node: Node) -> Callable[[Array, Array], Array]:
    """`A^-1 B` or `B A^-1` for `[..., n, n]` and `[..., n, k]` or `[..., k, n]`."""

    def function(matrix: Array, right: Array) -> Array:
        identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
        inverse = node.evaluate(matrix, identity)
        return inverse @ right if node.params["left_side"] else right @ inverse

    return function


def _columns(node: Node) -> Callable[..., Array]:
    """A system `[..., n, n]` of any form, solved for every column of `[..., n, k]`."""

    def function(*operands: Array) -> Array:
        *matrix, right = operands
        size = right.shape[-2]
        identity = jnp.broadcast_to(
            jnp.eye(size, dtype=right.dtype), (*right.shape[:-2], size, size)
        )
        return node.evaluate(*matrix, identity) @ right

    return function


register(
    Expansion(
        name="triangular_solve",
        note="constant matrix; jnp.linalg.solve, cho_solve",
        accepts=_only_right_hand_side,
        expand=_triangular,
    )
)
register(
    Expansion(
        name="tridiagonal_solve",
        note="constant matrix",
        accepts=_only_right_hand_side,
        expand=_columns,
    )
)
for _name in (
    *(
        "cholesky",
        "eig",
        "eigh",
        "hessenberg",
        "householder_product",
        "lu",
        "lu_pivots_to_permutation",
    ),
    *("qr", "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve"),
):
    register(Refused(name=_name, reason=_MATRIX))

"""Ops without bounds: the reason, and what to write instead."""

from __future__ import annotations

from boundjax.ir.families import Refused
from boundjax.ir.node import Node
from boundjax.ir.table import register

for _name in ("sort", "top_k"):
    register(
        Refused(
            name=_name,
            reason="only sorting by one perturbed key has bounds; sort by one key, or move this op "
            "out of the bounded function",
        )
    )
register(
    Refused(
        name="approx_top_k",
        reason="an approximate order has no bounds; use jax.lax.top_k",
    )
)


def _indexed(name: str, operands: slice) -> Refused:
    """Refuses an op if one of these operands, its indices, is perturbed."""

    def accepts(node: Node) -> bool:
        return any(node.perturbed[operands])

    return Refused(
        name=name,
        accepts=accepts,
        reason="its index depends on the perturbed input; index by a constant, or choose elements "
        "with jnp.where",
    )


for _name in ("", "-add", "-sub", "-mul", "-min", "-max"):
    register(_indexed(f"scatter{_name}", slice(1, 2)))


def _refuse(names: str, reason: str) -> None:
    for name in names.split():
        register(Refused(name=name, reason=reason))


_refuse(
    "cholesky cholesky_update custom_linear_solve eig eigh geqp3 geqrf hessenberg "
    "householder_product lu lu_pivots_to_permutation ormqr qr schur svd triangular_solve "
    "tridiagonal tridiagonal_solve",
    "it factors or inverts a matrix that depends on the perturbed input (jnp.linalg.solve, inv, "
    "det, ...), and only right-hand sides may; write the formula of a small matrix out, or move "
    "this op out of the bounded function",
)
_refuse(
    "pure_callback io_callback ffi_call",
    "nobody knows what code outside of JAX computes of a perturbed value; write it in JAX, or move "
    "it out of the bounded function",
)
_refuse(
    "random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap "
    "random_wrap rng_bit_generator rng_uniform threefry2x32",
    "its random key depends on the perturbed input; make the key outside, so that the draw is a "
    "constant",
)
_refuse(
    "all_gather all_gather_invariant all_to_all pbroadcast pmax pmin ppermute psum psum_invariant "
    "ragged_all_to_all reduce_scatter",
    "it combines values over a named axis, and bounds are of one example at a time; leave "
    "axis_name= out (BatchNorm: use_running_average=True), or use jnp.sum and its like over an "
    "axis of the array itself",
)

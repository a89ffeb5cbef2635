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

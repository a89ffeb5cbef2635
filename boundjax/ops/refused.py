"""Ops without bounds: the reason, and what to write instead."""

from __future__ import annotations

from boundjax.ir.families import Refused
from boundjax.ir.node import Node
from boundjax.ir.table import register

for _name in ("sort", "argsort", "argmax", "argmin", "top_k", "approx_top_k"):
    register(
        Refused(
            name=_name,
            reason="order statistics of perturbed values are not supported, only max and min are; "
            "use jnp.max or jnp.min, or move this op out of the bounded function",
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


register(_indexed("gather", slice(1, 2)))
register(_indexed("dynamic_slice", slice(1, None)))
register(_indexed("dynamic_update_slice", slice(2, None)))
for _name in ("", "-add", "-sub", "-mul", "-min", "-max"):
    register(_indexed(f"scatter{_name}", slice(1, 2)))

"""Error messages for ops without bounds: which op, where, why, and what to do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from boundjax.ir import table
from boundjax.ir.node import Node, Perturbed


def unsupported(node: Node) -> str:
    """The message of an `UnsupportedOpError` for a node."""
    where = f" in scope {node.scope}" if node.scope else ""
    reason = advice(node)
    if reason is not None:
        return f"no bounds for the op '{node.primitive}' at {node.location}{where}: {reason}"
    kinds = ", ".join(
        "perturbed" if isinstance(o, Perturbed) else f"constant {np.shape(o)}"
        for o in node.operands
    )
    return (
        f"no bounds are known for the op '{node.primitive}' ({kinds}) at {node.location}{where}; "
        "replace it by a supported op (boundjax.supported_ops() prints them) or add it with "
        "boundjax.ops.register(boundjax.ops.Scalar(name="
        f"'{node.primitive}', image=..., lines=..., lipschitz=...)), see CONTRIBUTING.md"
    )


def is_half_precision(node: Node) -> bool:
    """Whether a node's value has fewer bits than float32."""
    return jnp.issubdtype(node.dtype, jnp.floating) and node.dtype.itemsize < 4


def is_index(node: Node) -> bool:
    """Whether a node makes integers from the input, or computes with such integers."""
    if "advice" in node.params or table.is_refused(node.primitive):
        return False
    dtypes = (node.dtype, *(shape.dtype for shape in node.input_shapes))
    return any(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes)


def advice(node: Node) -> str | None:
    """Why an op has no bounds and what to do about it; None if nothing specific is known."""
    if "advice" in node.params:
        return node.params["advice"]
    if is_half_precision(node):
        return (
            f"it computes in {node.dtype}, and only float32 and float64 have bounds; build the "
            "module with dtype=jnp.float32 (its weights may stay as they are) or cast to float32"
        )
    reason = table.refusal(node)
    if reason is not None:
        return reason
    if is_index(node):
        return (
            "it makes integers of a perturbed value; counts and indices that depend on the "
            "perturbed input have no bounds"
        )
    return None

"""Error messages for ops without bounds: which op, where, why, and what to do."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.ir import table
from boundjax.ir.node import Node, Perturbed
from boundjax.ir.table import UnsupportedOpError
from boundjax.tracing import jaxprs


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says in one line what a function must not do while it is traced; JAX takes several.

    Raises:
      UnsupportedOpError: in place of JAX's errors about named axes, values that Python needs, and
        indices that are no integers.
    """
    try:
        yield
    except (NameError, TypeError, IndexError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        frames = reversed(traceback.extract_tb(error.__traceback__))
        # The user's innermost frame, as for an op.
        where = next((f for f in frames if not jaxprs.is_library(f.filename)), None)
        at = "" if where is None else f" at {where.filename}:{where.lineno} ({where.name})"
        raise UnsupportedOpError(f"the function cannot be bounded{at}: {reason}") from error


def _reason(error: Exception) -> str | None:
    """What an error of JAX means here, and what to do; None for any other error."""
    axis = re.search(r"unbound axis name: (\S+?)\.? ", f"{error} ")
    if isinstance(error, NameError) and axis is not None:
        return (
            f"it combines values over the axis {axis[1]!r}, which no vmap or shard_map names here, "
            "because bounds are of one example at a time; leave axis_name= out, or bound the "
            "module in eval mode (BatchNorm: use_running_average=True)"
        )
    if isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        return (
            "it selects elements by a condition that is not known while tracing, so their number "
            "is unknown; use jnp.where(condition, x, 0.0), which keeps the shape"
        )
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return (
            "Python's if, while, and, or, not decide on a value that is not known while tracing; "
            "use jnp.where or jax.lax.cond on the predicate"
        )
    numbers = (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.TracerArrayConversionError,
    )
    if isinstance(error, numbers) or "of concrete values" in str(error):
        return (
            "it turns a value that is not known while tracing into a Python number or a NumPy "
            "array (float(), int(), range(), numpy, a shape); use jax.numpy instead, and constants "
            "for shapes"
        )
    if isinstance(error, TypeError) and "Indexer must have integer" in str(error):
        return (
            "it takes the input as an index, and an input set holds floating-point numbers (a set "
            "of integers is one of float32); bound the function of the vectors that are looked up"
        )
    return None


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


def is_complex(node: Node) -> bool:
    """Whether a node computes with complex numbers."""
    dtypes = (node.dtype, *(shape.dtype for shape in node.input_shapes))
    return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


def says_little(node: Node) -> bool:
    """Whether a later unsupported op explains more: casts to integers and to complex numbers."""
    return is_index(node) or (is_complex(node) and node.primitive == "convert_element_type")


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
    if is_complex(node):
        return (
            "it computes with complex numbers of a perturbed value, and only real ones have "
            "bounds; write a Fourier transform as two products, with F = jnp.fft.fft(jnp.eye(n)): "
            "x @ F.real and x @ F.imag, and an absolute value as the root of the sum of squares"
        )
    if is_index(node):
        return (
            "it makes integers of a perturbed value; counts and indices that depend on the "
            "perturbed input have no bounds"
        )
    return None

"""Casts to integers, which may depend on the input and are then carried as float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.onnx.node import Node, Value
from boundjax.ops import integers


def require_in_range(node: Node, x: np.ndarray, dtype: np.dtype) -> None:
    """Raises OnnxError for a number that the integer type cannot hold, where runtimes differ."""
    least, end = float(np.iinfo(dtype).min), -float(np.iinfo(dtype).min)
    outside = ~((x >= least) & (x < end))
    if outside.any():
        raise node.error(f"expected numbers that {dtype} can hold, got {x[outside].flat[0]}")


def truncated(x: Value, dtype: np.dtype) -> Value:
    """Rounds `x` towards 0; its bounds are NaN where the integer type cannot hold it."""
    x = integers.held_by(x, dtype)
    # This form is monotone; jnp.trunc selects on the sign of x, which loosens bounds.
    return jnp.floor(jax.nn.relu(x)) - jnp.floor(jax.nn.relu(-x))

"""Properties of small functions."""

from jax import nn
from jax import numpy as jnp

from boundjax import vnnlib


def box(ends, outputs, unsafe):
    """A property: bounds of the inputs, the number of outputs, a formula."""
    text = "".join(f"(declare-const X_{i} Real)" for i in range(len(ends)))
    text += "".join(f"(declare-const Y_{i} Real)" for i in range(outputs))
    for i, (lower, upper) in enumerate(ends):
        text += f"(assert (>= X_{i} {lower}))(assert (<= X_{i} {upper}))"
    return vnnlib.parse(f"{text}(assert {unsafe})")


def hat(x):
    """``[2] -> [2]``: ``|x_0| + |x_1|`` and ``max(x_0, x_1)``."""
    return jnp.stack([jnp.sum(nn.relu(x) + nn.relu(-x)), x[0] + nn.relu(x[1] - x[0])])

"""The precision of the products in bounds: full, unless a training step lowers it on purpose.

Accelerators multiply faster with shorter factors: TF32 on a GPU, bfloat16 on a TPU. Bounds from
such products are wrong in the third digit and certify nothing, but gradients of a loss tolerate it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

from jax import lax

Precision = Literal["highest", "high", "default"]

_PRECISIONS: dict[Precision, lax.Precision] = {
    "highest": lax.Precision.HIGHEST,
    "high": lax.Precision.HIGH,
    "default": lax.Precision.DEFAULT,
}
_CURRENT = contextvars.ContextVar("boundjax_precision", default=lax.Precision.HIGHEST)


@contextlib.contextmanager
def training_precision(name: Precision) -> Iterator[None]:
    """Sets the precision of matrix products and convolutions of bounds that are traced inside.

    Use it for training losses. Bounds that are computed inside are no certificate; `certify` and
    `boundjax.verify` run at full precision wherever they are called. On a CPU all precisions are
    the same.

    Args:
      name: `"highest"` is full float32; `"high"` is TF32 on a GPU and three bfloat16 passes on a
        TPU; `"default"` is TF32 on a GPU and one bfloat16 pass on a TPU (`jax.lax.Precision`).

    Raises:
      ValueError: for another name.
    """
    if name not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, got {name!r}")
    token = _CURRENT.set(_PRECISIONS[name])
    try:
        yield
    finally:
        _CURRENT.reset(token)


def of_products() -> lax.Precision:
    """The precision of the products that are being traced."""
    return _CURRENT.get()

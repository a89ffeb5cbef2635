"""The precision of the products in bounds: full, unless a training step lowers it on purpose.

Accelerators multiply faster with shorter factors: TF32 on a GPU, bfloat16 on a TPU. Bounds from
them are wrong in the third digit, so they certify nothing; gradients of a loss do not mind.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from jax import lax

_NAMES = {
    "highest": lax.Precision.HIGHEST,
    "high": lax.Precision.HIGH,
    "default": lax.Precision.DEFAULT,
}
_CURRENT = contextvars.ContextVar("boundjax_precision", default=lax.Precision.HIGHEST)


@contextlib.contextmanager
def training_precision(name: str) -> Iterator[None]:
    """Matrix products and convolutions of bounds that are traced inside run at this precision.

    For losses that are trained on. What is computed inside is no certificate; ``certify`` and
    ``boundjax.verify`` run at full precision wherever they are called. On a CPU all of them are the
    same.

    Args:
      name: ``"highest"``, full float32; ``"high"``, TF32 on a GPU and three bfloat16 passes on a
        TPU; ``"default"``, TF32 on a GPU and one bfloat16 pass on a TPU (``jax.lax.Precision``).

    Raises:
      ValueError: for another name.
    """
    if name not in _NAMES:
        raise ValueError(f"precision must be one of {', '.join(_NAMES)}, got {name!r}")
    token = _CURRENT.set(_NAMES[name])
    try:
        yield
    finally:
        _CURRENT.reset(token)


def of_products() -> lax.Precision:
    """The precision of a product that is traced now."""
    return _CURRENT.get()

"""Decodes JPEG files with Pillow."""

from __future__ import annotations

import io

import numpy as np

from experiments.data.files import reason
from experiments.settings.errors import ExperimentError


def need_pillow(what: str) -> None:
    """Raises an ExperimentError if Pillow, which reading `what` needs, is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ExperimentError(
            f"reading {what} needs Pillow ({error}); install it with: pip install pillow"
        ) from error


def decode(content: bytes, size: int, source: str) -> np.ndarray:
    """Decodes the JPEG file `content` to uint8 `[size, size, 3]`; grey images get equal channels.

    Raises:
      ExperimentError: naming `source`, if it is not a JPEG file, is damaged or has another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            # Check before decoding any pixel: a damaged header may declare gigabytes.
            if image.size != (size, size) or image.mode not in ("RGB", "L"):
                raise ValueError(f"it has {image.size[0]}x{image.size[1]} pixels, {image.mode}")
            return np.asarray(image.convert("RGB") if image.mode == "L" else image)
    except Exception as error:  # Pillow raises many types for damaged files
        raise ExperimentError(
            f"{source}: is not a JPEG of {size}x{size} pixels ({reason(error)}); fetch it again"
        ) from error

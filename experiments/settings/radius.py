"""Reads radii from a command line, and rejects those that are not in units of pixels."""

from __future__ import annotations

import fractions
import math
from collections.abc import Sequence

from experiments.settings.config import NORMS
from experiments.settings.errors import ExperimentError


def parse(text: str, name: str = "--eps") -> float:
    """Converts a text like `0.0314` or `8/255` to a number.

    Raises:
      ExperimentError: for any other text; `name` is the flag that the message names.
    """
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ExperimentError(f"{name} must be a number like 0.1 or 8/255, got {text!r}") from error


def check(name: str, eps: float, norm: str, shape: Sequence[int], title: str) -> None:
    """Rejects a radius at which nothing can be certified, as a radius in units of 1/255 often is.

    The grey image in the middle of the pixel range lies in every ball whose radius is half the
    diameter of that range.

    Args:
      name: name of the flag or key.
      eps: the radius.
      norm: a key of `experiments.settings.config.NORMS`.
      shape: shape of an image, `[H, W, channels]`.
      title: title of the data set.

    Raises:
      ExperimentError: for a radius that is negative, not finite or too large.
    """
    half = 0.5 if norm == "inf" else 0.5 * math.sqrt(math.prod(shape))
    if 0 <= eps < half:
        return
    hint = f"; in units of 1/255 write {eps:g}/255" if max(half, 1) <= eps < math.inf else ""
    raise ExperimentError(
        f"{name} must be in [0, {half:.4g}), below half the {NORMS[norm].label} diameter of images "
        f"of {title} with pixels in [0, 1], got {eps:g}{hint}"
    )

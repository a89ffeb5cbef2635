"""Where to cut boxes in two."""

from __future__ import annotations

import numpy as np

_MAX_ASPECT = 8.0  # of widths, relative to the box that is split


def halve(
    lower: np.ndarray, upper: np.ndarray, influence: np.ndarray, width: np.ndarray
) -> tuple[tuple[tuple[np.ndarray, np.ndarray], ...], np.ndarray]:
    """Cuts boxes ``[N, n]`` in two, where the inputs that matter are widest.

    Args:
      lower, upper: the boxes.
      influence: of each input on what is to be proved.
      width: of the boxes that these come from; 0 for fixed inputs.

    Returns:
      The two halves of the boxes that can be cut, and which cannot ``[N]``.
    """
    middle = 0.5 * lower + 0.5 * upper
    can_cut = (lower < middle) & (middle < upper)
    stuck = ~can_cut.any(axis=1)
    influence = np.where(np.isfinite(influence), influence, 0.0)
    relative = (upper - lower) / np.where(width > 0, width, np.inf)
    # Coefficients say nothing of inputs whose relaxation has slope 0; every input is cut at last.
    widest = np.where(can_cut, relative, 0.0).max(axis=1, keepdims=True)
    can_cut &= relative * _MAX_ASPECT >= widest
    score = _normalized(influence) + 0.1 * _normalized(relative)
    axis = np.where(can_cut, score, -1.0).argmax(axis=1)[~stuck]
    lower, upper, middle = lower[~stuck], upper[~stuck], middle[~stuck]
    index = np.arange(len(axis))
    first_upper, second_lower = upper.copy(), lower.copy()
    first_upper[index, axis] = middle[index, axis]
    second_lower[index, axis] = middle[index, axis]
    return ((lower, first_upper), (second_lower, upper)), stuck


def _normalized(values: np.ndarray) -> np.ndarray:
    largest = values.max(axis=1, keepdims=True)
    return values / np.where(largest > 0, largest, 1.0)

"""Cuts boxes in two along the inputs that matter most."""

from __future__ import annotations

import numpy as np

Box = tuple[np.ndarray, np.ndarray]  # lower and upper ends
Halves = tuple[Box, Box]
_MAX_ASPECT = 8.0  # largest ratio of relative widths at which the narrower input may be cut


def halve(
    lower: np.ndarray, upper: np.ndarray, influence: np.ndarray, width: np.ndarray
) -> tuple[Halves, np.ndarray]:
    """Cuts boxes `[N, n]` in two along inputs that are wide and matter.

    Args:
      lower, upper: the boxes.
      influence: the influence of each input on the rows to be proved.
      width: widths of the boxes that these are parts of; 0 for fixed inputs.

    Returns:
      The two halves of the boxes that can be cut, and a mask `[N]` of those that cannot.
    """
    middle = 0.5 * lower + 0.5 * upper
    can_cut = (lower < middle) & (middle < upper)
    stuck = np.logical_not(np.any(can_cut, axis=1))
    influence = np.where(np.isfinite(influence), influence, 0.0)
    relative = (upper - lower) / np.where(width > 0, width, np.inf)
    # Coefficients show no influence of an input whose relaxation has slope 0, but it must be cut
    # eventually, so inputs far narrower than the widest are excluded.
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

"""Checks that a model is a function of one example, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Two batches through the same compiled program: the rows that stay differ by nothing, or by the
# order in which a GPU adds. Of the column's logits.
_SAME_PROGRAM = 1e-5
# Another batch size is another program, which rounds differently. What mixes examples or draws
# random numbers changes far more.
_OTHER_PROGRAM = 1e-3


def others(x: np.ndarray) -> np.ndarray:
    """Other examples in the range of ``x``: its negative images with half the contrast.

    So means change, and the largest and smallest values of a batch, too. Where all is equal there
    is no contrast; it is ``x + 1`` then.
    """
    low, high = x.min(initial=np.inf), x.max(initial=-np.inf)
    if not low < high:
        return x + x.dtype.type(1)
    middle = low + (high - low) / 2
    return middle + (middle - x) / 2


def with_others_changed(x: np.ndarray, kept: int) -> np.ndarray:
    """``x`` ``[B, ...]`` with its examples ``kept``, ``kept + 2``, ... and others between them."""
    changed = others(x)
    changed[kept::2] = x[kept::2]
    return changed


def logits(
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], x: np.ndarray, size: int
) -> np.ndarray:
    """A model's logits ``[B, C]`` for examples one by one, where batches give the same.

    A model in train mode (batch statistics, dropout) would be bounded as it is on a batch of one,
    which is another function; batch normalisation even makes that one constant.

    Args:
      evaluate: the logits ``[B, C]`` of examples in batches of ``size``, and one by one.
      x: at least two examples ``[B, ...]``.
      size: of a batch, at least two.

    Raises:
      ValueError: naming the first example whose logits depend on others.
    """
    together, alone = evaluate(x)
    require_same_alone(together, alone)
    # Every batch runs the same program: what it mixes shows in the first one.
    even_kept, odd_kept = (evaluate(with_others_changed(x[:size], kept))[0] for kept in (0, 1))
    require_unchanged_by_others(together[:size], (even_kept, odd_kept))
    return alone


def require_unchanged_by_others(logits: np.ndarray, changed: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuses a model whose logits for an example depend on other examples of the batch.

    Args:
      logits: ``[B, C]`` of the batch.
      changed: ``[B, C]`` twice, with the even examples kept and with the odd ones.

    Raises:
      ValueError: naming the first example.
    """
    kept = np.where(np.arange(len(logits))[:, None] % 2 == 0, *changed)
    apart = _differ(logits, kept, _SAME_PROGRAM * _magnitudes(logits, kept))
    if apart.any():
        raise ValueError(
            "model must treat the examples of a batch independently, but the logits of example "
            f"{np.argmax(apart)} change when others do; use eval mode (running averages)"
        )


def require_same_alone(logits: np.ndarray, alone: np.ndarray) -> None:
    """Refuses a model that computes something else for an example in a batch of its own.

    Args:
      logits: ``[B, C]`` of the batch.
      alone: ``[B, C]`` of the examples one by one.

    Raises:
      ValueError: naming the first example.
    """
    apart = _differ(logits, alone, _OTHER_PROGRAM * (1.0 + _magnitudes(logits, alone)))
    if apart.any():
        raise ValueError(
            "model must treat the examples of a batch independently, but the logits of "
            f"example {np.argmax(apart)} change when it is alone; use eval mode "
            "(running averages, no dropout)"
        )


def _differ(first: np.ndarray, second: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Which examples differ, bool ``[B]``; infinities and NaN must be the same."""
    close = np.isclose(first, second, rtol=0.0, atol=tolerance, equal_nan=True)
    return ~close.all(axis=-1)


def _magnitudes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """By how large logits rounding is judged, ``[C]``: each column by its own, without masks.

    A mask (say -1e9, or -inf) is one value that stands in many places, the same in both arrays.
    Rounding judged by it would hide any change of the logits that count.
    """
    values, counts = np.unique(second, return_counts=True)
    masked = (first == second) & np.isin(second, values[counts > 1])
    counting = np.isfinite(second) & ~masked
    return np.abs(second).max(axis=0, initial=0.0, where=counting)

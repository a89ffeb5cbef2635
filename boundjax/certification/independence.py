"""Checks that a model treats the examples of a batch independently."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from boundjax.certification.applies import rows_of
from boundjax.typing import PyTree

# Tolerances, relative to the largest logit of a column. In two runs of one compiled program the
# logits of unchanged examples are equal, up to the order of summation on a GPU.
_SAME_PROGRAM = 1e-5
# Another batch size is another program, which rounds differently; mixing examples or drawing random
# numbers changes logits far more.
_OTHER_PROGRAM = 1e-3


def counterparts(x: np.ndarray) -> np.ndarray:
    """Different examples in the range of `x`: its negatives with half the contrast.

    They change the mean of a batch and its largest and smallest values, too. If all values are
    equal, the result is `x + 1`.
    """
    low, high = x.min(initial=np.inf), x.max(initial=-np.inf)
    if not low < high:
        return x + x.dtype.type(1)
    middle = low + (high - low) / 2
    return middle + (middle - x) / 2


def with_alternate_changed(x: np.ndarray, kept: int) -> np.ndarray:
    """`x` `[B, ...]` with the examples `kept`, `kept + 2`, ... and counterparts between them."""
    changed = counterparts(x)
    changed[kept::2] = x[kept::2]
    return changed


def other_constants(constants: PyTree, sign: int) -> PyTree:
    """Different per-example constants `[B, ...]`: predicates negated, numbers moved out of the way.

    Numbers move by the width of their range (by 1 if all are equal), up or down, so that a largest
    or a smallest value of the batch changes as well; integers that are not negative stay so.
    """

    def other(array: np.ndarray) -> np.ndarray:
        if array.dtype == np.bool_ or not array.size:
            return ~array if array.dtype == np.bool_ else array
        low, high = array.min(), array.max()
        if array.dtype.kind == "f":
            return array + array.dtype.type(sign) * ((high - low) if low < high else low * 0 + 1)
        limits = np.iinfo(array.dtype)
        least = 0 if low >= 0 else int(limits.min)
        moved = array.astype(object) + sign * (int(high) - int(low) or 1)
        return np.clip(moved, least, int(limits.max)).astype(array.dtype)

    return jax.tree.map(other, constants)


def _others_changed(tree: PyTree, changed: PyTree, kept: int) -> PyTree:
    """Arrays `[B, ...]` of one tree at the examples `kept`, `kept + 2`, ..., else of the other."""

    def mixed(array: np.ndarray, other: np.ndarray) -> np.ndarray:
        result = other.copy()
        result[kept::2] = array[kept::2]
        return result

    return jax.tree.map(mixed, tree, changed)


def logits(
    evaluate: Callable[[np.ndarray, PyTree], tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    constants: PyTree,
    size: int,
) -> np.ndarray:
    """A model's logits `[B, C]` for examples one by one, after checking that batches give the same.

    A model in train mode (batch statistics, dropout) is another function on a batch of one, which
    is what would be bounded; with batch normalisation that function is even constant.

    Args:
      evaluate: examples and constants -> logits `[B, C]` in batches of `size`, and one by one.
      x: at least two examples `[B, ...]`.
      constants: a pytree of arrays `[B, ...]` that the model takes beside `x`.
      size: of a batch, at least two.

    Raises:
      ValueError: naming the first example whose logits depend on others.
    """
    together, alone = evaluate(x, constants)
    require_same_alone(together, alone)
    # Every batch runs the same program, so checking the first one is enough.
    first = rows_of(constants, slice(size))
    for sign in (1, -1) if jax.tree.leaves(constants) else (1,):
        other = other_constants(first, sign)

        def kept_alone(kept: int, other: PyTree = other) -> np.ndarray:
            examples = with_alternate_changed(x[:size], kept)
            return evaluate(examples, _others_changed(first, other, kept))[0]

        require_unchanged(together[:size], (kept_alone(0), kept_alone(1)))
    return alone


def require_unchanged(logits: np.ndarray, changed: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuses a model whose logits for an example depend on the rest of its batch.

    Args:
      logits: `[B, C]` of the batch.
      changed: the same `[B, C]` with only the even examples kept, and with only the odd ones.

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
    """Refuses a model whose logits for an example differ when it is alone in its batch.

    Args:
      logits: `[B, C]` of the batch.
      alone: `[B, C]` of the examples one by one.

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
    """Which examples differ, bool `[B]`; infinities and NaN must be the same."""
    close = np.isclose(first, second, rtol=0.0, atol=tolerance, equal_nan=True)
    return np.asarray(~close.all(axis=-1))


def _magnitudes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The largest absolute logit of each column, `[C]`, without masks.

    A mask (-1e9, say, or -inf) is a value that occurs several times, at the same places in both
    arrays. A tolerance relative to it would hide any change of the other logits.
    """
    values, counts = np.unique(second, return_counts=True)
    masked = (first == second) & np.isin(second, values[counts > 1])
    counting = np.isfinite(second) & ~masked
    return np.abs(second).max(axis=0, initial=0.0, where=counting)

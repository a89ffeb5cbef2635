"""One-line errors for arguments that describe input sets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval


def concrete(value: Any) -> np.ndarray | None:
    """`value` as a numpy array, or None where its numbers are not known yet.

    They are unknown in tracers and in the placeholders that JAX puts into pytrees (`in_axes`,
    shardings).
    """
    if isinstance(value, Tracer):
        return None
    if isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        return np.asarray(value)
    return None


def first_index(mask: np.ndarray) -> str:
    """` at index ...` of the first True in a mask, to end a message with; empty for a scalar."""
    index = tuple(int(i) for i in np.argwhere(mask)[0])
    return "" if not index else f" at index {index[0] if len(index) == 1 else index}"


def require_finite(name: str, value: Any) -> None:
    """Raises ValueError where a concrete `value` holds a NaN or an infinity."""
    array = concrete(value)
    if array is not None and not np.isfinite(array).all():
        bad = ~np.isfinite(array)
        raise ValueError(f"{name} must be finite, got {array[bad].flat[0]}{first_index(bad)}")


def require_radius(value: Any, name: str = "eps") -> None:
    """Raises ValueError where a concrete radius is negative or not finite."""
    array = concrete(value)
    if array is not None:
        bad = ~(np.isfinite(array) & (array >= 0))
        if bad.any():
            raise ValueError(
                f"{name} must be finite and >= 0, got {array[bad].flat[0]}{first_index(bad)}; "
                "give the radius in the units of the input"
            )


def require_clip(clip: Any) -> None:
    """Raises ValueError where `clip` is neither None nor a pair `(low, high)`, low <= high."""
    if clip is None:
        return
    if not _is_sequence(clip) or len(clip) != 2:
        raise ValueError(f"clip must be None or a pair (low, high), got {clip!r}")
    low, high = concrete(clip[0]), concrete(clip[1])
    if low is not None and high is not None and not (low <= high).all():
        raise ValueError(f"clip must be (low, high) with low <= high, got {clip!r}")


def require_norm(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not the order of a norm, TypeError for no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(
            f"{name} must be a number, the order of a norm (1, 2 or jax.numpy.inf), got {value!r}"
        )
    if not value >= 1:
        raise ValueError(f"{name} must be a norm's order >= 1 (1, 2 or inf), got {value}")


_ENDS = frozenset(["center", "lower", "upper"])


def warn_if_rounded(input_set: Any) -> None:
    """Warns, once, that the numbers of a set are rounded to float32 because JAX computes in it."""
    config: Any = jax.config
    tree: Any = jax.tree
    for path, leaf in () if config.jax_enable_x64 else tree.leaves_with_path(input_set):
        is_end = any(getattr(key, "name", None) in _ENDS for key in path)
        if not is_end or not isinstance(leaf, np.ndarray):
            continue
        end = cast("Any", leaf)
        if end.dtype != np.float64:
            continue
        with np.errstate(over="ignore"):
            inexact = end.astype(np.float32) != end
        if inexact.any():
            warnings.warn(
                "the input set is of float64 numbers that JAX rounds to float32, such as "
                f"{end[inexact].flat[0]!r}; give float32 arrays, or enable jax_enable_x64",
                stacklevel=2,  # one place, so that it is said once
            )


def require_input_set(value: Any) -> None:
    """Raises TypeError where `value` is not one input set."""
    if isinstance(value, InputSet):
        return
    if isinstance(value, Interval):
        raise TypeError("expected an input set, got an Interval; use boundjax.Box(*interval)")
    if hasattr(value, "shape"):
        raise TypeError(
            f"expected an input set, got an array of shape {tuple(value.shape)}; say what may be "
            "perturbed: boundjax.LpBall(x, eps) or boundjax.Box(lower, upper)"
        )
    raise TypeError(
        "expected an input set such as boundjax.LpBall or boundjax.Box (with is_box, interval(), "
        f"support() and spread()), got {_type_name(value)}"
    )


def require_array(name: str, value: Any) -> None:
    """Raises TypeError where `value` is a collection of arrays, or an input set, and no array."""
    if isinstance(value, InputSet):
        raise TypeError(
            f"{name} must be one array, around which the sets are made, got a {_type_name(value)}; "
            "boundjax.linear(f)(sets, specification) bounds functions on any set"
        )
    # numpy and JAX read a list of equally shaped arrays as one array.
    several = _is_sequence(value) and len({np.shape(item) for item in value}) > 1
    sets = _is_sequence(value) and any(isinstance(item, InputSet) for item in value)
    if several or sets or isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be one array, got a {_type_name(value)}; concatenate the inputs and "
            "split the array inside the model, or take boundjax.linear(f)(sets, specification), "
            "which takes pytrees of sets"
        )


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _type_name(value: Any) -> str:
    return type(value).__name__


def as_float(value: ArrayLike, like: Any = None) -> Array:
    """`value` as a floating-point array, of the dtype of `like` if there is one."""
    if like is not None:
        return jnp.asarray(value, dtype=jnp.result_type(like))
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)

"""Checks of the inputs, radii and constants that `certify` is given."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from boundjax.sets import rounding as rounding_of_sets
from boundjax.sets.ball import LpBall
from boundjax.sets.ball_box import BallBox
from boundjax.sets.box import Box
from boundjax.sets.checks import require_array, require_finite
from boundjax.sets.interval import Interval
from boundjax.sets.threat import Threat
from boundjax.typing import PyTree


def checked_examples(x: ArrayLike) -> np.ndarray:
    """The inputs `[B, ...]` of `certify` as an array of finite numbers."""
    if isinstance(x, Interval | Box | LpBall | BallBox):
        raise TypeError(
            f"x must be the inputs [B, ...], and the set around each follows from eps, norm and "
            f"clip, got a {type(x).__name__}; for a set of your own use boundjax.linear(f)(set)"
        )
    require_array("x", x)
    examples = np.asarray(x)
    if examples.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(
            f"x must be float32 or float64, got {examples.dtype}; use x.astype('float32')"
        )
    x64: bool = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    if examples.dtype == np.float64 and not x64:
        single = examples.astype(np.float32)
        if not np.array_equal(single, examples, equal_nan=True):
            # A certificate about rounded inputs is not one about the inputs.
            raise TypeError(
                "x is float64 and float32 does not hold its values exactly, but JAX computes in "
                "float32; give x.astype('float32'), or enable jax_enable_x64"
            )
        examples = single
    if examples.ndim < 1 or examples.shape[0] == 0:
        raise ValueError(
            f"x must be a batch [B, ...] of at least one example, got shape {examples.shape}"
        )
    require_finite("x", examples)
    return examples


def require_searchable(x: np.ndarray, threat: Threat) -> None:
    """Refuses inputs and sets that `"complete"` cannot search."""
    if threat.norm != np.inf:
        raise ValueError(
            f"method 'complete' needs the norm inf, got {threat.norm:g}; take 'best' for others"
        )
    if x.dtype != np.float32:
        raise TypeError(f"method 'complete' computes in float32, got x of {x.dtype}")


def require_finite_weights(variables: PyTree) -> None:
    """Refuses weights without a spectral norm."""
    for path, leaf in jax.tree.leaves_with_path(variables):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            require_finite(f"the weights {jax.tree_util.keystr(path)}", leaf)


def rounded_outwards(threat: Threat, dtype: np.dtype[Any]) -> Threat:
    """The threat with a clip range in this dtype, and no radius: calls take the radii apart.

    An end that is not representable is rounded outwards, as the radius is.
    """
    clip = threat.clip
    if clip is not None:
        clip = (
            -rounding_of_sets.up(-np.asarray(clip[0]), dtype),
            rounding_of_sets.up(clip[1], dtype),
        )
    return Threat(0.0, float(threat.norm), clip, outward=True)


def per_example(radius: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A radius with as many dimensions as `x`: scalar, `[B]`, or broadcastable to `x`.

    Raises:
      ValueError: for another shape.
    """
    if radius.ndim == 0:
        return np.full((x.shape[0],) + (1,) * (x.ndim - 1), radius)
    if radius.shape == x.shape[:1]:
        return radius.reshape((-1,) + (1,) * (x.ndim - 1))
    fits = radius.ndim == x.ndim and all(
        e in (1, n) for e, n in zip(radius.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"eps must be a scalar, one per example [{x.shape[0]}], or broadcast to x of shape "
            f"{x.shape} with as many dimensions, got shape {radius.shape}"
        )
    return radius


def checked_constants(constants: PyTree, count: int) -> tuple[PyTree, ...]:
    """What `certify` was given as `constants`, as arrays.

    Args:
      constants: a pytree of arrays `[B, ...]`, or None.
      count: `B`.

    Returns:
      No constants, or one pytree of numpy arrays.

    Raises:
      ValueError: for leaves without an axis of the batch, or without leaves.
      TypeError: for leaves that are not numbers.
    """
    if constants is None:
        return ()

    def checked(path: Any, leaf: Any) -> np.ndarray:
        name = f"constants{jax.tree_util.keystr(path)}"
        array = np.asarray(leaf)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} must be numbers, got {array.dtype}")
        if array.shape[:1] != (count,):
            raise ValueError(
                f"{name} must have one entry for each of the {count} examples [B, ...], got shape "
                f"{array.shape}; what is the same for all examples belongs into the model"
            )
        taken = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        if array.dtype.kind in "iu" and (taken != array).any():
            raise TypeError(f"{name} must be integers of {taken.dtype}, got larger ones")
        return taken

    if not jax.tree.leaves(constants):
        raise ValueError("constants must have arrays [B, ...], got none; leave them out")
    return (jax.tree_util.tree_map_with_path(checked, constants),)

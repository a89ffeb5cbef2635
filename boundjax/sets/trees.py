"""Pytrees of arrays in place of one array, and how their leaves lie in one flat array."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.typing import PyTree

tree_util: Any = jax.tree_util  # whose types are incomplete

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def is_tree(value: Any) -> bool:
    """Whether a value is a pytree of arrays and no array itself; so is one array in a dict."""
    return value is not None and not tree_util.all_leaves([value])


def numbers_as_array(value: Any) -> Any:
    """An array in place of a list of plain numbers; everything else as it is.

    As leaves of a pytree the numbers would become a list of scalars under `jit`. Tuples remain
    pytrees, since the placeholders that JAX puts into sets (`in_axes`) are tuples of numbers.
    """
    numbers = all(isinstance(leaf, (int, float, np.generic)) for leaf in jax.tree.leaves(value))
    if value.__class__ is not list or not value or not numbers:
        return value
    try:
        return np.asarray(value)
    except ValueError:  # rows of different lengths
        return value


def named_leaves(name: str, value: PyTree) -> list[tuple[str, Any]]:
    """The leaves of an argument with names for messages, `name['key']`; one array is one leaf."""
    paths, _ = tree_util.tree_flatten_with_path(value)
    return [(name + tree_util.keystr(path), leaf) for path, leaf in paths]


def like_leaves(name: str, value: PyTree, like: PyTree) -> list[Any]:
    """The leaves of a pytree of the structure of `like`, or one number for all leaves.

    Raises:
      ValueError: for another structure, or one array for several leaves.
    """
    structure = tree_util.tree_structure(like)
    if is_tree(value):
        if tree_util.tree_structure(value) != structure:
            raise ValueError(
                f"{name} must be a number or have the structure of the input "
                f"{structure_of(like)}, got {structure_of(value)}"
            )
        return jax.tree.leaves(value)
    if np.ndim(value) > 0:
        raise ValueError(
            f"{name} must be a number or have the structure of the input {structure_of(like)}, "
            f"got one array of shape {np.shape(value)}; give one for each leaf"
        )
    return [value] * structure.num_leaves


def require_one_structure(name: str, **fields: Any) -> None:
    """Raises ValueError where fields of a set are pytrees of different structures."""
    # JAX makes sets of placeholders (`in_axes`, shardings), in which a field may be None.
    present = {k: v for k, v in fields.items() if jax.tree.leaves(v)}
    if len({tree_util.tree_structure(v) for v in present.values()}) > 1:
        listed = [f"{k} {structure_of(v)}" for k, v in present.items()]
        raise ValueError(f"{name} needs pytrees of one structure, got {' and '.join(listed)}")


def require_one_dtype(dtypes: Sequence[Any], value: PyTree) -> None:
    """Raises TypeError where the perturbed leaves of an input have different dtypes."""
    names = sorted({str(dtype) for dtype in dtypes})
    if len(names) > 1:
        raise TypeError(
            f"perturbed inputs must share one floating dtype, got {' and '.join(names)} in "
            f"{structure_of(value)}; convert them, e.g. x.astype(jnp.float32)"
        )


class _Shown:
    """A leaf in a message."""

    def __init__(self, leaf: Any) -> None:
        """Keeps the text only."""
        numbers = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        shape = ",".join(map(str, leaf.shape)) if numbers else ""
        self._text = f"{leaf.dtype}[{shape}]" if numbers else type(leaf).__name__

    def __repr__(self) -> str:
        return self._text


_LONGEST = 160  # characters of a structure in a message


def structure_of(value: PyTree) -> str:
    """A pytree in one line for messages: dtypes and shapes of arrays, the classes of sets."""
    shown = jax.tree.map(_Shown, value, is_leaf=lambda leaf: isinstance(leaf, InputSet))
    text = " ".join(repr(shown).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the leaves of a pytree lie in one flat array, in the order of `jax.tree.leaves`.

    One leaf alone keeps its shape, so that convolutions still meet an image.

    Attributes:
      tree: the structure.
      shapes: those of the leaves.
    """

    tree: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, value: PyTree) -> Layout:
        """That of a pytree of arrays."""
        leaves, tree = tree_util.tree_flatten(value)
        return cls(tree, tuple(np.shape(leaf) for leaf in leaves))

    def ravel(self, value: PyTree) -> Array:
        """The leaves in one array `[n]`.

        Raises:
          ValueError: for a pytree of another structure.
        """
        return concatenated(self.tree.flatten_up_to(value))

    def unravel(self, array: Array) -> PyTree:
        """The pytree of an array `[*leading, n]`; the leaves are `[*leading, *shape]`."""
        return self.tree.unflatten(separated(array, self.shapes))


def concatenated(leaves: Sequence[Any]) -> Array:
    """Arrays in one array `[n]`; one alone keeps its shape."""
    if len(leaves) == 1:
        return jnp.asarray(leaves[0])
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


Arrays = TypeVar("Arrays", Array, np.ndarray)


def separated(array: Arrays, shapes: Sequence[tuple[int, ...]]) -> list[Arrays]:
    """The leaves `[*leading, *shape]` of an array `[*leading, n]`, or of `[*leading, *shape]`."""
    if len(shapes) == 1:
        return [array]
    leaves: list[Any] = []
    start = 0
    for shape in shapes:
        end = start + math.prod(shape)
        leaves.append(array[..., start:end].reshape(*array.shape[:-1], *shape))
        start = end
    return leaves


class _OfTree(Protocol):
    """A set that may be one of pytrees."""

    def flattened(self) -> tuple[InputSet, Layout | None]:
        """The set of one array, and how the leaves lie in it; None if it is one array's."""
        ...


Set = TypeVar("Set", bound=_OfTree)


def for_trees(
    method: Callable[Concatenate[Set, Arguments], Answer],
) -> Callable[Concatenate[Set, Arguments], Answer]:
    """Lets a method of sets of one array answer for sets of pytrees as well.

    Arguments and answers then have the structure of the pytree.
    """

    @functools.wraps(method)
    def answer(
        input_set: Set, /, *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> Answer:
        flat, layout = input_set.flattened()
        if layout is None:
            return method(input_set, *arguments, **keywords)
        flat_arguments = [layout.ravel(argument) for argument in arguments]
        result: Any = getattr(flat, method.__name__)(*flat_arguments)
        if isinstance(result, Interval):
            result = Interval(*map(layout.unravel, result))
        elif isinstance(result, tuple):  # the center and the radius of a ball
            center, radius = cast("tuple[Array, Array]", result)
            result = layout.unravel(center), radius
        return result

    return answer

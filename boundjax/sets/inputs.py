"""The input of a function, perhaps a pytree with input sets in it, as a set over one array.

A walk starts at one array. The function of a pytree becomes one of a flat array, which is cut into
the leaves: slices and reshapes are exact, so what holds for one array holds for pytrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.sets.checks import require_input_set
from boundjax.sets.input_set import InputSet
from boundjax.sets.interval import Interval
from boundjax.sets.product import product_of
from boundjax.sets.threat import Threat
from boundjax.sets.trees import Layout, is_tree, separated, structure_of, tree_util
from boundjax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The input of a function as a set over one array.

    Attributes:
      input_set: of the flat array `[n]` of all perturbed leaves, in the order of `jax.tree.leaves`;
        of the array itself if there is only one.
    """

    input_set: InputSet
    _tree: Any  # of the input, with a set or a constant as each leaf; None for one array
    _leaves: tuple[_Perturbed | _Constant, ...] = ()

    @property
    def is_tree(self) -> bool:
        """Whether the function takes a pytree."""
        return self._tree is not None

    def applied(self, function: Callable[[Any], Any]) -> Callable[[Array], Any]:
        """The function of the one array.

        What the function raises has a note on the structure that it was called with.
        """
        if not self.is_tree:
            return function

        def of_array(array: Array) -> Any:
            argument = self.restored(array)
            try:
                return function(argument)
            except KeyError as error:
                raise ValueError(
                    f"the function looked for {error} while it was called with the structure of "
                    f"the input set, {structure_of(argument)}; give the sets, and arrays for what "
                    "is not perturbed, in the structure that the function takes"
                ) from error
            except Exception as error:
                error.add_note(
                    "The function was called with the structure of the input set, "
                    f"{structure_of(argument)}."
                )
                raise

        return of_array

    def restored(self, array: Array | np.ndarray) -> PyTree:
        """The function's argument for one array `[n]`."""
        return self._filled(array, lambda constant: constant)

    def points(self, arrays: Array) -> PyTree:
        """The arguments for arrays `[m, n]`: leaves `[m, *shape]`, constants repeated."""
        return self._filled(arrays, lambda constant: _repeated(constant, len(arrays)))

    def coefficients(self, rows: Array) -> PyTree:
        """The leaves `[m, *shape]` of rows of coefficients `[m, n]`; those of constants are 0."""

        def zeros(constant: Any) -> Any:
            repeated = _repeated(constant, len(rows))
            return repeated if repeated is constant else jnp.zeros(repeated.shape, rows.dtype)

        return self._filled(rows, zeros)

    def _filled(self, array: Any, of_constant: Callable[[Any], Any]) -> PyTree:
        if not self.is_tree:
            return array
        shapes = [s for leaf in self._leaves if isinstance(leaf, _Perturbed) for s in leaf.shapes]
        parts = iter(separated(array, shapes))
        values = [
            leaf.tree.unflatten([next(parts) for _ in leaf.shapes])
            if isinstance(leaf, _Perturbed)
            else of_constant(leaf.value)
            for leaf in self._leaves
        ]
        return self._tree.unflatten(values)


@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """A leaf with an input set, which may itself be one of a pytree."""

    tree: Any
    shapes: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Constant:
    """A leaf that is not perturbed."""

    value: Any


def inputs_of(value: InputSet | PyTree) -> Inputs:
    """An input set, or a pytree of input sets and of arrays that are not perturbed.

    Raises:
      TypeError: for a pytree without an input set, with an `Interval` or a `Threat` in place of
        one, or with perturbed leaves of different floating dtypes.
    """
    paths, tree = tree_util.tree_flatten_with_path(value, is_leaf=_is_set_like)
    leaves = [leaf for _, leaf in paths]
    for path, leaf in paths:
        _require_no_stand_in(leaf, tree_util.keystr(path))
    sets = [leaf for leaf in leaves if isinstance(leaf, InputSet)]
    if not sets:
        _refuse(value)
    flat = [_flattened(leaf) for leaf in sets]
    if leaves[0] is value and flat[0][1] is None:
        return Inputs(flat[0][0], None)
    layouts = iter(
        Layout.of(part.interval().lower) if layout is None else layout for part, layout in flat
    )
    slots: list[_Perturbed | _Constant] = []
    for leaf in leaves:
        if isinstance(leaf, InputSet):
            layout = next(layouts)
            slots.append(_Perturbed(layout.tree, layout.shapes))
        else:
            slots.append(_Constant(leaf))
    return Inputs(product_of([part for part, _ in flat], value), tree, tuple(slots))


def _is_set_like(value: Any) -> bool:
    # The others are pytrees of arrays, and would pass for constants.
    return isinstance(value, (InputSet, Interval, Threat))


def _require_no_stand_in(leaf: Any, path: str) -> None:
    """Raises TypeError for what describes a set and is none."""
    where = f" at {path}" if path else ""
    if isinstance(leaf, Interval):
        raise TypeError(
            f"expected an input set{where}, got an Interval; use boundjax.Box(*interval)"
        )
    if isinstance(leaf, Threat):
        raise TypeError(
            f"expected an input set{where}, got a Threat, which makes one from an input: threat(x)"
        )


def _refuse(value: Any) -> NoReturn:
    """Raises TypeError for an input without an input set."""
    if is_tree(value):
        raise TypeError(
            f"expected an input set in the pytree, got {structure_of(value)}; say what may be "
            "perturbed, e.g. {'x': boundjax.LpBall(x, eps), 'mask': mask}"
        )
    require_input_set(value)
    raise AssertionError("an input set is a leaf of itself")


def _flattened(input_set: InputSet) -> tuple[InputSet, Layout | None]:
    """The set over one array; sets of a user's class are."""
    method: Any = getattr(input_set, "flattened", None)
    return (input_set, None) if method is None else method()


def _repeated(constant: Any, count: int) -> Any:
    """A constant `[count, *shape]`; what is no array stays what it is."""
    if not isinstance(constant, (Array, np.ndarray, np.generic, int, float, complex)):
        return constant
    array = jnp.asarray(constant)
    return jnp.broadcast_to(array, (count, *array.shape))

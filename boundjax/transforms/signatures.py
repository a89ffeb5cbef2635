"""Types of the functions that transforms take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar, overload

from jax import Array
from jaxtyping import Float

from boundjax.sets.input_set import InputTree

# A function of one example, an array or a pytree, with a single output array.
ArrayFunction: TypeAlias = Callable[[Any], Array]
# A function of one example with any pytree of output arrays.
TreeFunction: TypeAlias = Callable[[Any], Any]

# The coefficients of `m` linear functions of the output.
Specification: TypeAlias = Float[Array, " m *out"]

OutputBounds = TypeVar("OutputBounds", covariant=True)
RowBounds = TypeVar("RowBounds", covariant=True)


class BoundsFunction(Protocol[OutputBounds, RowBounds]):
    """What a transform returns: the bounds on a function over an input set.

    The input set may be a pytree of sets and of arrays that are not perturbed, with the structure
    of the function's argument.

    `OutputBounds` is the type of the bounds on the function's outputs: for an `ArrayFunction` the
    `Interval` (or its like) of the one array, for other functions a pytree, typed as `Any`. To a
    type checker a function without annotations is an `ArrayFunction`. `RowBounds` is the type of
    the bounds on the rows of a specification.
    """

    @overload
    def __call__(self, input_set: InputTree, specification: None = None) -> OutputBounds: ...

    @overload
    def __call__(self, input_set: InputTree, specification: Specification) -> RowBounds: ...

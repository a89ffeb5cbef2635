"""A named op inside a traced function: how an expansion says "this is a softmax"."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive

primitive: Any = Primitive("boundjax_composite")  # Any: JAX leaves the methods untyped


def composite(
    name: str, function: Callable[..., Array], /, *operands: Array, **params: Hashable
) -> Array:
    """Returns `function(*operands, **params)`, traced as one op of the given name.

    Only for functions that are traced to a graph (`Expansion.expand`, rewrites): tracing recognises
    the equation by its name and looks it up in the table; `node.params` are `params`.

    Args:
      name: of an entry in the table of ops.
      function: a JAX function with one array as its result.
      *operands: arrays.
      **params: static arguments of `function`.
    """
    items = tuple(sorted(params.items()))
    return primitive.bind(*operands, name=name, function=function, items=items)


@primitive.def_abstract_eval
def _(
    *avals: ShapedArray,
    name: str,
    function: Callable[..., Array],
    items: tuple[tuple[str, Hashable], ...],
) -> ShapedArray:
    del name

    def call(*operands: Array) -> Array:
        return function(*operands, **dict(items))

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    result = jax.eval_shape(call, *shapes)  # pyright: ignore[reportUnknownMemberType]  # JAX's stub
    return ShapedArray(result.shape, result.dtype)

"""A named op inside a traced function: how an expansion says "this is a softmax"."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import jax
from jax import Array
from jax.extend.core import Primitive

primitive = Primitive("boundjax_composite")


def composite(
    name: str, function: Callable[..., Array], *operands: Array, **params: Hashable
) -> Array:
    """``function(*operands, **params)`` as one op of the given name.

    Only for functions that are traced to a graph (``Expansion.expand``, rewrites): the equation is
    recognised there by its name and looked up in the table; ``node.params`` are ``params``.

    Args:
      name: of an entry in the table of ops.
      function: a JAX function with one array as its result.
      *operands: arrays.
      **params: static arguments of ``function``.
    """
    items = tuple(sorted(params.items()))
    return primitive.bind(*operands, name=name, function=function, items=items)


@primitive.def_abstract_eval
def _(
    *avals: jax.core.ShapedArray, name: str, function: Callable, items: tuple
) -> jax.core.ShapedArray:
    del name
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    result = jax.eval_shape(lambda *values: function(*values, **dict(items)), *shapes)
    return jax.core.ShapedArray(result.shape, result.dtype)

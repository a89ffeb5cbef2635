"""`lax.custom_linear_solve`, to which `jnp.linalg.solve` traces: the solver takes its place."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.node import Perturbed
from boundjax.tracing import jaxprs
from boundjax.tracing.builder import Builder, Rule
from boundjax.tracing.jaxprs import Place

# Up to this many elements on the right-hand side the whole map is one matrix.
_LARGEST = 1024


def _solve(builder: Builder, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
    """Traces the solver; a solver that is linear becomes one product, whose bounds are exact.

    A factorisation is solved in two steps, of which each alone would be bounded exactly, but not
    both. Whether the solver is linear its own ops say: an iteration until convergence is refused.
    """
    solver, constants, right = jaxprs.solver_of(eqn, operands)
    perturbed = any(isinstance(c, Perturbed) for c in constants)
    if not perturbed and len(right) == 1 and builder.formulas is None:
        shape = builder.shape(right[0])
        built = builder.nested(solver, [*constants, shape])
        linear = all(node.is_linear for node in built.nodes[1:])
        (output,) = built.outputs
        if linear and isinstance(output, Perturbed) and math.prod(shape.shape) <= _LARGEST:
            evaluate = functools.partial(_evaluated, solver)
            return builder.inline(_product(evaluate, shape), [*constants, *right], place)
    return builder.run(solver, [*constants, *right], place)


def _evaluated(solver: jaxprs.Body, *values: Array) -> Array:
    (result,) = jaxprs.evaluate_body(solver, values)
    return result


def _product(evaluate: Callable[..., Array], shape: jax.ShapeDtypeStruct) -> Callable[..., Array]:
    size = math.prod(shape.shape)

    def function(*values: Array) -> Array:
        *constants, right = values
        units = jnp.eye(size, dtype=right.dtype).reshape(size, *shape.shape)
        columns = jax.vmap(lambda unit: evaluate(*constants, unit))(units)
        matrix = columns.reshape(size, size).T
        return (matrix @ right.reshape(size)).reshape(shape.shape)

    return function


RULES: Mapping[str, Rule] = {"custom_linear_solve": _solve}

"""Directional derivatives that say how a function changes, for proofs of monotonicity.

If the derivative of a continuous, piecewise analytic function along a line is at least `c` wherever
it exists, the function rises by at least `c` per unit: automatic differentiation is right at almost
every point of the line (Lee et al. 2020). It sees no jumps, though, and a custom rule may say
anything. So the function is differentiated as it is computed, without custom rules, and what may
jump is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from boundjax.ir import table
from boundjax.ir.families import Scalar
from boundjax.ir.table import UnsupportedOpError
from boundjax.tracing import jaxprs
from boundjax.tracing.jaxprs import Place

# Continuous on all numbers in every operand, with a derivative that JAX knows.
# fmt: off
_CONTINUOUS = frozenset(
    [
        "abs", "add", "add_any", "asinh", "atan", "broadcast_in_dim", "clamp", "concatenate",
        "conv_general_dilated", "convert_element_type", "copy", "copy_p", "cos", "cosh", "cummax",
        "cummin", "cumprod", "cumsum", "dot_general", "erf", "erfc", "exp", "exp2", "expand_dims",
        "expm1", "logistic", "max", "min", "mul", "neg", "pad", "reduce_max", "reduce_min",
        "reduce_prod", "reduce_sum", "reduce_window_max", "reduce_window_min", "reduce_window_sum",
        "reshape", "rev", "sin", "sinh", "slice", "split", "square", "squeeze", "stack", "sub",
        "tanh", "tile", "transpose", "unstack",
    ]
)
# fmt: on
# The same in their first operands; the others must not depend on what moves.
_CONTINUOUS_IN_FIRST = {
    "div": 1,
    "dynamic_slice": 1,
    "dynamic_update_slice": 2,
    "gather": 1,
}


def directional_derivative(
    function: Callable[[Any], Any], direction: Any
) -> Callable[[Any], Array | Any]:
    """The derivative of a function along a direction, `x -> d/dt function(x + t direction)` at 0.

    Where it is at least `c` on a convex set, `function(x + t direction) - function(x) >= c t` for
    all `t >= 0` that stay in the set, in real arithmetic: the function is monotone for `c = 0`.
    `boundjax.prove(directional_derivative(f, direction), box, property)` proves or refutes that,
    with `boundjax.properties.within(lower, upper)` or `all_positive` as the property. A function
    that is flat somewhere attains 0 there, which no bound separates from a fall: allow for one with
    `within(-1e-5, None, shape)`.

    Args:
      function: of one array `[*shape]` or a pytree, any JAX function that is continuous by the ops
        that it is made of.
      direction: an array `[*shape]`, or a pytree with the structure of the input and None for
        leaves that do not move; `jnp.eye(n)[i]` for the input with index `i`.

    Returns:
      A function of the same input, with results of the shape of `function`'s.

    Raises:
      UnsupportedOpError: when it is called, at the first op that may jump (`floor`, comparisons,
        casts) or is not defined everywhere (`log`, a quotient by something that moves).
      ValueError: likewise, for a direction that does not fit the input.
    """

    def derivative(inputs: Any) -> Array | Any:
        leaves, tree = jax.tree.flatten(inputs)
        tangents = _tangents(leaves, tree, direction)
        moved = [k for k, tangent in enumerate(tangents) if tangent is not None]

        def of_moved(*values: Array) -> Any:
            changed = list(leaves)
            for k, value in zip(moved, values, strict=True):
                changed[k] = value
            return function(jax.tree.unflatten(tree, changed))

        start = [jnp.asarray(leaves[k]) for k in moved]
        closed, shapes = jax.make_jaxpr(of_moved, return_shape=True)(*start)
        body = jaxprs.body_of(closed)

        def outputs(*values: Array) -> list[Any]:
            return [value for value, _ in _run(body, [(v, True) for v in values], Place())]

        _, results = jax.jvp(outputs, start, [tangents[k] for k in moved])
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return derivative


def _tangents(leaves: Sequence[Any], tree: Any, direction: Any) -> list[Array | None]:
    """The direction of each leaf of the input; None if it does not move.

    Raises:
      ValueError: if the direction does not fit.
    """
    ways, structure = jax.tree.flatten(direction, is_leaf=lambda leaf: leaf is None)
    if structure != tree or all(way is None for way in ways):
        raise ValueError(
            "direction must have the structure of the input, with None for leaves that do not "
            f"move, got {structure} for {tree}"
        )
    return [_tangent(leaf, way) for leaf, way in zip(leaves, ways, strict=True)]


def _tangent(leaf: ArrayLike, way: ArrayLike | None) -> Array | None:
    if way is None:
        return None
    dtype = jnp.result_type(leaf)
    if jnp.shape(way) != jnp.shape(leaf) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"direction must have the shape of the floating-point input that it moves, got "
            f"{jnp.shape(way)} for {dtype}{list(jnp.shape(leaf))}"
        )
    if not isinstance(way, Tracer) and not np.isfinite(np.asarray(way)).all():
        raise ValueError("direction must be finite numbers, got NaN or infinity")
    return jnp.asarray(way, dtype)


def _run(
    body: jaxprs.Body, arguments: Sequence[tuple[Any, bool]], outer: Place
) -> list[tuple[Any, bool]]:
    """Evaluates a jaxpr on values and whether each of them moves, without custom derivatives.

    Raises:
      UnsupportedOpError: at the first op that may jump.
    """
    known: dict[Any, tuple[Any, bool]] = {}

    def read(atom: Any) -> tuple[Any, bool]:
        constant = jaxprs.literal(atom)
        return known[atom] if constant is None else (constant, False)

    known.update(zip(body.jaxpr.constvars, ((c, False) for c in body.consts), strict=True))
    known.update(zip(body.jaxpr.invars, arguments, strict=True))
    for eqn in jaxprs.live(body.jaxpr):
        results = _step(eqn, [read(atom) for atom in eqn.invars], jaxprs.place(eqn, outer))
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in body.jaxpr.outvars]


def _step(eqn: Any, operands: Sequence[tuple[Any, bool]], place: Place) -> list[tuple[Any, bool]]:
    """The values of one equation's outputs, and whether they move."""
    name, moves = eqn.primitive.name, [moved for _, moved in operands]
    values = [value for value, _ in operands]
    if not any(moves):
        return [(value, False) for value in jaxprs.evaluate(eqn, values)]
    if name in jaxprs.CALLS:
        function = _own(eqn)
        if function is not None:
            return [(function(*values), True)]
        return _run(jaxprs.called(eqn), operands, place)
    if name == "stop_gradient":
        return list(operands)
    if not _is_continuous(eqn, name, values, moves):
        raise UnsupportedOpError(
            f"'{name}' at {place.location} is not continuous everywhere, and a derivative does not "
            "see jumps; bound the difference of two values instead, f(x + d) - f(x)"
        )
    return [(value, True) for value in jaxprs.evaluator(eqn)(*values)]


def _own(eqn: Any) -> Callable[..., Array] | None:
    """JAX's continuous function, such as `jax.nn.gelu`, that a call is."""
    name = eqn.params.get("name")
    if "jaxpr" not in eqn.params or len(eqn.outvars) != 1:
        return None
    for op, function in table.traced_as(name):
        if isinstance(op, Scalar) and not op.jumps and jaxprs.calls_the_same(eqn, name, function):
            return function
    return None


def _is_continuous(eqn: Any, name: str, values: Sequence[Any], moves: Sequence[bool]) -> bool:
    dtypes = {jnp.result_type(v) for v, moved in zip(values, moves, strict=True) if moved}
    dtypes |= {aval.dtype for aval in jaxprs.outputs_of(eqn)}
    if len(dtypes) > 1 or not jnp.issubdtype(dtypes.pop(), jnp.floating):
        return False  # a cast to fewer bits is a staircase, whose derivative JAX takes for 1
    if name == "integer_pow":
        return eqn.params["y"] >= 0
    if name == "select_n":
        return not moves[0]
    if name in _CONTINUOUS_IN_FIRST:
        return not any(moves[_CONTINUOUS_IN_FIRST[name] :])
    return name in _CONTINUOUS

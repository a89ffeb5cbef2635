"""function -> Graph: the one place that combines the builder with control flow and rewrites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.node import Graph
from boundjax.sets.rounding import Rounding
from boundjax.tracing import control, integers, jaxprs, labels, patterns, refusals, solves
from boundjax.tracing.builder import Built, build
from boundjax.tracing.formulas import Formulas

_RULES = {**control.RULES, **integers.RULES, **solves.RULES}


def trace(
    function: Callable[[Array], Any], example: Array, rounding: Rounding = "nearest"
) -> Graph:
    """Traces a function of one example.

    Args:
      function: any JAX function of one array; it may close over (traced) weights.
      example: an array or tracer of the input's shape; its values are not used.
      rounding: what bounds on the graph are to hold for. Unless it is `"nearest"`, the graph says
        which constants are rounded; under `"float32"` it keeps the form that the function computes.

    Raises:
      TypeError: if the example is neither float32 nor float64.
      UnsupportedOpError: at the first equation on a perturbed value that the table does not cover.
    """
    if jnp.result_type(example) not in (jnp.float32, jnp.float64):
        # Half precision would round the bounds themselves at the third digit.
        raise TypeError(
            f"the input set must be float32 or float64, got {jnp.result_type(example)}; "
            "convert it, e.g. x.astype(jnp.float32)"
        )
    with refusals.explained():
        closed, output_shape = jax.make_jaxpr(function, return_shape=True)(example)
    shape = jax.ShapeDtypeStruct(jnp.shape(example), jnp.result_type(example))
    built = trace_body(jaxprs.body_of(closed), [shape], rounding)
    return Graph(
        nodes=labels.label(built.nodes),
        outputs=tuple(built.outputs),
        output_tree=jax.tree.structure(output_shape),
        constants=built.constants,
    )


def trace_body(
    body: jaxprs.Body, arguments: Sequence[Any], rounding: Rounding = "nearest"
) -> Built:
    """Builds the perturbed nodes and the outputs of a jaxpr, see `builder.build`."""
    formulas = None if rounding == "nearest" else Formulas(_RULES)
    return build(body, arguments, _RULES, patterns.rewriter(rounding), formulas)

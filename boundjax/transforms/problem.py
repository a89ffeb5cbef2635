"""What a transform bounds: a traced function, an input set and a specification, all checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import chex
import jax.numpy as jnp
from jax import Array

from boundjax.ir.node import Graph, Node, NoProofError, Perturbed
from boundjax.sets.checks import require_input_set, warn_if_rounded
from boundjax.sets.input_set import InputSet, outwards
from boundjax.sets.rounding import Rounding
from boundjax.tracing.trace import trace


def require_rounding(rounding: str) -> None:
    """Checks the name of a rounding mode.

    Raises:
      ValueError: for another name.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(
            f"rounding must be one of {', '.join(get_args(Rounding))}, got {rounding!r}"
        )


def require_plain_sums(platform: str) -> None:
    """Checks that a device computes products as sums of products, in the precision of the dtype.

    Raises:
      NoProofError: for any device but a CPU. A GPU's convolutions may go through transforms
        (Winograd, FFT) that round more, and nobody has measured its functions or a TPU's.
    """
    if platform != "cpu":
        raise NoProofError(
            f"nothing is proved about rounding on {platform!r} devices; compute on the CPU "
            "(devices=jax.devices('cpu') or JAX_PLATFORMS=cpu), or take rounding='nearest'"
        )


def traced(
    function: Callable[[Array], Any], input_set: InputSet, rounding: Rounding
) -> tuple[Graph, InputSet]:
    """The graph and the set to bound; the set rounds outwards unless `rounding` is `"nearest"`.

    Raises:
      TypeError: for anything that is not an input set, or a custom one that does not round.
      UnsupportedOpError, NoProofError: as `trace`.
    """
    example = example_of(input_set)
    warn_if_rounded(input_set if rounding == "nearest" else outwards(input_set))
    if rounding == "nearest":
        return trace(function, example), input_set
    graph = trace(function, example, rounding)
    if not all(isinstance(output, Perturbed) for output in graph.outputs):
        raise NoProofError(
            "nobody bounds the rounding of an output that does not depend on the input; leave it "
            "out, or take rounding='nearest'"
        )
    return graph, outwards(input_set)


_INTERVAL_OF_A_SET = "the interval() of an input set must have two ends of one shape"


def example_of(input_set: InputSet) -> Array:
    """A value with the input's shape and dtype, to trace a function with.

    Raises:
      TypeError: for anything that is not an input set.
      AssertionError: for a custom input set whose interval has ends of different shapes, or of a
        type that is not floating-point.
    """
    require_input_set(input_set)
    lower, upper = input_set.interval()
    chex.assert_equal_shape([lower, upper], custom_message=_INTERVAL_OF_A_SET)
    chex.assert_type([lower, upper], float)
    return lower


def starts_of(graph: Graph, specification: Array) -> tuple[dict[int, Array], Array]:
    """A specification `[m, *out]` as coefficients on nodes, by index, and a constant `[m]`.

    Raises:
      ValueError: if the function has several outputs or the shapes do not fit.
    """
    if len(graph.outputs) != 1:
        raise ValueError(
            f"a specification needs a function with one output array, got {len(graph.outputs)}"
        )
    (output,) = graph.outputs
    shape = graph.nodes[output.index].shape if isinstance(output, Perturbed) else output.shape
    if specification.ndim < 1 or specification.shape[1:] != tuple(shape):
        raise ValueError(
            f"specification must have shape [m, {', '.join(map(str, shape))}] for an output of "
            f"shape {tuple(shape)}, got {specification.shape}"
        )
    if isinstance(output, Perturbed):
        return {output.index: specification}, jnp.zeros(
            specification.shape[:1], specification.dtype
        )
    axes = tuple(range(1, specification.ndim))
    source = graph.nodes[0]
    zeros = jnp.zeros((specification.shape[0], *source.shape), specification.dtype)
    return {0: zeros}, jnp.sum(specification * output[None], axis=axes)


def node_of_output(graph: Graph) -> Node:
    """The node of the one output array that `has_aux` needs.

    Raises:
      ValueError: if the function has several outputs, or one that does not depend on the input.
    """
    perturbed = [o for o in graph.outputs if isinstance(o, Perturbed)]
    if len(graph.outputs) != 1 or not perturbed:
        raise ValueError(
            "has_aux needs a function with one output array, which depends on the input; got "
            f"{len(graph.outputs)}, of which {len(perturbed)} depend on it"
        )
    return graph.nodes[perturbed[0].index]

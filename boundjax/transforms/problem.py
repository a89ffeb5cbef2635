"""What a transform bounds: a traced function, an input set and a specification, all checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jax import Array

from boundjax.ir.node import Graph, Node, NoProofError, Perturbed
from boundjax.sets.checks import warn_if_rounded
from boundjax.sets.input_set import InputSet, outwards
from boundjax.sets.inputs import Inputs, inputs_of
from boundjax.sets.rounding import Rounding
from boundjax.tracing.trace import trace
from boundjax.typing import PyTree


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


class Problem(NamedTuple):
    """What to bound.

    Attributes:
      graph: of the function of one array.
      input_set: of that array.
      inputs: the array as the function's argument, which may be a pytree.
    """

    graph: Graph
    input_set: InputSet
    inputs: Inputs


def traced(function: Callable[[Any], Any], value: InputSet | PyTree, rounding: Rounding) -> Problem:
    """The graph and the set to bound; the set rounds outwards unless `rounding` is `"nearest"`.

    Args:
      function: of one example.
      value: an input set, or a pytree of sets and of arrays that are not perturbed.
      rounding: what the bounds hold for.

    Raises:
      TypeError: for an input without an input set, or with a custom one that does not round.
      ValueError: for a function that looks for a key that the pytree does not have.
      UnsupportedOpError, NoProofError: as `trace`.
    """
    inputs = inputs_of(value)
    function, input_set = inputs.applied(function), inputs.input_set
    example = example_of(input_set)
    warn_if_rounded(value if rounding == "nearest" else outwards(input_set))
    if rounding == "nearest":
        return Problem(trace(function, example), input_set, inputs)
    graph = trace(function, example, rounding)
    if not _all_perturbed(graph):
        constant = [not isinstance(output, Perturbed) for output in graph.outputs]
        graph = trace(functools.partial(_beside_input, function, constant), example, rounding)
        if not _all_perturbed(graph):
            raise NoProofError(
                "nobody bounds the rounding of an output of another type than the input that does "
                "not depend on it; leave it out, or take rounding='nearest'"
            )
    return Problem(graph, outwards(input_set), inputs)


def _all_perturbed(graph: Graph) -> bool:
    return all(isinstance(output, Perturbed) for output in graph.outputs)


def _beside_input(function: Callable[[Array], Any], constant: Sequence[bool], x: Array) -> Any:
    """The outputs of a function; those that are constant as elements beside one of the input.

    To move numbers is exact, and how constants round is charged where they meet the input.
    """
    leaves, tree = jax.tree.flatten(function(x))
    for k, leaf in enumerate(leaves):
        if constant[k] and jnp.result_type(leaf) == x.dtype and x.size:
            joined = jnp.concatenate([jnp.ravel(leaf), jnp.ravel(x)[:1]])
            leaves[k] = jnp.reshape(joined[:-1], jnp.shape(leaf))
    return jax.tree.unflatten(tree, leaves)


_INTERVAL_OF_A_SET = "the interval() of an input set must have two ends of one shape"


def example_of(input_set: InputSet) -> Array:
    """A value with the shape and dtype of the one array of a set, to trace a function with.

    Raises:
      AssertionError: for a custom input set whose interval has ends of different shapes, or of a
        type that is not floating-point.
    """
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

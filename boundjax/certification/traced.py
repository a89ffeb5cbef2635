"""A model as a traced program, which is what is bounded and what compiled code is kept for."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.certification.explain import explained
from boundjax.certification.models import PureModel
from boundjax.tracing import refusals
from boundjax.tracing.programs import Program, trace_program
from boundjax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class TracedApply:
    """The `Apply` of a traced model, for the size of batch that it was traced with.

    Its variables are a pair: those of the model, and the weights that it closes over. It is equal
    to another if they are the same program.
    """

    program: Program

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`; a traced model takes no key."""
        del key
        weights, captured = variables
        return self.program(captured, weights, x, tuple(constants))


class TracedModel(NamedTuple):
    """A model, traced.

    Attributes:
      apply: its function.
      variables: of `apply`.
      shape: of the logits.
    """

    apply: TracedApply
    variables: PyTree
    shape: tuple[int, ...]


def traced(model: PureModel, x: np.ndarray, constants: Sequence[PyTree], size: int) -> TracedModel:
    """Traces a model for batches of `size` examples like those of `x` `[B, ...]`.

    Raises:
      ValueError, TypeError: if the model cannot be called like this, or returns something else than
        one array with an axis for the batch.
    """

    def logits(variables: PyTree, x: Array, constants: tuple[PyTree, ...]) -> Array:
        result: Any = model.apply(variables, x, None, constants)
        if not isinstance(result, jax.Array | np.ndarray):
            raise ValueError(_many(result))
        return jnp.asarray(result)

    def of_size(count: int) -> tuple[Any, Any]:
        def shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)

        return shape(x), jax.tree.map(shape, tuple(constants))

    arguments = of_size(size)
    try:
        with refusals.explained():
            trace = trace_program(logits, model.variables, *arguments)
    except Exception as error:
        better = explained(error) or _of_one_example(model, x, constants)
        if better is None:
            raise
        raise better from error
    result: jax.ShapeDtypeStruct = trace.shapes
    if len(result.shape) < 2 or result.shape[0] != size:
        count = max(size, len(x))  # rather the batch that the user knows
        whole = jax.eval_shape(logits, model.variables, *of_size(count))
        raise _of_one_example(model, x, constants) or ValueError(
            f"model must return logits [B, C] with B = {count} for x of shape "
            f"{(count, *x.shape[1:])}, got {whole.shape}"
        )
    if result.shape[-1] < 2:
        raise ValueError(
            f"model must return at least two logits per example, got {result.shape[-1]}; for a "
            "decision at z = 0 return jnp.concatenate([jnp.zeros_like(z), z], axis=1), for the "
            "range of an output use boundjax.linear(f)(boundjax.LpBall(x, eps))"
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(f"model must return floating-point logits, got {result.dtype}")
    variables = model.variables, trace.captured
    return TracedModel(TracedApply(trace.program), variables, tuple(result.shape))


def _many(result: Any) -> str:
    """The error for a model that returns something else than one array."""
    kind = type(result).__name__
    if isinstance(result, tuple):
        example, kind = "y[0]", f"tuple of {len(result)}"
    elif isinstance(result, dict):
        example, kind = f"y[{next(iter(result), 'logits')!r}]", f"dict of {list(result)}"
    else:
        example = "y.logits"
    return (
        f"model must return logits [B, C], one array, got {kind}; pick them with "
        f"output=lambda y: {example}"
    )


def _of_one_example(
    model: PureModel, x: np.ndarray, constants: Sequence[PyTree]
) -> Exception | None:
    """An explanation if the model takes one example where a batch is needed, else None."""

    def shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

    def logits(*arguments: Any) -> Any:
        variables, x, constants = arguments
        return model.apply(variables, x, None, constants)

    try:
        one = jax.eval_shape(
            logits, model.variables, shape(x), jax.tree.map(shape, tuple(constants))
        )
    except Exception:  # whatever goes wrong, it is no function of one example
        return None
    shape_of_one = getattr(one, "shape", ())
    if len(shape_of_one) != 1 or shape_of_one[0] < 2:
        return None
    return ValueError(
        f"model must take a batch [B, ...] and return logits [B, C], but it is a function of one "
        f"example (shape {x.shape[1:]} gives {one.shape}); give jax.vmap(model)"
    )

"""What `certify` accepts as a model, brought to one form: a pure function and its variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from flax import nnx
from jax import Array


class PureModel(NamedTuple):
    """A model as ``apply(variables, x) -> logits`` on a batch.

    Attributes:
      apply: pure and hashable; equal for equal models, so that compiled code can be kept.
      variables: its weights, a pytree; everything that may change between calls.
      cacheable: whether all state is in ``variables``. A plain callable may hide weights that
        change under the same identity, so compiled code for it is never reused.
    """

    apply: Callable[[Any, Array], Array]
    variables: Any
    cacheable: bool


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    module: nn.Module

    def __call__(self, variables: Any, x: Array) -> Array:
        return self.module.apply(variables, x)


@dataclasses.dataclass(frozen=True)
class _NNXApply:
    graphdef: Any

    def __call__(self, state: Any, x: Array) -> Array:
        # A copy: eval mode is set on it, and modules that draw random keys (the carry of nnx.RNN)
        # may only change variables that belong to this trace.
        model = nnx.merge(self.graphdef, state, copy=True)
        model.eval()
        return model(x)


@dataclasses.dataclass(frozen=True)
class _CallableApply:
    function: Callable[[Array], Array]

    def __call__(self, variables: Any, x: Array) -> Array:
        del variables
        return self.function(x)


def as_pure(model: Any) -> PureModel:
    """Brings a model to one form.

    Args:
      model: a bound Linen module; a pair ``(module, variables)``; an NNX module (used in eval
        mode); ``functools.partial(module.apply, variables)``; or any callable from a batch to
        logits.

    Raises:
      TypeError: for an unbound Linen module, or anything that is not callable.
    """
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        return _linen(*model)
    if isinstance(model, nn.Module):
        if model.scope is None:
            raise TypeError(
                f"the Linen module {type(model).__name__} has no variables; "
                "give (module, variables) or module.bind(variables)"
            )
        return _linen(*model.unbind())
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        return PureModel(_NNXApply(graphdef), state, _hashable(graphdef))
    if isinstance(model, functools.partial) and not model.keywords and len(model.args) == 1:
        owner = getattr(model.func, "__self__", None)
        if isinstance(owner, nn.Module) and model.func.__name__ == "apply":
            return _linen(owner, model.args[0])
    if callable(model):
        return PureModel(_CallableApply(model), (), False)
    raise TypeError(
        "model must be a callable from a batch to logits, a bound Linen module, "
        f"(module, variables) or an nnx.Module, got {type(model).__name__}"
    )


def _linen(module: nn.Module, variables: Any) -> PureModel:
    return PureModel(_LinenApply(module), variables, _hashable(module))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

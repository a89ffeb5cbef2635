"""What `certify` accepts as a model, brought to one form: a pure function and its variables."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from flax import nnx
from jax import Array
from jaxtyping import Float

from boundjax.typing import PyTree


class Apply(Protocol):
    """A model's function: logits `[B, C]` of a batch `[B, ...]`.

    Pure and hashable; equal for equal models, so that compiled code can be reused.
    """

    def __call__(
        self, variables: PyTree, x: Float[Array, "B ..."], key: Array | None = None
    ) -> Float[Array, "B C"]:
        """The logits; `key` is the PRNG key of the draws of a stochastic model."""
        ...


class PureModel(NamedTuple):
    """A model as a pure function `apply(variables, x, key=None)` of its variables and a batch.

    Attributes:
      apply: the function.
      variables: its weights, a pytree: everything that may change between calls.
      cacheable: whether all state is in `variables`. A plain callable may hide weights that change
        under the same identity, so compiled code for it is never reused.
    """

    apply: Apply
    variables: PyTree
    cacheable: bool

    @classmethod
    def of(cls, model: Any) -> PureModel:
        """Brings a model to this form.

        Args:
          model: a `PureModel`; a bound Linen module; a pair `(module, variables)`; an NNX module
            (used in eval mode, its state left alone); `functools.partial(module.apply, variables)`;
            or any callable from a batch to logits.

        Raises:
          TypeError: for an unbound Linen module, or anything that is not callable.
        """
        if isinstance(model, PureModel):
            return model
        match model:
            case (nn.Module() as module, variables):
                return cls._of_linen(module, variables)
            case nn.Module():
                if model.scope is None:
                    raise TypeError(
                        f"the Linen module {type(model).__name__} has no variables; "
                        "give (module, variables) or module.bind(variables)"
                    )
                return cls._of_linen(*model.unbind())
            case nnx.Module():
                graphdef, state = nnx.split(model)
                return cls(_NNXApply(graphdef), state, _is_hashable(graphdef))
            case functools.partial(func=method, args=(variables,), keywords=options):
                module = getattr(method, "__self__", None)
                if isinstance(module, nn.Module) and method.__name__ == "apply" and not options:
                    return cls._of_linen(module, variables)
            case _:
                pass
        if callable(model):
            function: Any = model
            return cls(_CallableApply(function), (), False)
        raise TypeError(
            "model must be a callable from a batch to logits, a bound Linen module, "
            f"(module, variables) or an nnx.Module, got {type(model).__name__}"
        )

    @classmethod
    def _of_linen(cls, module: nn.Module, variables: PyTree) -> PureModel:
        return cls(_LinenApply(module), variables, _is_hashable(module))

    def of_one_example(
        self, variables: PyTree, key: Array | None = None
    ) -> Callable[[Array], Float[Array, " C"]]:
        """The logits `[C]` as a function of one example: what is bounded."""
        return one_example(self.apply, variables, key)


def one_example(
    apply: Apply, variables: PyTree, key: Array | None = None
) -> Callable[[Array], Float[Array, " C"]]:
    """The logits `[C]` of a model as a function of one example."""

    def logits(x: Array) -> Array:
        return apply(variables, x[None], key)[0]

    return logits


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    module: nn.Module

    def __call__(self, variables: PyTree, x: Array, key: Array | None = None) -> Array:
        # A bare key serves every `make_rng` of a module, whatever name it asks for.
        logits: Any = self.module.apply(variables, x, rngs=key)
        return logits


@dataclasses.dataclass(frozen=True)
class _NNXApply:
    graphdef: nnx.GraphDef[Any]

    def __call__(self, variables: PyTree, x: Array, key: Array | None = None) -> Array:
        # A copy: eval mode is set on it, and modules that draw random keys (the carry of nnx.RNN)
        # may only change variables that belong to this trace.
        model = nnx.merge(self.graphdef, variables, copy=True)
        model.eval()
        if key is not None:
            nnx.reseed(model, default=key)
        return model(x)


@dataclasses.dataclass(frozen=True)
class _CallableApply:
    function: Callable[[Array], Array]

    def __call__(self, variables: PyTree, x: Array, key: Array | None = None) -> Array:
        del variables
        if key is not None:
            raise TypeError(
                "a plain callable takes no PRNG key; give a Linen or NNX module, or close over the "
                "key"
            )
        return self.function(x)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

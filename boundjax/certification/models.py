"""What `certify` accepts as a model, brought to one form: a pure function and its variables."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from boundjax import stochastic
from boundjax.certification.applies import (
    HOW_TO_DRAW,
    Apply,
    BoundKeyApply,
    CallableApply,
    KeyNeeded,
    LinenApply,
    MeanSoftmaxApply,
    NNXApply,
    OutputApply,
    TreeApply,
    one_example,
    rows_of,
)
from boundjax.typing import PyTree


class PureModel(NamedTuple):
    """A model as a pure function `apply(variables, x, key=None, constants=())`.

    Attributes:
      apply: the function of variables and a batch, see `Apply`.
      variables: its weights, a pytree of arrays.
    """

    apply: Apply
    variables: PyTree

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        call: Mapping[str, Any] | None = None,
        output: Callable[[Any], Array] | None = None,
    ) -> PureModel:
        """Brings a model to this form.

        Args:
          model: a `PureModel`; a bound Linen module; a pair `(module, variables)`; an NNX module
            (used in eval mode, its state left alone); a `functools.partial`, such as
            `partial(module.apply, variables, train=False)`; a callable pytree, whose leaves are its
            variables; or any callable from a batch, or a batch and a PRNG key, to logits.
          call: keywords for every call of the model, such as `{"train": False}`; for Linen those
            of `Module.apply` as well (`method`, `mutable`, `rngs`).
          output: picks the logits from what the model returns, as in `lambda y: y[0]`.

        A Linen module that draws random numbers, or a callable that needs a key, is a random
        network: `apply` then raises a ValueError without a key. An NNX module that draws does so
        with the keys that it holds, which `certify` refuses.

        Raises:
          TypeError: for an unbound Linen module, anything that is not callable, or keywords for a
            model that is in this form already.
        """
        pure = cls._of(model, dict(call or {}))
        if output is None:
            return pure
        if not callable(output):
            raise TypeError(
                "output must be a function that picks the logits, such as lambda y: y[0], got "
                f"{type(output).__name__}"
            )
        return pure._replace(apply=OutputApply(pure.apply, output))

    @classmethod
    def _of(cls, model: Any, options: dict[str, Any]) -> PureModel:
        match model:
            case PureModel():
                if options:
                    raise TypeError("give call= to PureModel.of, not together with its result")
                return model
            case (nn.Module() as module, variables):
                return cls(LinenApply(module, options), variables)
            case nn.Module():
                if model.scope is None:
                    raise TypeError(
                        f"the Linen module {type(model).__name__} has no variables; "
                        "give (module, variables) or module.bind(variables)"
                    )
                module, variables = model.unbind()
                return cls(LinenApply(module, options), variables)
            case nnx.Module():
                graphdef, state = nnx.split(model)
                return cls(NNXApply(graphdef, options), state)
            case functools.partial():
                return cls._of_partial(model, options)
            case _:
                pass
        if not callable(model):
            raise TypeError(
                "model must be a callable from a batch to logits, a bound Linen module, "
                f"(module, variables) or an nnx.Module, got {type(model).__name__}"
            )
        if jax.tree_util.all_leaves([model]):
            function: Any = model
            return cls(CallableApply(function, options), ())
        return cls(*TreeApply.of(model, options, _itself))

    @classmethod
    def _of_partial(cls, model: functools.partial[Any], options: dict[str, Any]) -> PureModel:
        function, options = cast("Any", model.func), {**model.keywords, **options}
        module = getattr(function, "__self__", None)
        if isinstance(module, nn.Module) and function.__name__ == "apply" and len(model.args) == 1:
            return cls(LinenApply(module, options), model.args[0])
        if isinstance(function, nn.Module | nnx.Module) and not model.args:
            return cls._of(function, options)
        parts = (function, *model.args), options
        return cls(*TreeApply.of(parts, {}, _partial))

    def of_one_example(
        self, variables: PyTree, key: Array | None = None
    ) -> Callable[[Array], Float[Array, " C"]]:
        """The logits `[C]` as a function of one example: what is bounded."""
        return one_example(self.apply, variables, key)

    def fixed_draw(self, key: Array, x: ArrayLike) -> PureModel:
        """The network of one draw of a random network, which needs no key any more.

        The draws of `boundjax.stochastic`'s layers are made now, as plain variables, so that a
        certificate of the result can hold for real arithmetic. Whatever else asks for random
        numbers (`make_rng` of a module of one's own, a callable, NNX) gets this key in every call;
        such constants have no proof (`docs/soundness.md`).

        Args:
          key: PRNG key of the draw: the result computes `apply(variables, x, key)`.
          x: a batch `[B, ...]` of inputs; only its shape and dtype are used.

        Raises:
          TypeError: for a callable that takes no key.
        """
        return self._drawn(jnp.asarray(key), jnp.asarray(x))

    def mean_softmax(self, key: Array, x: ArrayLike, draws: int) -> PureModel:
        """The mean softmax of several fixed draws of a random network, as one function.

        This is what `boundjax.stochastic.mean_softmax` predicts with the same key. Its outputs are
        probabilities, so margins of a certificate are differences of probabilities.

        Args:
          key: split into one key per draw.
          x: as for `fixed_draw`.
          draws: number of draws, at least 1. Bounds take as many times the work of one draw.

        Raises:
          TypeError: as `fixed_draw`.
          ValueError: for `draws < 1`.
        """
        stochastic.require_draws(draws)
        keys = jax.random.split(key, draws)
        fixed = [self._drawn(key, jnp.asarray(x)) for key in keys]
        axes = _axes_of_draws(fixed[0])
        variables = _joined(axes, [model.variables for model in fixed])
        return PureModel(MeanSoftmaxApply(fixed[0].apply, draws, axes), variables)

    def require_no_fresh_draws(self, x: Array, constants: Sequence[PyTree] = ()) -> None:
        """Checks that an NNX module does not draw; other random networks cannot run without a key.

        Args:
          x: a batch `[B, ...]`; the first example is evaluated if the module holds keys.
          constants: of the batch.

        Raises:
          ValueError: for an NNX module whose logits of that example change with its keys.
        """
        inner = self.apply.apply if isinstance(self.apply, OutputApply) else self.apply
        if isinstance(inner, NNXApply) and _holds_keys(self.variables):
            # A module may draw what it does not use, such as the first carry of an `nnx.RNN`.
            keys = (jax.random.key(0), jax.random.key(1))
            first = rows_of((x, tuple(constants)), slice(1))
            one, other = (self.apply(self.variables, first[0], key, first[1]) for key in keys)
            if not jnp.array_equal(one, other, equal_nan=True):
                raise KeyNeeded(f"the NNX module draws random numbers in eval mode: {HOW_TO_DRAW}")

    def _drawn(self, key: Array, x: Array) -> PureModel:
        """See `fixed_draw`."""
        if isinstance(self.apply, OutputApply):
            inner = self._replace(apply=self.apply.apply)._drawn(key, x)
            return inner._replace(apply=OutputApply(inner.apply, self.apply.output))
        if isinstance(self.apply, LinenApply):
            module, variables = self.apply.module, self.variables
            options: Any = {**self.apply.options, "rngs": key}
            options["mutable"] = [stochastic.COLLECTION]
            _, recorded = module.apply(variables, x[:1], **options)
            fixed = self._replace(
                variables=stochastic.without_distributions({**variables, **recorded})
            )
            if not _needs_key(fixed, x):
                return fixed
        else:
            fixed = self
            jax.eval_shape(self.apply, self.variables, x, key)  # refuses what takes no key
        bound = {"variables": fixed.variables, "key": jax.random.key_data(key)}
        implementation = jax.random.key_impl(key) if _is_typed(key) else None
        return PureModel(BoundKeyApply(fixed.apply, implementation), bound)


def _itself(model: Any) -> Any:
    return model


def _partial(parts: Any) -> functools.partial[Any]:
    positional, keywords = parts
    return functools.partial(*positional, **keywords)


def _axes_of_draws(fixed: PureModel) -> PyTree:
    """For `jax.vmap`: 0 for the variables of a fixed draw that its key decides, else None."""
    if isinstance(fixed.apply, OutputApply):
        return _axes_of_draws(fixed._replace(apply=fixed.apply.apply))
    if isinstance(fixed.apply, BoundKeyApply):
        inner = fixed._replace(apply=fixed.apply.apply, variables=fixed.variables["variables"])
        return {"variables": _axes_of_draws(inner), "key": 0}
    if isinstance(fixed.apply, LinenApply):
        return {name: 0 if name == stochastic.COLLECTION else None for name in fixed.variables}
    return None


def _joined(axes: PyTree, variables: Sequence[PyTree]) -> PyTree:
    """The variables of several draws as one: stacked along axis 0 where `axes` says so."""
    if isinstance(axes, dict):
        names: dict[str, PyTree] = axes
        return {name: _joined(axis, [v[name] for v in variables]) for name, axis in names.items()}
    if axes is None:
        return variables[0]

    def stacked(*leaves: Array) -> Array:
        return jnp.stack(leaves)

    return jax.tree.map(stacked, *variables)


def _needs_key(model: PureModel, x: Array) -> bool:
    try:
        jax.eval_shape(model.apply, model.variables, x)
    except KeyNeeded:
        return True
    return False


def _holds_keys(variables: PyTree) -> bool:
    """Whether the state of an NNX module has streams of random numbers."""
    return bool(jax.tree.leaves(nnx.filter_state(variables, nnx.RngState)))


def _is_typed(key: Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)

"""What `certify` accepts as a model, brought to one form: a pure function and its variables."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from boundjax import stochastic
from boundjax.typing import PyTree

_HOW_TO_DRAW = (
    "fresh draws for every query cannot be certified; fix a draw with "
    "boundjax.PureModel.of(model).fixed_draw(key, x) or the mean of several with mean_softmax"
)


class KeyNeeded(ValueError):
    """A random network was called without a key."""


class Apply(Protocol):
    """A model's function: logits `[B, C]` of a batch `[B, ...]`.

    Pure and hashable; equal for equal models, so that compiled code can be reused.
    """

    def __call__(
        self, variables: PyTree, x: Float[Array, "B ..."], key: Array | None = None
    ) -> Float[Array, "B C"]:
        """The logits; `key` is the PRNG key of the draws of a random network."""
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
            or any callable from a batch, or a batch and a PRNG key, to logits.

        A Linen module that draws random numbers, or a callable that needs a key, is a random
        network: `apply` then raises a ValueError without a key. An NNX module that draws does so
        with the keys that it holds, which `certify` refuses.

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
        return PureModel(_MeanSoftmaxApply(fixed[0].apply, draws), variables, self.cacheable)

    def require_no_fresh_draws(self, x: Array) -> None:
        """Checks that an NNX module does not draw; other random networks cannot run without a key.

        Args:
          x: a batch `[B, ...]`; the first example is evaluated if the module holds keys.

        Raises:
          ValueError: for an NNX module whose logits of that example change with its keys.
        """
        if isinstance(self.apply, _NNXApply) and _holds_keys(self.variables):
            # A module may draw what it does not use, such as the first carry of an `nnx.RNN`.
            keys = (jax.random.key(0), jax.random.key(1))
            one, other = (self.apply(self.variables, x[:1], key) for key in keys)
            if not jnp.array_equal(one, other, equal_nan=True):
                raise KeyNeeded(f"the NNX module draws random numbers in eval mode: {_HOW_TO_DRAW}")

    def _drawn(self, key: Array, x: Array) -> PureModel:
        """See `fixed_draw`."""
        if isinstance(self.apply, _LinenApply):
            module, variables = self.apply.module, self.variables
            _, recorded = module.apply(variables, x[:1], rngs=key, mutable=[stochastic.COLLECTION])
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
        return PureModel(_BoundKeyApply(fixed.apply, implementation), bound, self.cacheable)


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
        try:
            logits: Any = self.module.apply(variables, x, rngs=key)
        except flax.errors.InvalidRngError as error:
            if key is not None:
                raise
            raise KeyNeeded(
                f"the module {type(self.module).__name__} draws random numbers and got no PRNG "
                f"key: {_HOW_TO_DRAW}"
            ) from error
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
    function: Callable[..., Array]

    def __call__(self, variables: PyTree, x: Array, key: Array | None = None) -> Array:
        del variables
        use = stochastic.use_of_key(self.function)
        if key is None:
            if use == "required":
                raise KeyNeeded(
                    f"the callable takes a batch and a PRNG key, and got no key: {_HOW_TO_DRAW}"
                )
            return self.function(x)
        if use == "none":
            raise TypeError(
                "a plain callable takes no PRNG key; give a Linen or NNX module, a callable of a "
                "batch and a key, or close over the key"
            )
        return self.function(x, key)


@dataclasses.dataclass(frozen=True)
class _BoundKeyApply:
    """A random network with a key among its variables."""

    apply: Apply
    implementation: Any

    def __call__(self, variables: PyTree, x: Array, key: Array | None = None) -> Array:
        del key
        bound = variables["key"]
        if self.implementation is not None:
            bound = jax.random.wrap_key_data(bound, impl=self.implementation)
        return self.apply(variables["variables"], x, bound)


@dataclasses.dataclass(frozen=True)
class _MeanSoftmaxApply:
    """The mean softmax of one model with several draws, stacked in its variables."""

    apply: Apply
    draws: int

    def __call__(self, variables: PyTree, x: Array, key: Array | None = None) -> Array:
        del key
        axes = _axes_of_draws(PureModel(self.apply, variables, cacheable=False))
        # One `vmap`, so that neither the program nor its compilation grows with the draws.
        each = jax.vmap(self.apply, in_axes=(axes, None), axis_size=self.draws)
        return jnp.sum(jax.nn.softmax(each(variables, x)), axis=0) / float(self.draws)


def _axes_of_draws(fixed: PureModel) -> PyTree:
    """For `jax.vmap`: 0 for the variables of a fixed draw that its key decides, else None."""
    if isinstance(fixed.apply, _BoundKeyApply):
        inner = fixed._replace(apply=fixed.apply.apply, variables=fixed.variables["variables"])
        return {"variables": _axes_of_draws(inner), "key": 0}
    if isinstance(fixed.apply, _LinenApply):
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


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

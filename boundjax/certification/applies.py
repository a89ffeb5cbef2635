"""How each kind of model is called: pure functions of its variables and a batch."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from boundjax import stochastic
from boundjax.tracing.programs import traced_together
from boundjax.typing import PyTree

HOW_TO_DRAW = (
    "fresh draws for every query cannot be certified; fix a draw with "
    "boundjax.PureModel.of(model).fixed_draw(key, x) or the mean of several with mean_softmax"
)
_EVAL_MODE = (
    'dropout is switched off by call={"deterministic": True} or call={"train": False}, '
    "as the module names it"
)


class KeyNeeded(ValueError):
    """A random network was called without a key."""


class Apply(Protocol):
    """A model's function: logits `[B, C]` of a batch `[B, ...]`, pure."""

    def __call__(
        self,
        variables: PyTree,
        x: Float[Array, "B ..."],
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Float[Array, "B C"]:
        """The logits.

        Args:
          variables: the weights.
          x: the batch.
          key: the PRNG key of the draws of a random network.
          constants: what the model takes after `x`, pytrees of arrays `[B, ...]`: at most one.
        """
        ...


def rows_of(tree: PyTree, index: Any) -> PyTree:
    """What arrays `[B, ...]` have at some rows; with the index None they get a new first axis."""

    def at(array: Any) -> Any:
        return array[index]

    return jax.tree.map(at, tree)


def one_example(
    apply: Apply, variables: PyTree, key: Array | None = None, constants: Sequence[PyTree] = ()
) -> Callable[[Array], Float[Array, " C"]]:
    """The logits `[C]` of a model as a function of one example.

    Args:
      apply, variables, key: of the model.
      constants: those of the example, without the axis of the batch.
    """
    batch = rows_of(constants, None)

    def logits(x: Array) -> Array:
        return apply(variables, x[None], key, batch)[0]

    return logits


@dataclasses.dataclass(frozen=True)
class LinenApply:
    """A Linen module, called with some options of `Module.apply` or of its method."""

    module: nn.Module
    options: Mapping[str, Any]

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""
        # A bare key serves every `make_rng` of a module, whatever name it asks for.
        options: dict[str, Any] = {
            **self.options,
            "rngs": self.options.get("rngs") if key is None else key,
        }
        try:
            logits: Any = self.module.apply(variables, x, *constants, **options)
        except flax.errors.InvalidRngError as error:
            if options["rngs"] is not None:
                raise
            raise KeyNeeded(
                f"the module {type(self.module).__name__} draws random numbers and got no PRNG "
                f"key: {_EVAL_MODE}; {HOW_TO_DRAW}"
            ) from error
        return logits


@dataclasses.dataclass(frozen=True)
class NNXApply:
    """An NNX module in eval mode, called with some options."""

    graphdef: nnx.GraphDef[Any]
    options: Mapping[str, Any]

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""

        # NNX transforms (`nnx.scan`) refuse modules whose state belongs to another trace than the
        # input, so both are arguments of one.
        def call(variables: PyTree, x: Array, key: Array | None, constants: Any) -> Any:
            # A copy: eval mode is set on it, and modules that draw random keys (the carry of
            # nnx.RNN) may only change variables that belong to this trace.
            model = nnx.merge(self.graphdef, variables, copy=True)
            model.eval()
            if key is not None:
                nnx.reseed(model, default=key)
            return model(x, *constants, **self.options)

        return traced_together(call, variables, x, key, tuple(constants))


@dataclasses.dataclass(frozen=True)
class CallableApply:
    """A callable of a batch, whose weights nobody sees."""

    function: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""
        del variables
        return called(self.function, x, key, constants, self.options)


@dataclasses.dataclass(frozen=True)
class TreeApply:
    """A callable pytree, such as an Equinox module or a `functools.partial` with weights.

    Attributes:
      treedef: its structure.
      static: its leaves that are no weights; None at the places of weights.
      options: keywords of the call.
      rebuild: makes the callable from the pytree.
    """

    treedef: Any
    static: Sequence[Any]
    options: Mapping[str, Any]
    rebuild: Callable[[Any], Callable[..., Any]]

    @classmethod
    def of(
        cls, tree: PyTree, options: Mapping[str, Any], rebuild: Callable[[Any], Callable[..., Any]]
    ) -> tuple[TreeApply, list[Any]]:
        """This form of a pytree, and its weights: all floating-point arrays and random keys."""
        leaves, treedef = jax.tree.flatten(tree)
        weights = [leaf for leaf in leaves if _is_weight(leaf)]
        static = tuple(_WEIGHT if _is_weight(leaf) else leaf for leaf in leaves)
        return cls(treedef, static, options, rebuild), weights

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""
        weights = iter(variables)
        leaves = [next(weights) if leaf is _WEIGHT else leaf for leaf in self.static]
        function = self.rebuild(jax.tree.unflatten(self.treedef, leaves))
        return called(function, x, key, constants, self.options)


_WEIGHT = object()


def _is_weight(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array or a random key; NumPy's numbers are options."""
    if not isinstance(leaf, jax.Array) and not (isinstance(leaf, np.ndarray) and leaf.ndim):
        return False
    dtype = leaf.dtype
    return jnp.issubdtype(dtype, jnp.inexact) or jnp.issubdtype(dtype, jax.dtypes.prng_key)


def called(
    function: Callable[..., Any],
    x: Array,
    key: Array | None,
    constants: Sequence[PyTree],
    options: Mapping[str, Any],
) -> Any:
    """What a callable makes of a batch, its constants, and a key if it takes one.

    Raises:
      KeyNeeded: for a callable that needs a key and gets none.
      TypeError: for a callable that takes no key and gets one.
    """
    if constants:
        if key is not None:
            raise TypeError("a callable takes either constants or a PRNG key, got both")
        return function(x, *constants, **options)
    use, second = stochastic.use_of_key(function), stochastic.second_argument(function)
    if key is None:
        if use == "required" and second not in options:
            raise KeyNeeded(
                "the callable takes a batch and a PRNG key, and got no key: " + HOW_TO_DRAW
                if second is None or any(word in second for word in ("key", "rng", "seed"))
                else f"the model takes a second argument {second!r}, and got none: give an option "
                f"as call={{{second!r}: ...}}, or arrays of each example as constants=..."
            )
        return function(x, **options)
    if use == "none":
        raise TypeError(
            "a plain callable takes no PRNG key; give a Linen or NNX module, a callable of a "
            "batch and a key, or close over the key"
        )
    return function(x, key, **options)


@dataclasses.dataclass(frozen=True)
class OutputApply:
    """A model of which one output is meant, or something computed from its outputs."""

    apply: Apply
    output: Callable[[Any], Array]

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""
        return self.output(self.apply(variables, x, key, constants))


@dataclasses.dataclass(frozen=True)
class BoundKeyApply:
    """A random network with a key among its variables."""

    apply: Apply
    implementation: Any

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""
        del key
        bound = variables["key"]
        if self.implementation is not None:
            bound = jax.random.wrap_key_data(bound, impl=self.implementation)
        return self.apply(variables["variables"], x, bound, constants)


@dataclasses.dataclass(frozen=True)
class MeanSoftmaxApply:
    """The mean softmax of one model with several draws, stacked in its variables.

    Attributes:
      apply: the model of one draw.
      draws: their number.
      axes: for `jax.vmap`, of the variables.
    """

    apply: Apply
    draws: int
    axes: PyTree

    def __call__(
        self,
        variables: PyTree,
        x: Array,
        key: Array | None = None,
        constants: Sequence[PyTree] = (),
    ) -> Array:
        """See `Apply`."""
        del key

        def one(variables: PyTree) -> Array:
            return self.apply(variables, x, None, constants)

        # One `vmap`, so that neither the program nor its compilation grows with the draws.
        each = jax.vmap(one, in_axes=(self.axes,), axis_size=self.draws)
        return jnp.sum(jax.nn.softmax(each(variables)), axis=0) / float(self.draws)

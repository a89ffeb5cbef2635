"""A network as a function of flat inputs, whose compiled programs take the weights as arguments."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var
from jax.sharding import Mesh
from jax.typing import ArrayLike

from boundjax import sharding
from boundjax.ops.domain import without_warnings
from boundjax.typing import PyTree

Flat = Callable[[Array], Array]  # from `[n]` to `[m]`
Fact = TypeVar("Fact")


def weighed(
    apply: Callable[..., Array], products: Sequence[Sequence[int]] = ()
) -> Callable[..., Array]:
    """A function that gives what the rows of a `Property` weigh.

    Args:
      apply: of one example `x`, or of weights and an example.
      products: the property's.

    Returns:
      The outputs of `apply`, after them the elements of `x`, after them the products.
    """

    def function(*arguments: Any) -> Array:
        values = jnp.concatenate([jnp.ravel(apply(*arguments)), jnp.ravel(arguments[-1])])
        if not products:
            return values
        first, second = (values[np.asarray(factor)] for factor in zip(*products, strict=True))
        return jnp.concatenate([values, first * second])

    return function


class FlatNetwork:
    """A function from `[n]` to `[m]` and its programs.

    Attributes:
      weights: the first argument of the programs.
      mesh: the devices that divide batches; None for the default device.
      input_size, output_size: `n` and `m`.
      largest: the number of elements of the largest value that depends on the input.
    """

    def __init__(
        self,
        apply: Callable[..., Array],
        weights: PyTree,
        input_shape: Sequence[int],
        compiled: dict[Any, Any] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Traces the network.

        Args:
          apply: `(weights, x)` -> outputs of any shape, for one float32 example `[*input_shape]`.
          weights: its first argument; None if it takes `x` alone.
          input_shape: of one example.
          compiled: the programs of other networks that differ in the weights' values only.
          mesh: the devices that divide batches.

        Raises:
          ValueError: if the outputs are not floating-point.
        """
        shape = tuple(input_shape)

        def flat(weights: PyTree, x: Array) -> Array:
            example = jnp.reshape(x, shape)
            outputs = apply(example) if weights is None else apply(weights, example)
            return jnp.reshape(outputs, (-1,))

        self._flat, self.weights, self.mesh = flat, weights, mesh
        self._whole_weights = weights
        if mesh is not None:
            self.weights = jax.device_put(weights, mesh.devices.flat[0])
            self._whole_weights = sharding.whole(weights, mesh)
        self._compiled = {} if compiled is None else compiled
        self._compiling = 0.0
        self.input_size = math.prod(shape)
        self.output_size, self.largest = self.shared("sizes", self._sizes)

    def _sizes(self) -> tuple[int, int]:
        """The number of outputs, and of elements of the largest value that is not constant."""
        example = jax.ShapeDtypeStruct((self.input_size,), jnp.float32)
        traced = jax.make_jaxpr(self)(example)
        outputs = traced.out_avals[0]
        if not jnp.issubdtype(outputs.dtype, jnp.floating):
            raise ValueError(f"expected floating-point outputs, got {outputs.dtype}")
        varying, largest = set(traced.jaxpr.invars), self.input_size
        for equation in traced.eqns:
            if not varying.isdisjoint(v for v in equation.invars if isinstance(v, Var)):
                varying.update(equation.outvars)
                sizes = (math.prod(v.aval.shape) for v in equation.outvars)
                largest = max(largest, *sizes)
        return outputs.shape[0], largest

    def clock(self) -> float:
        """Seconds, as `time.monotonic`, that stand still while a program is compiled."""
        return time.monotonic() - self._compiling

    @contextlib.contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Inside, `clock` stands still."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._compiling += time.monotonic() - start

    def __call__(self, x: ArrayLike) -> Array:
        """The outputs `[m]` of an input `[n]`, op by op."""
        return self._flat(self.weights, jnp.asarray(x))

    def shared(self, key: str, make: Callable[[], Fact]) -> Fact:
        """A fact that does not depend on the weights, kept with the programs."""
        if key not in self._compiled:
            with self.stopped_clock():
                self._compiled[key] = make()
        return self._compiled[key]

    def program(
        self,
        key: Any,
        make: Callable[[Flat], Callable[..., Any]],
        *,
        whole: int | None = None,
        like: int | None = None,
    ) -> Program:
        """What `make` does with the network, compiled.

        Args:
          key: names the program.
          make: the network `[n] -> [m]` -> a function of arrays. It may close over nothing that
            depends on the weights.
          whole: the number of arguments that are no batches, which come first; the devices of the
            mesh divide the others. By default nothing is divided.
          like: the index of an argument whose pytree the result has, see `sharding.compiled`.
        """
        if key not in self._compiled:
            flat = self._flat

            # An infinite bound proves nothing, and needs no callback that says so.
            @without_warnings()
            def program(weights: PyTree, *arguments: Any) -> Any:
                return make(lambda x: flat(weights, x))(*arguments)

            # The weights are one more argument.
            mesh, first = (None, 0) if whole is None else (self.mesh, 1 + whole)
            like = None if like is None else 1 + like
            compiled = sharding.compiled(program, mesh, first, like)
            self._compiled[key] = compiled, set[Any]()
        weights = self.weights if whole is None else self._whole_weights
        return Program(self, weights, *self._compiled[key])


class Program:
    """A compiled function of arrays that knows the weights of its network."""

    def __init__(
        self, network: FlatNetwork, weights: PyTree, compiled: Any, called: set[Any]
    ) -> None:
        """`called` has the shapes for which `compiled` has been called."""
        self._network, self._weights = network, weights
        self._compiled, self._called = compiled, called

    def __call__(self, *arguments: Any) -> Any:
        """Compiles on the first call with these shapes, and runs."""
        network = self._network
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(arguments))
        if shapes in self._called:
            return self._compiled(self._weights, *arguments)
        with network.stopped_clock():
            result = self._compiled(self._weights, *arguments)
        self._called.add(shapes)
        return result

    def lower(self, *arguments: Any) -> Any:
        """The lowered program, to be compiled."""
        return self._compiled.lower(self._weights, *arguments)

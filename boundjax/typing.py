"""Names for what JAX gives no complete type."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from jax import Array

# Any nesting of tuples, lists, dictionaries and registered classes with arrays as leaves.
PyTree: TypeAlias = Any

# A `jax.Device`. Its class comes from an extension module without type information.
Device: TypeAlias = Any


class Jitted(Protocol):
    """A jitted function that returns one array."""

    def __call__(self, *arguments: Any) -> Array:
        """Compiles on the first call with these shapes, and runs."""
        ...

    def lower(self, *arguments: Any) -> Any:
        """The lowered program, to be compiled."""
        ...

"""What a function computes, as a program: a traced jaxpr, and the arrays that it closes over.

Compiled code may be reused for the very same program only. Neither a model's identity nor its
equality tells: both ignore what its code reads from elsewhere (a global, a mutable attribute), and
stale code would give a wrong certificate. So a model is traced by every call, which is cheap, and
the trace decides whether what was compiled before may be used again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from boundjax.tracing.jaxprs import body_of, fingerprint, most_steps, subjaxpr

# Any nesting of tuples, lists, dictionaries and registered classes with arrays as leaves.
_PyTree: TypeAlias = Any

# Suffixes of primitives that run Python or foreign code, whose results may depend on anything.
_CALLS_OUTSIDE = ("callback", "ffi_call", "custom_call")
# Parameters of a jitted call that have one entry for each operand.
_OF_OPERANDS = ("donated_invars", "in_shardings", "in_layouts")


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function, without the arrays that may differ between functions of one program.

    Programs are equal if their keys are; equal programs compute the same from equal arguments.

    Attributes:
      key: the traced equations, the values of all constants that are no arguments, the shapes and
        dtypes of the others, and the settings that decide how bounds are traced.
      is_closed: whether the program determines its results. A program with side effects, or one
        that calls code outside of it (callbacks, foreign functions), does not, and equals no other.
    """

    key: Hashable
    is_closed: bool
    _jaxpr: Any = dataclasses.field(compare=False, repr=False)
    _kept: tuple[Any, ...] = dataclasses.field(compare=False, repr=False)
    _outputs: Any = dataclasses.field(compare=False, repr=False)

    def __call__(self, captured: Sequence[Any], *arguments: _PyTree) -> _PyTree:
        """Runs the program.

        Args:
          captured: what the function closed over, as `Trace.captured`.
          *arguments: as the function was traced with, up to the values of arrays.
        """
        taken = iter(captured)
        constants = [next(taken) if value is None else value for value in self._kept]
        function = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(self._jaxpr, []))
        return jax.tree.unflatten(self._outputs, function(*constants, *jax.tree.leaves(arguments)))


class Trace(NamedTuple):
    """A function as a program.

    Attributes:
      program: what it computes.
      captured: the arrays that it closes over and that programs take as arguments.
      shapes: a pytree of the shapes and dtypes of its outputs.
    """

    program: Program
    captured: list[Any]
    shapes: _PyTree


def trace_program(function: Callable[..., _PyTree], *arguments: _PyTree) -> Trace:
    """Traces a function.

    Arrays that it closes over become arguments of the program if they look like weights: floating
    and not filled with one number. The others (indices, masks, numbers) stay constants, because
    loops, branches and known forms may depend on their values; those are part of the key.

    Args:
      function: a JAX function of pytrees.
      *arguments: pytrees of arrays or shapes.
    """
    # A new function object keeps JAX from reusing the trace of an equal module.
    closed, shapes = jax.make_jaxpr(lambda *values: function(*values), return_shape=True)(
        *arguments
    )
    body = body_of(closed)
    jaxpr, constants = _lifted(body.jaxpr, list(body.consts))
    captured: list[Any] = []
    kept: list[Any] = []
    for constant in constants:
        taken = is_weight(constant)
        captured += [constant if _is_key(constant) else jnp.asarray(constant)] if taken else []
        kept.append(None if taken else constant)
    digest, outputs = hashlib.sha256(), jax.tree.structure(shapes)
    is_closed = _digest(digest, jaxpr, [value for value in kept if value is not None])
    key: Hashable = object()  # equal to no other
    if is_closed:
        digest.update(repr(fingerprint(jaxpr)).encode())
        types = tuple(_type(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
        places = tuple(value is None for value in kept)
        key = (str(jaxpr), digest.hexdigest(), types, places, outputs, *_settings())
    program = Program(key, is_closed, _without_constants(jaxpr), tuple(kept), outputs)
    return Trace(program, captured, shapes)


def traced_together(function: Callable[..., _PyTree], *arguments: _PyTree) -> _PyTree:
    """A function of arguments that may belong to different traces, traced as if they were one's."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = jex_core.jaxpr_as_fun(closed)(*jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def is_weight(value: Any) -> bool:
    """Whether an array looks like weights: floating, of several numbers. Random keys do, too."""
    if _is_key(value):
        return True
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact) or np.size(value) < 2:
        return False
    values = np.asarray(value).reshape(-1)
    return bool(values[0] != values[1]) or not bool((values == values[0]).all())


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)


def _type(aval: Any) -> tuple[Any, ...]:
    return aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))


def _settings() -> tuple[Any, ...]:
    """What decides, besides the program, how it is traced and bounded."""
    config: Any = jax.config
    return most_steps(), config.jax_enable_x64, config.jax_default_matmul_precision


def _lifted(jaxpr: Any, constants: list[Any]) -> tuple[Any, list[Any]]:
    """Moves weights that jitted calls inside close over to the constants of the whole."""
    equations: list[Any] = []
    lifted = dict(zip(jaxpr.constvars, constants, strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit") and _has_no_shardings(eqn):
            inner = body_of(eqn.params["jaxpr"])
            called, values = _lifted(inner.jaxpr, list(inner.consts))
            if any(map(is_weight, values)):
                # One function that is called twice has the same variables twice.
                lifted.update(zip(called.constvars, values, strict=True))
                eqn = _with_operands(eqn, called)
        equations.append(eqn)
    if len(lifted) == len(jaxpr.constvars):
        return jaxpr, constants
    values = list(lifted.values())
    # Since JAX 0.11 a jaxpr holds the values, too, without which these would be arguments.
    held = {"consts": values} if hasattr(jaxpr, "consts") else {}
    return jaxpr.replace(constvars=list(lifted), eqns=equations, **held), values


def _has_no_shardings(eqn: Any) -> bool:
    """Whether a jitted call leaves open where its operands and results lie."""
    stated = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return bool(stated) and all(type(one).__name__ == "UnspecifiedValue" for one in stated)


def _with_operands(eqn: Any, called: Any) -> Any:
    """A jitted call of a jaxpr whose constants are operands in front of the others."""
    count = len(called.constvars)
    open_ = {"donated_invars": False, "in_shardings": eqn.params["out_shardings"][0]}
    params = {
        name: (open_.get(name),) * count + tuple(value) if name in _OF_OPERANDS else value
        for name, value in eqn.params.items()
    }
    params["jaxpr"] = jex_core.ClosedJaxpr(_without_constants(called), [])
    return eqn.replace(invars=[*called.constvars, *eqn.invars], params=params)


def _without_constants(jaxpr: Any) -> Any:
    """A jaxpr whose constants are its first operands."""
    changed = {"constvars": [], "invars": [*jaxpr.constvars, *jaxpr.invars]}
    if hasattr(jaxpr, "debug_info"):
        changed["debug_info"] = jaxpr.debug_info.with_unknown_names()
    return jaxpr.replace(**changed)


def _digest(digest: Any, jaxpr: Any, constants: Sequence[Any]) -> bool:
    """Adds what the text of a jaxpr leaves out; False if no text determines its results."""
    for constant in constants:
        if _is_key(constant):
            return False  # random keys have no bytes to compare
        array = np.asarray(constant)
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if eqn.effects or name.endswith(_CALLS_OUTSIDE):
            return False
        for parameter, value in sorted(eqn.params.items()):
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if subjaxpr(part) is not None:
                    body = body_of(part)
                    if not _digest(digest, body.jaxpr, list(body.consts)):
                        return False
                elif isinstance(part, (np.ndarray, jax.Array)):
                    digest.update(np.asarray(part).tobytes())  # texts of long arrays are cut short
                elif callable(part) and not name.startswith("custom_") and parameter != "policy":
                    # Programs keep their parameters, so no other function gets this identity. Rules
                    # of derivatives and of rematerialisation do not change results.
                    digest.update(f"{parameter} {id(part)};".encode())
    return True

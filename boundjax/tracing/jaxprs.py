"""Reads jaxprs: evaluates and compares equations, and locates them in the user's source.

`jax.extend.core` has no stability promise, so equations are recognised by their primitive's name,
and this file alone handles what moved between JAX releases.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray, Tracer
from jax.extend import core as jex_core

from boundjax import precision

# Calls that only wrap a jaxpr; the parameter that holds it differs between releases.
CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "remat",
        "remat2",
        "checkpoint",
        "custom_lin",
    ]
)
_CALL_JAXPRS = ("call_jaxpr", "jaxpr", "fun_jaxpr")

_unroll_limit: contextvars.ContextVar[int] = contextvars.ContextVar("unroll_limit", default=128)


@contextlib.contextmanager
def unroll_limit(steps: int) -> Iterator[None]:
    """Unrolls `scan` and `while` loops of at most `steps` steps in this context (by default 128).

    A longer `scan` is bounded by intervals, step by step, and linear bounds treat its outputs as
    constants: looser, but compiled once whatever its length. A longer `while` is refused.

    Args:
      steps: `>= 0`. The limit is read while a function is traced, so enter the context around
        `jax.jit` or inside it.

    Raises:
      ValueError: for `steps < 0`.
    """
    if steps < 0:
        raise ValueError(f"the unroll limit must be >= 0 steps, got {steps}")
    token = _unroll_limit.set(steps)
    try:
        yield
    finally:
        _unroll_limit.reset(token)


def most_steps() -> int:
    """The unroll limit in force."""
    return _unroll_limit.get()


class Body(NamedTuple):
    """A jaxpr and the values of its constants."""

    jaxpr: Any
    consts: Sequence[Any] = ()


class Scan(NamedTuple):
    """A scan's body, its number of steps, and the positions of its operands by role."""

    body: Body
    length: int
    reverse: bool
    consts: Sequence[int]
    carry: Sequence[int]
    xs: Sequence[int]


def body_of(inner: Any) -> Body:
    """The body of a `Jaxpr` or a `ClosedJaxpr`, which are one class since JAX 0.11."""
    return Body(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))


def called(eqn: Any) -> Body:
    """The body that an equation of one of `CALLS` wraps."""
    return body_of(next(eqn.params[key] for key in _CALL_JAXPRS if key in eqn.params))


def scan_of(eqn: Any) -> Scan:
    """The parameters of a `scan`."""
    p = eqn.params
    positions = range(len(eqn.invars))
    if "ft_in" in p:  # JAX 0.11
        roles = [list(part) for part in p["ft_in"].update(positions).unpack()]
    else:
        first, second = p["num_consts"], p["num_consts"] + p["num_carry"]
        roles = [positions[:first], positions[first:second], positions[second:]]
    return Scan(body_of(p["jaxpr"]), p["length"], p["reverse"], *roles)


class While(NamedTuple):
    """A while loop's condition and body, and the positions of its operands by role."""

    condition: Body
    body: Body
    condition_consts: Sequence[int]
    body_consts: Sequence[int]
    carry: Sequence[int]


def while_of(eqn: Any) -> While:
    """The parameters of a `while`."""
    p = eqn.params
    positions = range(len(eqn.invars))
    first = p["cond_nconsts"]
    second = first + p["body_nconsts"]
    roles = positions[:first], positions[first:second], positions[second:]
    return While(body_of(p["cond_jaxpr"]), body_of(p["body_jaxpr"]), *roles)


def branches_of(eqn: Any) -> list[Body]:
    """The branches of a `cond`; its first operand is the index of one."""
    return [body_of(branch) for branch in eqn.params["branches"]]


def solver_of(eqn: Any, operands: Sequence[Any]) -> tuple[Body, list[Any], list[Any]]:
    """The solver of a `custom_linear_solve`, its constants, and the right-hand sides."""
    lengths, bodies = eqn.params["const_lengths"], eqn.params["jaxprs"]
    first = lengths.matvec + lengths.vecmat
    constants = operands[first : first + lengths.solve]
    right = operands[sum(lengths) :]
    return body_of(bodies.solve), list(constants), list(right)


def evaluate_body(body: Body, values: Sequence[Any]) -> list[Any]:
    """The outputs of a body at these values."""
    return list(jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(body.jaxpr, list(body.consts)))(*values))


def outputs_of(eqn: Any) -> list[Any]:
    """The shape and dtype of every output."""
    return [variable.aval for variable in eqn.outvars]


def live(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on, in order (an unused op must not raise)."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)}
    equations = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            equations.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
    return equations[::-1]


def literal(atom: Any) -> np.ndarray | None:
    """The value of an atom that is a literal, None for a variable."""
    if isinstance(atom, jex_core.Literal):
        assert isinstance(atom.aval, ShapedArray)
        return np.asarray(atom.val, dtype=atom.aval.dtype)
    return None


def evaluator(eqn: Any) -> Callable[..., tuple[Array, ...]]:
    """The equation as a function of its operands' values.

    Products run at the precision of `boundjax.precision`, whatever the model was traced with.
    """
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        eqn = eqn.replace(params={**eqn.params, "precision": (precision.of_products(),) * 2})
    if not any(subjaxpr(value) is not None for value in eqn.params.values()):

        def bind(*values: Array) -> tuple[Array, ...]:
            result = eqn.primitive.bind(*values, **eqn.params)
            return tuple(result) if eqn.primitive.multiple_results else (result,)

        return bind

    closed = _one_equation(eqn)

    def replay(*values: Array) -> tuple[Array, ...]:
        return tuple(jex_core.jaxpr_as_fun(closed)(*values))

    return replay


def _one_equation(eqn: Any) -> Any:
    """A jaxpr of this one equation, which keeps a custom_jvp's derivative (grad relu(0) = 0).

    Every operand becomes a separate variable, because bounds may differ between the places where
    one value occurs.
    """
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    probe = jax.make_jaxpr(lambda *values: values)(*shapes).jaxpr
    alone = eqn.replace(invars=list(probe.invars))
    jaxpr = probe.replace(outvars=list(eqn.outvars), eqns=[alone])
    if hasattr(jaxpr, "debug_info"):
        jaxpr = jaxpr.replace(debug_info=jaxpr.debug_info.with_unknown_names())
    return jex_core.ClosedJaxpr(jaxpr, [])


# Integers and predicates up to this size, and all scalars, stay concrete while tracing.
_CONCRETE_SIZE = 1024


def evaluate(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Folds an equation on constants.

    Under `jit`, arithmetic on concrete numbers gives tracers. Loop counters, branches and the
    constants of a formula must stay concrete, so small results are computed at once.
    """
    concrete = not any(isinstance(o, Tracer) for o in operands)
    if concrete and not eqn.effects and all(_small(v.aval) for v in eqn.outvars):
        with jax.ensure_compile_time_eval():
            return list(evaluator(eqn)(*operands))
    return list(evaluator(eqn)(*operands))


def _small(aval: Any) -> bool:
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    exact = jnp.issubdtype(aval.dtype, jnp.integer) or aval.dtype == jnp.bool_
    return aval.shape == () or (exact and aval.size <= _CONCRETE_SIZE)


def subjaxpr(value: Any) -> Any | None:
    """The jaxpr that a parameter is or wraps, None for another parameter."""
    inner = getattr(value, "jaxpr", value)
    return inner if hasattr(inner, "eqns") and hasattr(inner, "invars") else None


def fingerprint(jaxpr: Any) -> Any:
    """A comparable description of a jaxpr: primitives, wiring, literals and plain parameters."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    numbers: dict[Any, int] = {}

    def atom(a: Any) -> Any:
        if isinstance(a, jex_core.Literal):
            assert isinstance(a.aval, ShapedArray)
            return ("literal", str(a.aval.dtype), a.aval.shape, np.asarray(a.val).tobytes())
        return numbers.setdefault(a, len(numbers))

    def parameter(value: Any) -> Any:
        if subjaxpr(value) is not None:
            return fingerprint(value)
        if isinstance(value, tuple | list):
            return tuple(map(parameter, value))
        # Functions (custom derivative rules) have no stable text beyond their name.
        return getattr(value, "__name__", "function") if callable(value) else repr(value)

    invars = tuple(atom(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    equations = tuple(
        (
            eqn.primitive.name,
            tuple(atom(a) for a in eqn.invars),
            tuple((key, parameter(value)) for key, value in sorted(eqn.params.items())),
            tuple(atom(v) for v in eqn.outvars),
        )
        for eqn in jaxpr.eqns
    )
    return invars, equations, tuple(atom(v) for v in jaxpr.outvars)


def calls_the_same(eqn: Any, name: str, function: Callable[..., Array]) -> bool:
    """Whether a call named `name` holds exactly the equations that JAX's own function has."""
    reference = _reference(name, function, tuple(atom.aval for atom in eqn.invars))
    return reference is not None and reference == fingerprint(eqn.params["jaxpr"])


def _reference(name: str, function: Callable[..., Array], avals: tuple[Any, ...]) -> Any | None:
    """The fingerprint of JAX's composite on operands of these shapes, None if it cannot trace."""
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False))
        for a in avals
    ]
    try:
        outer = jax.make_jaxpr(function)(*shapes)
    except TypeError:  # the function takes another number of operands
        return None
    pending = [outer.jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            if eqn.params.get("name") == name and "jaxpr" in eqn.params:
                return fingerprint(eqn.params["jaxpr"])
            pending += [j for v in eqn.params.values() if (j := subjaxpr(v)) is not None]
    return None


_FRAME = re.compile(r"^(jit|pjit|jvp|vmap|transpose|remat|checkpoint|rematted_computation)\b")


def _folder(package: ModuleType) -> str:
    assert package.__file__ is not None  # only namespace packages have none
    return os.path.dirname(os.path.abspath(package.__file__)) + os.sep


_LIBRARIES = tuple(map(_folder, (jax, flax, *map(importlib.import_module, ("jaxlib", "boundjax")))))


def _public_names() -> dict[str, str]:
    """JAX's functions as users write them, by the name that their frame has in a traceback."""
    modules = {"jax.lax": jax.lax, "jax.nn": jax.nn, "jnp.linalg": jnp.linalg, "jnp": jnp}
    return {
        name: f"{prefix}.{name}"
        for prefix, module in modules.items()
        for name in dir(module)
        if not name.startswith("_") and not isinstance(getattr(module, name), type | ModuleType)
    }


_PUBLIC = _public_names()


def is_library(file: str) -> bool:
    """Whether a file is one of JAX, Flax or this library, or none at all."""
    return file.startswith((*_LIBRARIES, "<"))


class Place(NamedTuple):
    """Where an equation stands: its Flax scope, and the line in the user's source.

    `fixed` keeps this place for all equations inside: they come from a function of this library
    that was traced in place of the user's, and their own lines would not help the user.
    """

    scope: str = ""
    location: str = "unknown source line"
    fixed: bool = False


def place(eqn: Any, outer: Place) -> Place:
    """The place of an equation inside a call that stands at `outer`."""
    if outer.fixed:
        return outer
    stack = (*outer.scope.split("/"), *str(eqn.source_info.name_stack).split("/"))
    scope = "/".join(part for part in stack if part and not _FRAME.match(part))
    traceback = eqn.source_info.traceback
    # Equations inside a call have no frame for the function that was called.
    called = _PUBLIC.get(str(eqn.params.get("name", "")).lstrip("_"), "")
    for frame in traceback.frames if traceback is not None else ():
        # Take the user's innermost frame; equations inside JAX's own calls may have none.
        if not is_library(frame.file_name):
            called = f", in {called}" if called else ""
            location = f"{frame.file_name}:{frame.line_num} ({frame.function_name}{called})"
            return Place(scope, location)
        called = _PUBLIC.get(frame.function_name, called)
    return Place(scope, outer.location)

"""One line for the errors of a model that cannot be called as it was given."""

from __future__ import annotations

import re

import flax.errors
import jax

from boundjax.certification.applies import KeyNeeded
from boundjax.ir.table import UnsupportedOpError

_CURE = (
    'certify it in eval mode: call={"train": False} or call={"deterministic": True}, as the model '
    "names it, nnx models as they are or after model.eval()"
)
_MISSING = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)")
_NAME = re.compile(r"'(\w+)'")
# How flax.linen.merge_param and the layers of flax.nnx word it.
_NOT_SAID = re.compile(
    r"Parameter \"(\w+)\" must be passed|No `(\w+)` argument was provided|"
    r"`(\w+)` (?:parameter|argument) (?:was|must be)"
)
_MANY_VALUES = re.compile(r"got multiple values for argument '(\w+)'")
_NO_KEYWORD = re.compile(r"got an unexpected keyword argument '(\w+)'")


def explained(error: Exception) -> Exception | None:
    """What the user should do about an error of the model; None if it needs no explanation.

    Returns:
      An exception to raise from `error`, of the kind that `certify` documents.
    """
    if isinstance(error, KeyNeeded):
        return None
    text = str(error)
    if isinstance(error, flax.errors.InvalidRngError):
        return ValueError(
            f"the model draws random numbers (dropout in train mode?) and got no PRNG key; {_CURE}"
        )
    if isinstance(error, flax.errors.ModifyScopeVariableError):
        return ValueError(
            f"the model updates its variables (batch statistics in train mode?); {_CURE}"
        )
    if isinstance(error, flax.errors.TraceContextError):
        return ValueError(
            "the model updates its own state while it is called (batch statistics, counts of "
            "random keys); give the nnx module itself rather than a function around it, or "
            "call model.eval() first"
        )
    if isinstance(error, UnsupportedOpError) and isinstance(
        error.__cause__, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError
    ):
        return UnsupportedOpError(
            f"{text}; if it is a value of the model's weights, give a function around the model: "
            "lambda x: model(x)"
        )
    if found := _NOT_SAID.search(text):
        name = next(group for group in found.groups() if group)
        return ValueError(
            f"the model does not know whether it runs in eval mode; give call={{{name!r}: True}}, "
            'or what it is called in the model, such as call={"train": False}'
        )
    return _of_arguments(text) if isinstance(error, TypeError) else None


def _of_arguments(text: str) -> Exception | None:
    """What to do about a call with the wrong arguments."""
    if found := _MISSING.search(text):
        names = _NAME.findall(found[1])
        options = ", ".join(f"{name!r}: ..." for name in names)
        return TypeError(
            f"the model takes more arguments than a batch ({', '.join(names)}); give options as "
            f"call={{{options}}}, for example call={{'train': False}}, and arrays of each example "
            "as constants=..."
        )
    if found := _MANY_VALUES.search(text):
        return TypeError(
            f"the batch was given as {found[1]!r}, which has a value already; fix arguments that "
            "come before x by position, as in functools.partial(transformed.apply, params, None)"
        )
    if found := _NO_KEYWORD.search(text):
        return TypeError(
            f"the model takes no argument {found[1]!r}, which call= or functools.partial names"
        )
    return None

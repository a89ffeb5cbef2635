"""For which arithmetic a certificate can be proved, and what to do where it cannot."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

from boundjax.certification.presets import Method, Transform
from boundjax.ir.node import NoProofError
from boundjax.sets.rounding import Rounding

Answer = TypeVar("Answer")


def with_proof(
    rounding: Rounding | None, method: Method | Transform, attempt: Callable[[Rounding], Answer]
) -> Answer:
    """Answers for the arithmetic that was asked for; by default for the best that has a proof.

    Args:
      rounding: the argument of `certify`.
      method: a transform rounds as it says itself.
      attempt: answers for one arithmetic.

    Raises:
      ValueError: for an unknown rounding, or one beside a transform.
      NoProofError: if there is no proof for the rounding that was asked for.
    """
    if rounding is not None and rounding not in get_args(Rounding):
        raise ValueError(
            f"rounding must be one of {', '.join(get_args(Rounding))}, got {rounding!r}"
        )
    if callable(method):
        if rounding is not None:
            raise ValueError(
                "rounding belongs to the transform; pass "
                f"functools.partial(boundjax.linear, rounding={rounding!r}) as the method"
            )
        return attempt(rounding_of(method))
    if rounding is not None:
        return attempt(rounding)
    try:
        return attempt("real")
    except NoProofError as error:
        warnings.warn(
            f"{error}; this certificate holds up to the rounding of its bounds only "
            "(arithmetic='nearest')",
            stacklevel=3,
        )
        return attempt("nearest")


def rounding_of(transform: Transform) -> Rounding:
    """What the bounds of a transform hold for: its option `rounding`, else `"nearest"`."""
    if isinstance(transform, functools.partial):
        partial = cast("functools.partial[Any]", transform)
        stated: Rounding | None = partial.keywords.get("rounding")
        return rounding_of(partial.func) if stated is None else stated
    return "nearest"

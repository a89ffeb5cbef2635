"""Compares what a file holds with what it should hold.

The files of a run are read by other versions, on other machines and after kills. Code that checks
their contents raises a `FormatError`; code that reads a file turns that into an `ExperimentError`
with the name of the file.
"""

from __future__ import annotations

import json
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, NoReturn

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
# Number of digits of the largest 64-bit integer.
_DIGITS = 19


class FormatError(ValueError):
    """What a file should hold, what it holds instead and what to do about it."""

    def __init__(self, reason: str, advice: str = ""):
        """Without `advice`, the code that reads the file gives its own."""
        super().__init__(reason)
        self.advice = advice


class Rule(NamedTuple):
    """A condition on a value, in words and as a function."""

    expected: str
    holds: Callable[[Any], bool]


def shown(value: Any) -> str:
    """Returns a short form of any value for messages, on one line."""
    return _SHORT.repr(value)


def is_text(value: Any) -> bool:
    """Whether a value is a text that prints on one line and is more than spaces."""
    if not isinstance(value, str):
        return False
    # `isprintable` accepts only the ASCII space; all spaces have the category Zs.
    printable = all(char.isprintable() or unicodedata.category(char) == "Zs" for char in value)
    return printable and bool(value.strip())


def is_number(value: Any) -> bool:
    """Whether a value is a finite number and no `bool`."""
    # The comparison is False for NaN.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def integer(least: int = -(2**63)) -> Rule:
    """Accepts integers `>= least`."""
    return Rule(
        "an integer" if least == -(2**63) else f"an integer >= {least}",
        lambda value: type(value) is int and value >= least,
    )


def one_of(names: Collection[str]) -> Rule:
    """Accepts only these texts."""
    return Rule(" or ".join(names), lambda value: isinstance(value, str) and value in tuple(names))


TEXT = Rule("a line of text", is_text)
NUMBER = Rule("a finite number", is_number)
NOT_NEGATIVE = Rule("a finite number >= 0", lambda value: is_number(value) and value >= 0)
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def parse_object(text: str) -> dict[str, Any]:
    """Parses a JSON object strictly: without NaN, repeated keys or integers beyond 64 bits.

    Raises:
      FormatError: for any other text.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_reject_constant,
            parse_int=_integer,
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"expected JSON, got something else ({reason})") from error
    if not isinstance(value, dict):
        raise FormatError(f"expected a JSON object, got {shown(value)}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    group = dict(pairs)
    if len(group) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"expected every key once, got {shown(repeated)} twice")
    return group


def _reject_constant(constant: str) -> NoReturn:
    raise FormatError(f"expected JSON, got the number {constant}")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise FormatError(f"expected integers of 64 bits, got one of {len(text)} digits")
    return int(text)


def check_group(
    prefix: str,
    group: Mapping[str, Any],
    rules: Mapping[str, Rule],
    optional: Collection[str] = (),
    allow_unknown: bool = False,
) -> None:
    """Checks the values of an object by key.

    Args:
      prefix: text before the keys in messages, such as `settings.`.
      group: the object.
      rules: the condition on the value of each key.
      optional: keys that may be missing.
      allow_unknown: whether keys without a rule are accepted.

    Raises:
      FormatError: for a key that is missing or unknown, or a value that breaks its rule.
    """
    for key in group:
        if key not in rules and not allow_unknown:
            raise FormatError(f"unknown key {shown(prefix + key)}")
    for key, rule in rules.items():
        if key in group and not rule.holds(group[key]):
            raise FormatError(f"{prefix}{key} must be {rule.expected}, got {shown(group[key])}")
        if key not in group and key not in optional:
            raise FormatError(f"{prefix}{key} is missing, expected {rule.expected}")

"""What a file should hold, compared with what it holds.

The files of a run are read by other versions, on other machines and after kills. Code that checks
their contents raises a `FormatError`; code that reads a file turns it into an `ExperimentError`
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
# The digits of the largest 64-bit integer.
_DIGITS = 19


class FormatError(ValueError):
    """What a file should hold and what it holds instead, and what to do about it."""

    def __init__(self, reason: str, advice: str = ""):
        """Without `advice` the caller gives its own."""
        super().__init__(reason)
        self.advice = advice


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def shown(value: Any) -> str:
    """The short form of a value for messages: one line, whatever it holds."""
    return _SHORT.repr(value)


def is_text(value: Any) -> bool:
    """Whether it is a text that can be printed in a line, with more than spaces in it."""
    if not isinstance(value, str):
        return False
    # Python does not count the spaces of other scripts as printable.
    printable = all(char.isprintable() or unicodedata.category(char) == "Zs" for char in value)
    return printable and bool(value.strip())


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a `bool` is none."""
    # The comparison is False for NaN.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def integer(least: int = -(2**63)) -> Rule:
    """Accepts integers that are at least `least`."""
    return Rule(
        "an integer" if least == -(2**63) else f"an integer >= {least}",
        lambda value: type(value) is int and value >= least,
    )


def one_of(names: Collection[str]) -> Rule:
    """Accepts these texts and no others."""
    return Rule(" or ".join(names), lambda value: isinstance(value, str) and value in tuple(names))


TEXT = Rule("a line of text", is_text)
NUMBER = Rule("a finite number", is_number)
NOT_NEGATIVE = Rule("a finite number >= 0", lambda value: is_number(value) and value >= 0)
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object, without the extensions of Python: no NaN, no key twice, no endless integers.

    Raises:
      FormatError: for any other text.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_integer
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"expected JSON, got something else ({reason})") from error
    if not isinstance(value, dict):
        raise FormatError(f"expected a JSON object, got {shown(value)}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    group = dict(pairs)
    if len(group) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"expected every key once, got {shown(twice)} twice")
    return group


def _no_constant(constant: str) -> NoReturn:
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
    others: bool = False,
) -> None:
    """Checks the values of an object by key.

    Args:
      prefix: of the keys in messages: `settings.`.
      group: the object.
      rules: by key.
      optional: which of the keys may be missing.
      others: whether there may be further keys.

    Raises:
      FormatError: for a key that is missing or unknown, or a value that is not as its rule says.
    """
    for key in group:
        if key not in rules and not others:
            raise FormatError(f"unknown key {shown(prefix + key)}")
    for key, rule in rules.items():
        if key in group and not rule.holds(group[key]):
            raise FormatError(f"{prefix}{key} must be {rule.expected}, got {shown(group[key])}")
        if key not in group and key not in optional:
            raise FormatError(f"{prefix}{key} is missing, expected {rule.expected}")

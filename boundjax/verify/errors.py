"""Errors of the command in one line."""

from __future__ import annotations


class VerifyError(ValueError):
    """A request that cannot be answered; the message is one line."""


def one_line(error: BaseException) -> str:
    """The message of an error in at most 400 characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."

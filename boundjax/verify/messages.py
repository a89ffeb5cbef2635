"""What the command and its worker say to each other: one line of JSON per message."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Literal, get_args

from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES
from boundjax.search.method import Method

if TYPE_CHECKING:
    from boundjax.sets.rounding import Rounding

Answered = Literal["sat", "unsat", "unknown", "timeout", "unsupported", "error"]
ANSWERED: tuple[Answered, ...] = get_args(Answered)
SOLVED = ("sat", "unsat")


@dataclasses.dataclass(frozen=True)
class Request:
    """A property to decide.

    Attributes:
      onnx: path of the network, or for a query of VNN-LIB 2.0 the path of each network by name.
      vnnlib: path of the property or query.
      method, rounding: see `boundjax.verify.verify`.
      seconds: what is left of the time limit.
      proof: the path of the file for a proof of `unsat`; empty if none is wanted.
      max_bytes, max_queue_bytes, count_compilation: see `boundjax.verify.verify`.
    """

    onnx: str | dict[str, str]
    vnnlib: str
    method: Method
    rounding: Rounding
    seconds: float
    proof: str = ""
    max_bytes: int = MAX_BYTES
    max_queue_bytes: int = MAX_QUEUE_BYTES
    count_compilation: bool = True


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the worker does now, in a few words, for the progress line."""

    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
      verdict: the verdict of a `Result`, or `"unsupported"` or `"error"`.
      message: why there is no verdict, or what failed in the search; one line, often empty.
      text: the result in the format of VNN-COMP, or of VNN-LIB 2.0 for a query; empty if there is
        no verdict.
    """

    verdict: Answered
    message: str = ""
    text: str = ""


Message = Request | Stage | Answer
_KINDS = {kind.__name__: kind for kind in (Request, Stage, Answer)}


def encode(message: Message) -> bytes:
    """A message as a line."""
    return json.dumps([type(message).__name__, dataclasses.asdict(message)]).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line."""
    kind, fields = json.loads(line)
    return _KINDS[kind](**fields)

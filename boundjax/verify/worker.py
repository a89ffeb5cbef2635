"""The process that decides properties: reads requests on stdin, writes answers on stdout.

`supervisor` starts it and ends it. It also ends by itself as soon as the supervisor is gone,
whatever it is computing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from boundjax.verify.errors import VerifyError, one_line
from boundjax.verify.messages import Answer, Request, Stage, decode, encode

if TYPE_CHECKING:
    from boundjax.search.search import Result
    from boundjax.sets.rounding import Rounding
    from boundjax.verify.network import Source, Verifier
    from boundjax.vnnlib import Query

    ReadNetwork = Callable[[Source, Rounding, int], Verifier]

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Raised for bad input and when memory runs out; XLA raises RuntimeError.
_EXPECTED = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


def result_text(result: Result, query: Query | None = None) -> str:
    """The verdict, and for `sat` the values of all variables.

    They are written as VNN-COMP does, `((X_0 0.5) (Y_0 1.0))` with a variable a line, or as
    VNN-LIB 2.0 does for a query.
    """
    counterexample = result.counterexample
    if counterexample is None:
        return f"{result.verdict}\n"
    inputs, outputs = counterexample.inputs, counterexample.outputs
    if query is not None:
        return f"{result.verdict}\n{query.assignment(inputs, outputs)}"
    names = [*(f"X_{i}" for i in range(len(inputs))), *(f"Y_{i}" for i in range(len(outputs)))]
    values = zip(names, (*inputs, *outputs), strict=True)
    lines = "\n".join(f"({name} {float(value)!r})" for name, value in values)
    return f"{result.verdict}\n({lines})\n"


class Decider:
    """Decides properties; consecutive ones of a network read it once."""

    def __init__(self, network: ReadNetwork, say: Callable[[Stage], None]):
        """Reads networks with `network(path, rounding, max_bytes)`; `say` is told of stages."""
        self._network, self._say = network, say
        self._current: tuple[Any, Verifier] | None = None

    def answer(self, request: Request) -> Answer:
        """Answers a request; an exception becomes the verdict `unsupported` or `error`."""
        end = time.monotonic() + request.seconds
        try:
            query = _query(request)
            result = self._result(request, query, end)
        except Exception as error:  # one bad instance must not end a benchmark
            if not isinstance(error, _EXPECTED):
                traceback.print_exc()
            return Answer("unsupported" if _is_unsupported(error) else "error", one_line(error))
        if result is None:
            return Answer("timeout", "reading the network took all of the time", "timeout\n")
        notes = [result.note, _saved(request, query, result)]
        text = result_text(result, query)
        return Answer(result.verdict, "; ".join(filter(None, notes)), text)

    def _result(self, request: Request, query: Query | None, end: float) -> Result | None:
        from boundjax import vnnlib

        source = _source(request, query)
        key = source, request.rounding, request.max_bytes
        if self._current is None or self._current[0] != key:
            self._say(Stage("reading"))
            self._current = None  # free the last network's memory before the next is read
            network = self._network(source, request.rounding, request.max_bytes)
            self._current = key, network
        property = vnnlib.load(request.vnnlib) if query is None else query.property
        left = end - time.monotonic()
        if left <= 0:
            return None
        self._say(Stage("searching"))
        return self._current[1].verify(
            property,
            request.method,
            left,
            bool(request.proof),
            request.max_queue_bytes,
            request.count_compilation,
        )


def _query(request: Request) -> Query | None:
    """The query of VNN-LIB 2.0; None for a property of VNN-LIB 1.0."""
    from boundjax import vnnlib

    return vnnlib.load_query(request.vnnlib) if vnnlib.is_query(request.vnnlib) else None


def _source(request: Request, query: Query | None) -> Source:
    """The path of the network, or what a query says of each of its networks.

    Raises:
      VerifyError: if networks are missing or not declared.
    """
    files = request.onnx
    if query is None:
        if isinstance(files, str):
            return Path(files)
        if len(files) > 1:
            raise VerifyError(
                f"--network: expected one for a property of VNN-LIB 1.0, got {', '.join(files)}"
            )
        (path,) = files.values()
        return Path(path)
    own = [use.name for use in query.networks if use.equal_to is None]
    if isinstance(files, str):
        if len(own) > 1:
            raise VerifyError(
                f"{Path(request.vnnlib).name}: expected one network, got {', '.join(own)}; run "
                "boundjax verify QUERY --network NAME=FILE ..."
            )
        files = dict.fromkeys(own, files)
    if set(own) != set(files):
        raise VerifyError(
            f"--network: expected a file for each of {', '.join(own)}, got {', '.join(files)}"
        )
    return tuple((Path(files[use.equal_to or use.name]), use) for use in query.networks)


def _saved(request: Request, query: Query | None, result: Result) -> str:
    """Writes the proof that is wanted; why there is none, in one line, or an empty text.

    The verdict holds whether or not the checker can read the network.
    """
    if not request.proof or result.verdict != "unsat":
        return ""
    if query is not None or not isinstance(request.onnx, str):
        return "no proof is written: no checker reads queries of VNN-LIB 2.0"
    if result.proof is None:
        return "no proof is written: it took too much memory, or inputs are constrained together"
    from boundjax.certification.trees import save_proof

    try:
        save_proof(request.proof, result.proof, request.onnx)
    except (ValueError, OSError) as error:
        return f"no proof is written: {one_line(error)}"
    return ""


def _is_unsupported(error: Exception) -> bool:
    from boundjax.ir.node import NoProofError
    from boundjax.ir.table import UnsupportedOpError
    from boundjax.onnx import OnnxError

    return isinstance(error, (UnsupportedOpError, NoProofError, OnnxError))


def serve(prepare: Callable[[], ReadNetwork]) -> None:
    """Answers the requests on stdin until it closes.

    Args:
      prepare: called once, before the worker says that it is ready; returns what reads a network.
    """
    _end_with_parent()
    requests = _requests(sys.stdin.buffer)
    # Whatever else prints to stdout must not get between the messages.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(message: Stage | Answer) -> None:
        answers.write(encode(message))

    decider = Decider(prepare(), say)
    say(Stage("ready"))
    for request in requests:
        say(decider.answer(request))


def _requests(lines: IO[bytes]) -> Iterator[Request]:
    """The requests, which a thread reads so that the end of the input ends the process at once.

    The main thread may be inside of XLA for minutes, which lets other threads run.
    """
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(OSError):
            for line in lines:
                request = decode(line)
                assert isinstance(request, Request)
                waiting.put(request)
        os._exit(0)  # an interpreter that shuts down while XLA compiles may crash

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


def _end_with_parent() -> None:
    """Lets Linux kill this process with its parent, even while no thread can run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prepare() -> ReadNetwork:
    from boundjax import cache
    from boundjax.verify.network import Compiled, Network

    cache.enable_if_possible()
    return functools.partial(Network, compiled=Compiled())


if __name__ == "__main__":
    serve(_prepare)

"""Benchmarks: the instances of a csv file, decided one after another."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from boundjax import vnnlib
from boundjax.ir.node import NoProofError
from boundjax.ir.table import UnsupportedOpError
from boundjax.onnx import OnnxError
from boundjax.search.method import Method
from boundjax.search.search import Result, Verdict
from boundjax.sets.rounding import Rounding
from boundjax.verify.batch import Results, interruptible
from boundjax.verify.errors import VerifyError, one_line
from boundjax.verify.network import Network, Verifier

DEFAULT_TIMEOUT = 60.0
_SOLVED = ("sat", "unsat")


@dataclasses.dataclass(frozen=True)
class Instance:
    """A row of a benchmark.

    Attributes:
      onnx, vnnlib: the files.
      timeout: in seconds.
      known_result: `"sat"` or `"unsat"` if the row states it, else None.
    """

    onnx: Path
    vnnlib: Path
    timeout: float
    known_result: str | None = None


def result_text(result: Result) -> str:
    """Formats a result like VNN-COMP: the verdict, and for `sat` the values of all variables."""
    counterexample = result.counterexample
    if counterexample is None:
        return f"{result.verdict}\n"
    values = [f"(X_{i} {float(v)!r})" for i, v in enumerate(counterexample.inputs)]
    values += [f"(Y_{i} {float(v)!r})" for i, v in enumerate(counterexample.outputs)]
    lines = "\n".join(values)
    return f"{result.verdict}\n({lines})\n"


def read_instances(path: Path, timeout: float | None) -> list[Instance]:
    """Reads a benchmark's csv file, with a header or, like VNN-COMP's, without.

    Args:
      path: a file with columns `onnx, vnnlib, timeout` and perhaps `known_result`; paths in it are
        relative to its folder.
      timeout: in seconds, replaces the timeouts in the file.

    Returns:
      Its rows.

    Raises:
      OSError: if the file cannot be opened.
      VerifyError: if a row is too short or a timeout is not a positive number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise VerifyError(f"{path.name}: expected a csv file, got {one_line(error)}") from None
    names = ["onnx", "vnnlib", "timeout"]
    first = 1
    if rows and rows[0][0] == "onnx":
        names, rows, first = rows[0], rows[1:], 2
    instances = []
    for number, row in enumerate(rows, start=first):
        cells = dict(zip(names, row, strict=False))
        if not cells.get("onnx") or not cells.get("vnnlib"):
            raise VerifyError(f"{path.name}:{number}: expected onnx,vnnlib,timeout, got {row!r}")
        listed = cells.get("timeout") or DEFAULT_TIMEOUT
        seconds = positive_seconds(
            listed if timeout is None else timeout, f"{path.name}:{number}: timeout"
        )
        known_result = cells.get("known_result")
        instances.append(
            Instance(
                path.parent / cells["onnx"],
                _compressed_or_not(path.parent / cells["vnnlib"]),
                seconds,
                known_result if known_result in _SOLVED else None,
            )
        )
    if not instances:
        raise VerifyError(f"{path.name}: expected rows onnx,vnnlib,timeout, got none")
    return instances


def _compressed_or_not(path: Path) -> Path:
    """Finds a file whose name VNN-COMP lists plainly although it is stored compressed."""
    compressed = path.with_name(path.name + ".gz")
    return compressed if not path.exists() and compressed.exists() else path


def positive_seconds(value: Any, name: str) -> float:
    """Reads a time limit; `name` says where it comes from, for the message."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise VerifyError(f"{name}: expected a positive number of seconds, got {value!r}")
    return number


class Answer(NamedTuple):
    """The answer to an instance.

    Attributes:
      instance: the row of the benchmark.
      verdict: the verdict of a `Result`, or `"unsupported"` or `"error"`.
      seconds: wall-clock time, including reading and compiling.
      message: why there is no verdict, or what failed in the search; often empty.
      result: None if there is no verdict.
    """

    instance: Instance
    verdict: Verdict | Literal["unsupported", "error"]
    seconds: float
    message: str
    result: Result | None


def run_instances(
    instances: Sequence[Instance],
    method: Method,
    network: Callable[[Path], Verifier] = Network,
) -> Iterator[Answer]:
    """Answers one instance after another.

    An exception becomes the instance's verdict, `unsupported` or `error`, with a message, and the
    next instance follows. Consecutive instances of one network share its compiled code.
    """
    current: tuple[Path, Verifier] | None = None
    for instance in instances:
        start = time.monotonic()
        result = None
        try:
            if current is None or current[0] != instance.onnx:
                current = None  # free the last network's memory before the next is read
                current = instance.onnx, network(instance.onnx)
            property = vnnlib.load(instance.vnnlib)
            result = current[1].verify(property, method, instance.timeout)
            verdict, message = result.verdict, result.note
        except Exception as error:  # one bad instance must not end a benchmark
            verdict = "unsupported" if _is_unsupported(error) else "error"
            message = one_line(error)
        yield Answer(instance, verdict, time.monotonic() - start, message, result)


def _is_unsupported(error: Exception) -> bool:
    return isinstance(error, (UnsupportedOpError, NoProofError, OnnxError))


def run_benchmark(
    instances: Sequence[Instance],
    method: Method,
    results: Path | None,
    rounding: Rounding = "float32",
) -> int:
    """Prints a line per instance and a summary; returns the exit status, 1 for a wrong verdict."""
    records = None if results is None else Results(results)
    answers: list[Answer] = []
    with_known = any(instance.known_result for instance in instances)
    recording = threading.Lock()

    def interrupted(number: signal.Signals) -> int:
        _print_summary(answers, with_known)
        print(f"interrupted by {number.name} at row {len(answers)} of {len(instances)}", flush=True)
        return 128 + number

    def end(number: signal.Signals) -> None:
        recording.acquire(timeout=5.0)  # let a row be finished, unless its reader is stuck
        # Exit at once: an interpreter that shuts down while XLA compiles may crash.
        os._exit(interrupted(number))

    try:
        with interruptible(end):
            network = functools.partial(Network, rounding=rounding)
            for answer in run_instances(instances, method, network):
                with recording:
                    _record(len(answers), answer, records)
                    answers.append(answer)
    except KeyboardInterrupt:
        return interrupted(signal.SIGINT)
    finally:
        if records is not None:
            records.close()
    return 1 if _print_summary(answers, with_known) else 0


def _record(row: int, answer: Answer, records: Results | None) -> None:
    """Prints the answer to a row and writes it to the results."""
    instance, verdict, seconds, message, result = answer
    names = f"{instance.onnx.name} {instance.vnnlib.name}"
    print(f"{row} {names} {verdict} {seconds:.1f} {message}".rstrip(), flush=True)
    if records is None:
        return
    files = instance.onnx, instance.vnnlib
    # Write the counterexample first, so that every row with sat has its file.
    if result is not None and result.counterexample is not None:
        records.add_counterexample(row, *files, result_text(result))
    records.add(row, *files, verdict, seconds)


def _print_summary(answers: Sequence[Answer], with_known: bool) -> int:
    """Prints the counts of verdicts and the wrong verdicts; returns the number of wrong ones."""
    counts = collections.Counter(answer.verdict for answer in answers)
    solved = [
        (row, a)
        for row, a in enumerate(answers)
        if a.instance.known_result and a.verdict in _SOLVED
    ]
    wrong = [(row, a) for row, a in solved if a.verdict != a.instance.known_result]
    print()
    print(f"{'instances':12}{len(answers)}")
    print(f"{'solved':12}{sum(counts[verdict] for verdict in _SOLVED)}")
    for verdict in (*_SOLVED, "unknown", "timeout", "unsupported", "error"):
        print(f"{verdict:12}{counts[verdict]}")
    if with_known:
        print(f"{'agreed':12}{len(solved) - len(wrong)}")
        print(f"{'WRONG':12}{len(wrong)}")
    for row, (instance, verdict, *_) in wrong:
        names = f"{instance.onnx.name} {instance.vnnlib.name}"
        print(f"WRONG: row {row} {names}: {verdict}, known {instance.known_result}")
    return len(wrong)

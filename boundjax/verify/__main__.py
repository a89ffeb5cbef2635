"""`python -m boundjax.verify` decides VNN-LIB properties of ONNX networks.

For one property it prints the verdict in VNN-COMP's result format::

    python -m boundjax.verify --onnx NET.onnx --vnnlib PROP.vnnlib --timeout 60

For a benchmark it decides all rows `onnx,vnnlib,timeout` of a csv file, whose paths are relative to
it, in one process::

    python -m boundjax.verify --instances instances.csv --timeout 10 --results results.csv

The results must be a new file. Each row is appended as soon as its instance is decided, and each
counterexample is written to `results_counterexamples/ROW_NETWORK_PROPERTY.counterexample`. SIGINT
and SIGTERM end a batch run with a summary of the rows that are done and status 130 or 143.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from boundjax import vnnlib
from boundjax.onnx import OnnxError, from_onnx
from boundjax.ops import UnsupportedOpError
from boundjax.verify.batch import Results, interruptible
from boundjax.verify.programs import LADDER, Method, Programs
from boundjax.verify.search import Result, Verdict, verify

_DEFAULT_TIMEOUT = 60.0
_SOLVED = ("sat", "unsat")
_CHECKED_POINTS = 5


class VerifyError(ValueError):
    """A request that cannot be answered; the message is one line."""


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


class Verifier(Protocol):
    """Decides properties of one network."""

    def verify(self, property: vnnlib.Property, method: Method, timeout: float) -> Result:
        """The verdict on a property."""
        ...


class Network:
    """An ONNX network, both as JAX functions with bounds and in onnxruntime."""

    def __init__(self, path: Path):
        """Imports the file.

        Raises:
          OSError: if the file cannot be opened.
          OnnxError: if the file cannot be imported.
          VerifyError: if onnxruntime is not installed or refuses the file.
        """
        self.path = path
        self.model = from_onnx(path)
        self.programs = Programs(self.model.single, self.model.input_shape)
        self._session = _session(path)
        self._input = self._session.get_inputs()[0]

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """The outputs `[m]` of an input `[n]`, as onnxruntime computes them."""
        # A symbolic dimension is the batch.
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in self._input.shape]
        feed = {self._input.name: np.asarray(x, np.float32).reshape(shape)}
        try:
            return np.asarray(self._session.run(None, feed)[0]).reshape(-1)
        except Exception as error:  # onnxruntime's exceptions have no other common class
            raise VerifyError(f"{self.path.name}: onnxruntime: {_one_line(error)}") from None

    def verify(self, property: vnnlib.Property, method: Method, timeout: float) -> Result:
        """Runs `boundjax.verify.verify`, in which onnxruntime decides counterexamples.

        Raises:
          VerifyError: if the imported network disagrees with onnxruntime; nothing is proved then.
        """
        result = verify(
            self.model.single,
            property,
            method=method,
            timeout=timeout,
            evaluate=self.evaluate,
            programs=self.programs,
        )
        if result.verdict == "unsat":
            self._compare(property)
        return result

    def _compare(self, property: vnnlib.Property) -> None:
        """Compares the imported network with onnxruntime at points of the first box."""
        case, random = property.cases[0], np.random.default_rng(0)
        for index in range(_CHECKED_POINTS):
            share = random.uniform(size=case.lower.shape) if index else 0.5
            x = case.inner_lower + share * (case.inner_upper - case.inner_lower)
            x = np.clip(x, case.inner_lower, case.inner_upper).astype(np.float32)
            ours, theirs = np.asarray(self.programs.forward(x)), self.evaluate(x)
            # Rounding differs between runtimes, but far less than a misread network would.
            if ours.shape != theirs.shape or not np.allclose(
                ours, theirs, rtol=1e-3, atol=1e-4 * (1.0 + np.abs(theirs).max())
            ):
                raise VerifyError(
                    f"{self.path.name}: expected the imported network to agree with onnxruntime, "
                    "got other outputs; nothing is proved, please report the file"
                )


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise VerifyError(
            "expected onnxruntime, which confirms counterexamples, got no such package; "
            "run pip install 'boundjax[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no other common class
        raise VerifyError(f"{path.name}: onnxruntime refuses it: {_one_line(error)}") from None


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
        raise VerifyError(f"{path.name}: expected a csv file, got {_one_line(error)}") from None
    names = ["onnx", "vnnlib", "timeout"]
    first = 1
    if rows and rows[0][0] == "onnx":
        names, rows, first = rows[0], rows[1:], 2
    instances = []
    for number, row in enumerate(rows, start=first):
        cells = dict(zip(names, row, strict=False))
        if not cells.get("onnx") or not cells.get("vnnlib"):
            raise VerifyError(f"{path.name}:{number}: expected onnx,vnnlib,timeout, got {row!r}")
        listed = cells.get("timeout") or _DEFAULT_TIMEOUT
        seconds = _positive(
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


def _positive(value: Any, name: str) -> float:
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
            message = _one_line(error)
        yield Answer(instance, verdict, time.monotonic() - start, message, result)


def _is_unsupported(error: Exception) -> bool:
    return isinstance(error, (UnsupportedOpError, OnnxError))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


def _run_benchmark(instances: Sequence[Instance], method: Method, results: Path | None) -> int:
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
            for answer in run_instances(instances, method):
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


def _write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed before it is renamed
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    )
    try:
        with file:
            file.write(text)
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m boundjax.verify",
        description="Decides VNN-LIB properties of ONNX networks: sat, unsat, unknown or timeout.",
        allow_abbrev=False,
    )
    parser.add_argument("--onnx", type=Path, help="the network, with --vnnlib")
    parser.add_argument("--vnnlib", type=Path, help="the property, .vnnlib or .vnnlib.gz")
    parser.add_argument("--instances", type=Path, help="a benchmark's csv: onnx,vnnlib,timeout")
    parser.add_argument(
        "--method", default="alpha-crown", choices=LADDER, help="the tightest bounds to try"
    )
    parser.add_argument(
        "--timeout",
        help="seconds for one property, not counting the reading of the network "
        f"(default: the csv's, or {_DEFAULT_TIMEOUT:.0f})",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="also write the result to this file; with --instances a new csv file, to which each "
        "row is appended as it comes, and a file per counterexample, "
        "RESULTS_counterexamples/ROW_NETWORK_PROPERTY.counterexample",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      The exit status: 0; 1 after a wrong verdict; 2 for bad input; 128 plus the signal's number if
      a signal ended a batch run.
    """
    options = _parser().parse_args(arguments)
    try:
        timeout = None if options.timeout is None else _positive(options.timeout, "--timeout")
        sources = {n for n in ("onnx", "vnnlib", "instances") if getattr(options, n) is not None}
        if sources not in ({"onnx", "vnnlib"}, {"instances"}):
            raise VerifyError("expected either --onnx with --vnnlib, or --instances")
        if options.results is not None and not options.results.parent.is_dir():
            raise VerifyError(f"--results: expected a folder, got {options.results.parent}")
        if "instances" in sources:
            instances = read_instances(options.instances, timeout)
            return _run_benchmark(instances, options.method, options.results)
        property = vnnlib.load(options.vnnlib)
        result = Network(options.onnx).verify(property, options.method, timeout or _DEFAULT_TIMEOUT)
        if result.note:
            print(f"note: {result.note}", file=sys.stderr)
        text = result_text(result)
        if options.results is not None:
            _write(options.results, text)
        sys.stdout.write(text)
        return 0
    # RuntimeError: an unsupported op, or XLA running out of memory.
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

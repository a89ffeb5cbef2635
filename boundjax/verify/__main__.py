"""`python -m boundjax.verify` decides VNN-LIB properties of ONNX networks.

For one property it prints the verdict in VNN-COMP's result format::

    python -m boundjax.verify --onnx NET.onnx --vnnlib PROP.vnnlib --timeout 60

For a benchmark it decides all rows `onnx,vnnlib,timeout` of a csv file, whose paths are relative to
it::

    python -m boundjax.verify --instances instances.csv --timeout 10 --results results.csv

Each row is appended as soon as its instance is decided, and each counterexample is written to
`results_counterexamples/ROW_NETWORK_PROPERTY.counterexample`. SIGINT and SIGTERM end a batch run
with a summary of the rows that are done; the same command with `--resume` does the others.

A query of VNN-LIB 2.0 names its networks. The script `boundjax` has the standard's commands::

    boundjax verify QUERY.vnnlib --network N=NET.onnx --timeout 60
    boundjax supports --onnx-operators

For `sat` they print an assignment as the standard writes it, and `timed-out` where VNN-COMP has
`timeout`.

This process keeps time and the results. It starts a worker (`boundjax.verify.worker`) that decides,
and ends it at the limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES
from boundjax.search.method import METHODS
from boundjax.verify import benchmark, supervisor, supports
from boundjax.verify.errors import VerifyError, one_line
from boundjax.verify.instances import (
    DEFAULT_TIMEOUT,
    positive_bytes,
    positive_seconds,
    read_instances,
)
from boundjax.verify.messages import Answer, Request
from boundjax.verify.progress import Progress

_EPILOG = """\
exit status:
  0    answered, whatever the verdicts; also for --help and --version
  1    a verdict contradicts the known_result of its row (--instances)
  2    bad flags or files, or no worker can start; for one property also a network that is not
       supported or a worker that crashed, which --instances lists as rows. One line on stderr says
       why
  130  ended by SIGINT
  143  ended by SIGTERM

time: --timeout is the time of the whole command for one property, and of each row with --instances,
where a row includes the reading of its network but not the start of Python and JAX. A worker that
has not answered 0.25 s after the limit is killed, and the verdict is timeout. With
--exclude-compilation it may compile for 15 minutes more.

devices: where JAX has several local devices, they divide the parts of a box that are bounded at a
time, without communication.

cache: compiled programs are kept in the user's cache folder. BOUNDJAX_CACHE=off turns that off,
BOUNDJAX_CACHE=/a/folder moves it.
"""


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


_DESCRIPTION = "Decides VNN-LIB properties of ONNX networks: sat, unsat, unknown or timeout."


def _query_parser() -> argparse.ArgumentParser:
    """The flags of the standard's `verify`."""
    parser = argparse.ArgumentParser(
        prog="boundjax verify", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("query", type=Path, help="a file of VNN-LIB, compressed or not")
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="the ONNX file of a network of the query; once for each that has its own",
    )
    _add_search(parser)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m boundjax.verify",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--onnx", type=Path, help="the network, with --vnnlib")
    parser.add_argument("--vnnlib", type=Path, help="the property, .vnnlib or .vnnlib.gz")
    parser.add_argument("--instances", type=Path, help="a benchmark's csv: onnx,vnnlib,timeout")
    _add_search(parser)
    parser.add_argument(
        "--proof",
        type=Path,
        help="write the proof of unsat to this file, for python -m boundjax.check_tree; with "
        "--instances a folder, for ROW_NETWORK_PROPERTY.npz; needs --method complete",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="with --instances and --results: keep the rows of an earlier run of the same command "
        "and compute the others; a row that was cut short is computed again",
    )
    return parser


def _add_search(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every search."""
    parser.add_argument(
        "--method",
        default="complete",
        choices=METHODS,
        help="complete, branch and bound that splits inputs or the units of piecewise linear ops "
        "(default), or the tightest bounds of the whole box to try",
    )
    parser.add_argument(
        "--rounding",
        default="float32",
        choices=("float32", "real", "nearest"),
        help="what unsat holds for: every float32 execution, or real arithmetic; with 'nearest' "
        "bounds are not rounded (default: float32)",
    )
    parser.add_argument(
        "--timeout",
        help="seconds for one property, see below (default: the csv's, or 60)",
    )
    parser.add_argument(
        "--exclude-compilation",
        action="store_true",
        help="the limit is one of the search, in which the compilation of programs does not count; "
        "such a run, with a short limit, also fills the cache for later ones",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="also write the result to this file; with --instances a new csv file, to which each "
        "row is appended as it comes, and a file per counterexample, "
        "RESULTS_counterexamples/ROW_NETWORK_PROPERTY.counterexample",
    )
    parser.add_argument(
        "--max-bytes",
        default=str(MAX_BYTES),
        help="memory in bytes, estimated, that one call may take on each device; batches become "
        "smaller where it is scarce (default: 2 ** 30)",
    )
    parser.add_argument(
        "--max-queue-bytes",
        default=str(MAX_QUEUE_BYTES),
        help="memory of the host in bytes for the parts of a box that are still open, for a moment "
        "twice as much; where it does not suffice the verdict is unknown (default: 2 ** 30)",
    )
    # The package is loaded before its modules; nothing else of it is needed here.
    version = sys.modules["boundjax"].__version__
    parser.add_argument("--version", action="version", version=f"boundjax {version}")


def main(
    arguments: Sequence[str] | None = None, *, worker: Sequence[str] = supervisor.WORKER
) -> int:
    """Runs the command.

    Args:
      arguments: the flags; those of the process by default.
      worker: the command that starts a worker.

    Returns:
      The exit status, as `--help` lists them.
    """
    begun = time.monotonic()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["supports"]:
        return supports.main(words[1:])
    is_query = words[:1] == ["verify"]
    options = _query_parser().parse_args(words[1:]) if is_query else _parser().parse_args(words)
    try:
        timeout = options.timeout
        if timeout is not None:
            timeout = positive_seconds(timeout, "--timeout")
        limits = (
            positive_bytes(options.max_bytes, "--max-bytes"),
            positive_bytes(options.max_queue_bytes, "--max-queue-bytes"),
        )
        if options.results is not None and not options.results.parent.is_dir():
            raise VerifyError(f"--results: expected a folder, got {options.results.parent}")
        if is_query:
            files = _networks(options.network), str(options.query)
            return _decide(options, files, timeout, limits, begun, worker)
        sources = {n for n in ("onnx", "vnnlib", "instances") if getattr(options, n) is not None}
        if sources not in ({"onnx", "vnnlib"}, {"instances"}):
            raise VerifyError("expected either --onnx with --vnnlib, or --instances")
        if options.resume and (options.instances is None or options.results is None):
            raise VerifyError("--resume: expected --instances and --results with it")
        if options.proof is not None:
            _check_proof(options)
        if "instances" in sources:
            return benchmark.run_benchmark(
                read_instances(options.instances, timeout),
                options.method,
                options.rounding,
                options.results,
                proofs=options.proof,
                max_bytes=limits[0],
                max_queue_bytes=limits[1],
                count_compilation=not options.exclude_compilation,
                resume=options.resume,
                worker=worker,
            )
        files = str(options.onnx), str(options.vnnlib)
        return _decide(options, files, timeout, limits, begun, worker)
    except supervisor.Interrupted as interrupted:
        print(f"interrupted by {interrupted.number.name}", file=sys.stderr)
        return 128 + interrupted.number
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _decide(
    options: argparse.Namespace,
    files: tuple[str | dict[str, str], str],
    timeout: float | None,
    limits: tuple[int, int],
    begun: float,
    worker: Sequence[str],
) -> int:
    """Decides one property and prints the result; returns the exit status.

    Raises:
      OSError, VerifyError, Interrupted: as `_ask`; VerifyError also if there is no verdict.
    """
    request = Request(
        *files,
        options.method,
        options.rounding,
        timeout or DEFAULT_TIMEOUT,
        str(getattr(options, "proof", None) or ""),
        *limits,
        not options.exclude_compilation,
    )
    answer = _ask(request, begun, worker)
    if answer.verdict in ("unsupported", "error"):
        raise VerifyError(answer.message)
    if answer.message:
        print(f"note: {answer.message}", file=sys.stderr)
    text = answer.text
    if answer.verdict == "timeout" and hasattr(options, "query"):
        text = "timed-out\n"  # the standard's word; VNN-COMP's is timeout
    if options.results is not None:
        _write(options.results, text)
    sys.stdout.write(text)
    return 0


def _networks(flags: Sequence[str]) -> dict[str, str]:
    """The files of `NAME=FILE` by name.

    Raises:
      VerifyError: if one is no such pair, or there is none.
    """
    pairs = [flag.partition("=") for flag in flags]
    for flag, (name, _, file) in zip(flags, pairs, strict=True):
        if not name or not file:
            raise VerifyError(f"--network: expected NAME=FILE, got {flag!r}")
    networks = {name: file for name, _, file in pairs}
    if len(networks) != len(pairs) or not pairs:
        raise VerifyError(f"--network: expected each network once, got {' '.join(flags) or 'none'}")
    return networks


def _check_proof(options: argparse.Namespace) -> None:
    """Checks that proofs can be written.

    Raises:
      VerifyError: if not.
    """
    if options.method != "complete":
        raise VerifyError(f"--proof: expected --method complete with it, got {options.method}")
    folder = options.proof if options.instances is not None else options.proof.parent
    if not folder.is_dir():
        raise VerifyError(f"--proof: expected a folder, got {folder}")


def _ask(request: Request, begun: float, worker: Sequence[str]) -> Answer:
    """The answer to one request, whose time began at `begun`.

    Raises:
      OSError: if a file cannot be opened.
      VerifyError: if the worker cannot start.
      Interrupted: after a signal.
    """
    networks = request.onnx
    paths = [networks] if isinstance(networks, str) else [*networks.values()]
    for path in (*paths, request.vnnlib):
        with open(path, "rb"):  # here rather than after the start of JAX
            pass
    progress = Progress()

    def tick(stage: str) -> None:
        progress.show(f"{stage} {time.monotonic() - begun:.0f} of {request.seconds:g} s")

    deadline = begun + request.seconds
    try:
        with supervisor.Supervisor(worker, tick) as asked:
            if not asked.start(deadline):
                return Answer("timeout", "stopped while starting", "timeout\n")
            return asked.ask(request, deadline)
    finally:
        progress.clear()


if __name__ == "__main__":
    sys.exit(main())

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
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from boundjax.search.method import METHODS
from boundjax.verify.errors import VerifyError, one_line


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
        "--method",
        default="alpha-crown",
        choices=METHODS,
        help="the tightest bounds to try; complete also splits the units of piecewise linear ops",
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
        help="seconds for one property, not counting the reading of the network "
        "(default: the csv's, or 60)",
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
    # Imported after the flags are read: `--help` answers without JAX.
    from boundjax import vnnlib
    from boundjax.verify import benchmark
    from boundjax.verify.network import Network

    try:
        timeout = options.timeout
        if timeout is not None:
            timeout = benchmark.positive_seconds(timeout, "--timeout")
        sources = {n for n in ("onnx", "vnnlib", "instances") if getattr(options, n) is not None}
        if sources not in ({"onnx", "vnnlib"}, {"instances"}):
            raise VerifyError("expected either --onnx with --vnnlib, or --instances")
        if options.results is not None and not options.results.parent.is_dir():
            raise VerifyError(f"--results: expected a folder, got {options.results.parent}")
        if "instances" in sources:
            instances = benchmark.read_instances(options.instances, timeout)
            return benchmark.run_benchmark(
                instances, options.method, options.results, options.rounding
            )
        property = vnnlib.load(options.vnnlib)
        limit = timeout or benchmark.DEFAULT_TIMEOUT
        result = Network(options.onnx, options.rounding).verify(property, options.method, limit)
        if result.note:
            print(f"note: {result.note}", file=sys.stderr)
        text = benchmark.result_text(result)
        if options.results is not None:
            _write(options.results, text)
        sys.stdout.write(text)
        return 0
    # RuntimeError: an unsupported op, or XLA running out of memory.
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Measures how many domains a branch and bound bounds in a second, and what compiling it takes.

    python -m experiments.benchmarks.search NET.onnx PROP.vnnlib --seconds 20

A domain is one part of the box with its optimiser's steps and its share of everything else: scores,
probes of candidates, worst inputs, attacks in between, the queue. The property should be too hard
for `--seconds`: a search that ends early has few domains in its batches. It runs once to compile,
and once to be measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from boundjax import vnnlib
from boundjax.search import Result, verify
from boundjax.sets.rounding import Rounding
from boundjax.verify.network import Network
from experiments.settings.errors import ExperimentError, fail


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      compiling: seconds of processor time of the first run, less the second one.
      seconds, processor: of the rounds that count, by the clock and by the processor.
      domains: how many domains were bounded in them.
      result: of the second run.
    """

    compiling: float
    seconds: float
    processor: float
    domains: int
    result: Result


def measure(network: Network, property: vnnlib.Property, seconds: float) -> Measured:
    """Searches twice, for so many seconds each.

    Raises:
      ExperimentError: if no unit was split.
    """

    def run(limit: float) -> tuple[Result, float]:
        start = time.process_time()
        result = verify(
            network.model.single,
            property,
            method="complete",
            timeout=limit,
            rounding=network.programs.rounding,
            evaluate=network.evaluate,
            programs=network.programs,
            count_compilation=False,
        )
        return result, time.process_time() - start

    _, compiling = run(seconds)
    result, processor = run(seconds)
    if len(result.rounds) < 2:
        raise ExperimentError(
            f"the answer is {result.verdict!r} after {len(result.rounds)} rounds of splits; name a "
            "property that takes more"
        )
    begin, end = result.rounds[0], result.rounds[-1]
    elapsed = end.seconds - begin.seconds
    share = elapsed / result.seconds
    return Measured(
        max(0.0, compiling - processor),
        elapsed,
        processor * share,
        end.domains - begin.domains,
        result,
    )


def report(measured: Measured) -> str:
    """One line for each measure."""
    result, count = measured.result, measured.domains
    return (
        f"{result.verdict} after {result.seconds:.1f} s and {len(result.rounds)} rounds\n"
        f"{count} domains, {count / measured.seconds:.0f} in a second, "
        f"{count / measured.processor:.0f} in a second of processor time\n"
        f"compiling took about {measured.compiling:.1f} s of processor time"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and prints what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("onnx", type=Path, help="the network")
    parser.add_argument("vnnlib", type=Path, help="the property")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of two runs (20)")
    parser.add_argument("--rounding", choices=get_args(Rounding), default="float32")
    flags = parser.parse_args(arguments)
    try:
        if not flags.seconds > 0:
            raise ExperimentError(f"--seconds must be positive, got {flags.seconds}")
        network = Network(flags.onnx, flags.rounding)
        print(report(measure(network, vnnlib.load(flags.vnnlib), flags.seconds)))
    except (ExperimentError, OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()

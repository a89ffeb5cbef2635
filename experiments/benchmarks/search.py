"""Measures how many domains a branch and bound bounds in a second, and what compiling it takes.

    python -m experiments.benchmarks.search NET.onnx PROP.vnnlib --seconds 20

A domain is one part of the box with its optimiser's steps and its share of everything else: scores,
probes of candidates, worst inputs, attacks in between, the queue. The property should be too hard
for `--seconds`: a search that ends early has few domains in its batches. It runs once to compile,
and once to be measured.

With `--devices N` the same is measured in a process with one device of the CPU and in one with `N`
virtual devices. These share the cores, so what counts is the domains in a second of processor time
beside one device: what it costs to divide the work. In how little wall time it could be done is
for a machine with as many devices.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from boundjax import sharding, vnnlib
from boundjax.search import Result, verify
from boundjax.sets.rounding import Rounding
from boundjax.verify.network import Network
from experiments.settings.errors import ExperimentError, fail


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      devices: how many divided the domains.
      compiling: seconds of processor time of the first run, less the second one.
      seconds, processor: of the rounds that count, by the clock and by the processor.
      domains: how many domains were bounded in them.
      verdict, rounds: of the second run, which took `whole` seconds.
    """

    devices: int
    compiling: float
    seconds: float
    processor: float
    domains: int
    verdict: str
    rounds: int
    whole: float


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
        sharding.count(network.programs.network.mesh),
        max(0.0, compiling - processor),
        elapsed,
        processor * share,
        end.domains - begin.domains,
        result.verdict,
        len(result.rounds),
        result.seconds,
    )


def report(measured: Measured) -> str:
    """One line for each measure."""
    count = measured.domains
    return (
        f"{measured.devices} device{'s' * (measured.devices > 1)}: {measured.verdict} after "
        f"{measured.whole:.1f} s and {measured.rounds} rounds\n"
        f"{count} domains, {count / measured.seconds:.0f} in a second, "
        f"{count / measured.processor:.0f} in a second of processor time\n"
        f"compiling took about {measured.compiling:.1f} s of processor time"
    )


def beside_one(flags: argparse.Namespace) -> str:
    """Measures one device and `flags.devices` virtual ones, each in a process of its own.

    Raises:
      ExperimentError: if one of the processes fails.
    """
    one, several = (_measured_alone(flags, devices) for devices in (1, flags.devices))
    rates = [measured.domains / measured.processor for measured in (one, several)]
    return (
        f"{report(one)}\n{report(several)}\n"
        f"domains in a second of processor time, beside one device: {rates[1] / rates[0]:.2f}"
    )


def _measured_alone(flags: argparse.Namespace, devices: int) -> Measured:
    command = [sys.executable, "-m", "experiments.benchmarks.search", flags.onnx, flags.vnnlib]
    command += ["--seconds", flags.seconds, "--rounding", flags.rounding, "--json"]
    virtual = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": virtual.strip(), "JAX_PLATFORMS": "cpu"}
    # What JAX reads instead of the flag, where it is set.
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    process = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise ExperimentError(f"devices = {devices}: {lines[-1].removeprefix('error: ')}")
    measured = Measured(*json.loads(process.stdout.splitlines()[-1]))
    if measured.devices != devices:
        raise ExperimentError(f"expected {devices} virtual devices, got {measured.devices}")
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and prints what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("onnx", type=Path, help="the network")
    parser.add_argument("vnnlib", type=Path, help="the property")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of two runs (20)")
    parser.add_argument("--rounding", choices=get_args(Rounding), default="float32")
    parser.add_argument("--devices", type=int, help="virtual ones, to measure beside one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    flags = parser.parse_args(arguments)
    try:
        if flags.devices is not None and flags.devices < 2:
            raise ExperimentError(f"--devices must be at least 2, got {flags.devices}")
        if not flags.seconds > 0:
            raise ExperimentError(f"--seconds must be positive, got {flags.seconds}")
        if flags.devices is not None:
            print(beside_one(flags))
            return
        network = Network(flags.onnx, flags.rounding)
        measured = measure(network, vnnlib.load(flags.vnnlib), flags.seconds)
        print(json.dumps(measured) if flags.json else report(measured))
    except (ExperimentError, OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()

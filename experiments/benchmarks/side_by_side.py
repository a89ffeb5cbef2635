"""Compares us with another library on the same weights and inputs, one process after the other.

Every measurement runs in a process of its own. Its peak memory is that of the method, including
the imported library and, for ours, the compiler; a failure is a row of the table. Both compute on
the CPU with the number of threads that they choose. The table has, per library, wall and processor
time of a call; the time to compile, or of the first call if nothing is compiled; memory; the mean
margin. The line below has the ratios of ours to theirs and, for methods that are the same algorithm
in both, the largest difference of the margins, relative to the largest margin.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import numpy as np

from experiments.benchmarks import cases
from experiments.benchmarks.process import Measurement, measured_alone
from experiments.settings.errors import ExperimentError

PEERS = ("auto_LiRPA",)
_WITH_SLOPES = ("crown", "crown, 20 steps", "alpha-crown")
_METHODS = ("forward", "interval", "crown-ibp", *_WITH_SLOPES)
# Net -> method -> number of examples per call.
COMPARED: dict[str, dict[str, int]] = {
    "mlp_2x100": dict.fromkeys(_METHODS, 16),
    "small_star": dict.fromkeys(_METHODS, 16),
    "cnn7": {
        **dict.fromkeys(("forward", "interval", "crown-ibp", "20 steps"), 2),
        **dict.fromkeys(_WITH_SLOPES, 1),
    },
}
ONE_ALGORITHM = ("forward", "interval", "crown-ibp", "crown")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--peer` and the limits of its processes."""

    def positive(text: str) -> float:
        value = float(text)
        if not 0.0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
        return value

    group = parser.add_argument_group("side by side with another library")
    group.add_argument("--peer", choices=PEERS, help="bounds of this library beside ours")
    help = "time for one method of one library, all its runs (default: 900)"
    group.add_argument("--limit", type=positive, default=900.0, metavar="SECONDS", help=help)
    help = "address space of one process (default: 20)"
    group.add_argument("--max-gib", type=positive, default=20.0, metavar="GIB", help=help)


def difference(ours: Measurement, theirs: Measurement) -> float:
    """Returns the largest difference of two methods' margins, relative to the largest margin."""
    a, b = np.asarray(ours.margins), np.asarray(theirs.margins)
    return float(np.abs(a - b).max() / np.abs(b).max())


def line(library: str, row: Measurement | str, method: str) -> str:
    """Formats the table's line of one library."""
    if isinstance(row, str):
        return f"    {library:<12}{row}"
    who = f"  {row.version}" if method == "forward" else ""
    return (
        f"    {library:<12}{1e3 * row.wall:12.2f} ms{row.cpu:12.4f} s{row.first:13.2f} s"
        f"{row.peak_mib:7.0f} MiB{np.mean(row.margins):15.4f}{who}"
    )


def ratios(method: str, ours: Measurement, theirs: Measurement) -> str:
    """Formats the ratios of ours to theirs, and the difference of margins that should agree."""
    columns = ((12, "wall"), (14, "cpu"), (15, "first"), (9, "peak_mib"))
    text = "   ".join(
        f"{getattr(ours, name) / getattr(theirs, name):{width - 3 * (i > 0)}.2f}"
        for i, (width, name) in enumerate(columns)
    )
    apart = f"{difference(ours, theirs):13.1e} apart" if method in ONE_ALGORITHM else ""
    return f"    {'ours/theirs':<12}{text}{apart}"


def compare(flags: argparse.Namespace) -> None:
    """Measures and prints one table per net.

    Raises:
      ExperimentError: if the peer cannot be imported, or its network differs from ours.
    """
    limits = {"repeats": flags.repeats, "limit": flags.limit, "max_gib": flags.max_gib}
    selected = flags.methods or tuple(cases.METHODS)
    compared = {
        name: [method for method in COMPARED[name] if method in (*selected, "forward")]
        for name in flags.nets or COMPARED
    }
    for name, methods in compared.items():
        if methods == ["forward"]:
            raise ExperimentError(
                f"{name} is compared by {[*COMPARED[name]][1:]}, got --methods {[*selected]}"
            )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"both on the CPU: {cores} x {platform.machine()}, Python {platform.python_version()}")
    for name, methods in compared.items():
        print(
            f"{name}, 9 margins, eps {flags.eps}: median of up to {flags.repeats} runs\n"
            f"    {'':<12}{'wall':>15}{'processor':>14}{'compile/first':>15}{'peak':>11}"
            f"{'mean margin':>15}",
            flush=True,
        )
        case = cases.case(name, flags.eps)
        for method in methods:
            examples = COMPARED[name][method]
            print(f"  {method}, {examples} examples" if examples > 1 else f"  {method}, 1 example")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "case.npz"
                case.first(examples).save(path)
                rows = []
                # Run the peer first: it may fail with an error that ends the comparison.
                for library in (flags.peer, "boundjax"):
                    rows.append(measured_alone(library, method, path, **limits))
                    print(line(library, rows[-1], method), flush=True)
            theirs, ours = rows
            if isinstance(ours, Measurement) and isinstance(theirs, Measurement):
                print(ratios(method, ours, theirs), flush=True)

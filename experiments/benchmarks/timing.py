"""Times functions: compile once, warm up, then take medians of interleaved repeats."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from boundjax.certification.memory import peak_of


@dataclasses.dataclass
class Measured:
    """A compiled function with its compile time and its run times, in seconds.

    `peak_bytes` is the memory that the compiler plans for one run, including inputs and outputs.
    """

    name: str
    run: Callable[[], Any]
    compile_seconds: float
    peak_bytes: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the run times."""
        return statistics.median(self.seconds)


def compiled(name: str, function: Callable[..., Any], *arguments: Any) -> Measured:
    """Compiles a function for the given arguments and measures how long that takes."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Measured(name, lambda: executable(*arguments), seconds, peak_of(executable))


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds the flag `--repeats`: how often `interleave` runs every candidate."""

    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text!r}")
        return int(text)

    help = f"timed runs of every candidate (default: {default})"
    parser.add_argument("--repeats", type=count, default=default, help=help)


def interleave(candidates: Sequence[Measured], repeats: int) -> None:
    """Runs the candidates in turn, `A B C A B C ...`, after one warm-up run of each.

    If the machine's speed drifts (other jobs, thermal limits), the ratio of two medians is
    meaningful only if both saw the same drift.
    """
    for candidate in candidates:
        jax.block_until_ready(candidate.run())
    for _ in range(repeats):
        for candidate in candidates:
            start = time.perf_counter()
            jax.block_until_ready(candidate.run())
            candidate.seconds.append(time.perf_counter() - start)


def machine() -> str:
    """Describes in one line the machine and the versions behind the numbers."""
    device = jax.devices()[0]
    return (
        f"jax {jax.__version__}, {jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


def report(candidates: Sequence[Measured], baseline: Measured, extra: dict[str, str]) -> None:
    """Prints per candidate the median, the ratio to the baseline, compile time and `extra`."""
    width = max(len(candidate.name) for candidate in candidates)
    for candidate in candidates:
        ratio = candidate.median / baseline.median
        print(
            f"  {candidate.name:<{width}}  {1e3 * candidate.median:10.2f} ms  {ratio:8.2f}x"
            f"  compile {candidate.compile_seconds:6.1f} s"
            f"  {extra.get(candidate.name, '')}".rstrip(),
            flush=True,
        )

"""Runs one measurement in a process of its own, so that memory and failures are its own too.

`measured_alone` starts `python -m experiments.benchmarks.process`, which imports neither jax nor
torch before the side that it measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.settings.errors import ExperimentError

# Library -> the module whose `prepare(case, method)` to measure.
SIDES = {
    "boundjax": "experiments.benchmarks.cases",
    "auto_LiRPA": "experiments.benchmarks.auto_lirpa",
}
# Repeats stop after this total time.
_ENOUGH_SECONDS = 20.0
_OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "RESOURCE_EXHAUSTED",
    "bad_alloc",
    "pthread_create",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its inputs and its specification, as arrays.

    Attributes:
      net: name of the network in `experiments.models`.
      eps: radius of the l-infinity balls, clipped to [0, 1].
      steps: steps of the methods that optimise slopes.
      architecture: `convolutions`, `hidden`, `classes` and `batch_norm` of the network.
      images: centres `[B, H, W, C]`.
      rows: the specification `[B, m, classes]`.
      logits: the network's logits `[B, classes]`, to check a translation against.
      variables: its Flax variables by path, such as `params/Conv_0/kernel`.
    """

    net: str
    eps: float
    steps: int
    architecture: Mapping[str, Any]
    images: np.ndarray
    rows: np.ndarray
    logits: np.ndarray
    variables: Mapping[str, np.ndarray]

    def first(self, examples: int) -> Case:
        """Returns the case with the first examples only."""
        arrays = {name: getattr(self, name)[:examples] for name in ("images", "rows", "logits")}
        return dataclasses.replace(self, **arrays)

    def save(self, path: Path) -> None:
        """Writes the case as an `.npz` file."""
        facts = {name: getattr(self, name) for name in ("net", "eps", "steps", "architecture")}
        arrays = {name: getattr(self, name) for name in ("images", "rows", "logits")}
        everything = {"facts": np.array(json.dumps(facts)), **arrays, **self.variables}
        # NumPy's stub checks the arrays against `allow_pickle` as well.
        np.savez(path, **everything)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: Path) -> Case:
        """Reads what `save` wrote."""
        with np.load(path) as stored:
            arrays = dict(stored)
        facts = json.loads(str(arrays.pop("facts")))
        fields = {name: arrays.pop(name) for name in ("images", "rows", "logits")}
        return cls(**facts, **fields, variables=arrays)


class Prepared(NamedTuple):
    """A call to measure: it returns lower bounds `[B, m]`; its compile time, and its library."""

    run: Callable[[], np.ndarray]
    compile_seconds: float | None
    version: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Costs and results of a method.

    Attributes:
      version: library and version that computed it.
      wall: median seconds of a call.
      cpu: median processor seconds of a call, all threads together.
      first: seconds to compile, or seconds of the first call if nothing is compiled.
      peak_mib: peak resident memory of the process, including its libraries.
      margins: the lower bounds, example by example.
    """

    version: str
    wall: float
    cpu: float
    first: float
    peak_mib: float
    margins: list[float]


def peak_memory_mib() -> float:
    """Returns the largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux a child process inherits it from its parent.
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert peak is not None, f"expected VmHWM in {status}"
        return int(peak[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(prepared: Prepared, repeats: int) -> Measurement:
    """Calls once to warm up, then up to `repeats` times, fewer if a call takes long."""
    walls, cpus, margins = [], [], None
    while len(walls) <= repeats and (not walls or sum(walls) < _ENOUGH_SECONDS):
        wall, cpu = time.perf_counter(), time.process_time()
        margins = prepared.run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    assert margins is not None  # the loop runs at least once
    return Measurement(
        version=prepared.version,
        wall=statistics.median(walls[1:] or walls),
        cpu=statistics.median(cpus[1:] or cpus),
        first=walls[0] if prepared.compile_seconds is None else prepared.compile_seconds,
        peak_mib=peak_memory_mib(),
        margins=margins.ravel().tolist(),
    )


def measured_alone(
    library: str, method: str, case: Path, *, repeats: int, limit: float, max_gib: float
) -> Measurement | str:
    """Measures a method of a library on a stored case, on the CPU, in a process of its own.

    Returns:
      The measurement, or the reason why there is none, in words.

    Raises:
      ExperimentError: if nothing can be measured: the library is missing, or its network differs.
    """
    result = case.with_name("result.json")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.benchmarks.process", library, method, str(case)]
    command += ["--repeats", str(repeats), "--max-gib", str(max_gib)]
    # Otherwise OpenMP's threads, which torch uses, spin while they wait: with other jobs on the
    # machine that multiplies the time of a call.
    environment = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    try:
        process = subprocess.run(
            command, env=environment, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"over {limit:g} s"
    answer = json.loads(result.read_text()) if result.exists() else {}
    if "error" in answer:
        raise ExperimentError(answer["error"])
    if answer:
        return Measurement(**answer)
    # Without memory a process may end by an exception, by abort or by the kernel.
    if process.returncode == -9 or any(words in process.stderr for words in _OUT_OF_MEMORY):
        return "out of memory"
    lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
    return f"failed: {lines[-1][:80]}"


def main() -> None:
    """Runs in the process of one measurement; writes `result.json` beside the case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", choices=SIDES)
    parser.add_argument("method")
    parser.add_argument("case", type=Path)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--max-gib", type=float, required=True)
    flags = parser.parse_args()
    if sys.platform == "linux":  # macOS refuses
        limit = int(flags.max_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        prepared = importlib.import_module(SIDES[flags.library]).prepare(
            Case.load(flags.case), flags.method
        )
        answer = dataclasses.asdict(measure(prepared, flags.repeats))
    except ExperimentError as error:
        answer = {"error": str(error)}
    except MemoryError:
        sys.exit("bad_alloc: Python has no more memory")
    flags.case.with_name("result.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()

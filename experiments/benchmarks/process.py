"""One measurement in a process of its own, so that its memory and its failure are its own.

`measured_alone` starts `python -m experiments.benchmarks.process`, which knows neither jax nor
torch until it imports the side that it measures.
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

# Library -> the module whose `prepare(case, method)` is measured.
SIDES = {
    "boundjax": "experiments.benchmarks.cases",
    "auto_LiRPA": "experiments.benchmarks.auto_lirpa",
}
# Repeats end when they took this long together.
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
    """A network and what is to be bounded of it, in arrays.

    Attributes:
      net: its name in `experiments.models`.
      eps: radius of the l-infinity balls, clipped to [0, 1].
      steps: of the methods that optimise slopes.
      architecture: `convolutions`, `hidden`, `classes` and `batch_norm` of the network.
      images: centres `[B, H, W, C]`.
      rows: the specification `[B, m, classes]`.
      logits: the network's `[B, classes]`, to compare a translation with.
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
        """The same with the first examples only."""
        arrays = {name: getattr(self, name)[:examples] for name in ("images", "rows", "logits")}
        return dataclasses.replace(self, **arrays)

    def save(self, path: Path) -> None:
        """Writes the case as an `.npz` file."""
        facts = {name: getattr(self, name) for name in ("net", "eps", "steps", "architecture")}
        arrays = {name: getattr(self, name) for name in ("images", "rows", "logits")}
        np.savez(path, facts=json.dumps(facts), **arrays, **self.variables)

    @classmethod
    def load(cls, path: Path) -> Case:
        """Reads what `save` wrote."""
        with np.load(path) as stored:
            arrays = dict(stored)
        facts = json.loads(str(arrays.pop("facts")))
        own = {name: arrays.pop(name) for name in ("images", "rows", "logits")}
        return cls(**facts, **own, variables=arrays)


class Prepared(NamedTuple):
    """What is measured: a call for lower bounds `[B, m]`, its compile time, and who computes it."""

    run: Callable[[], np.ndarray]
    compile_seconds: float | None
    version: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a method costs and is worth.

    Attributes:
      version: who computed it.
      wall: median seconds of a call.
      cpu: median processor seconds of a call, all threads together.
      first: seconds to compile, or of the first call where nothing is compiled.
      peak_mib: peak resident memory of the process, the libraries included.
      margins: the lower bounds, example by example.
    """

    version: str
    wall: float
    cpu: float
    first: float
    peak_mib: float
    margins: list[float]


def peak_memory_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands `ru_maxrss` on to a child: there it starts at what the parent took.
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(prepared: Prepared, repeats: int) -> Measurement:
    """Calls once to warm up, then a few times, fewer where a call takes long; at least once."""
    walls, cpus, margins = [], [], None
    while len(walls) <= repeats and (not walls or sum(walls) < _ENOUGH_SECONDS):
        wall, cpu = time.perf_counter(), time.process_time()
        margins = prepared.run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
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
      The measurement, or in words why there is none.

    Raises:
      ExperimentError: where nothing can be measured: the library is missing, its network differs.
    """
    result = case.with_name("result.json")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.benchmarks.process", library, method, str(case)]
    command += ["--repeats", str(repeats), "--max-gib", str(max_gib)]
    # OpenMP's threads, torch's, otherwise spin while they wait: many times the time of a call on a
    # machine with other jobs.
    environment = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    try:
        done = subprocess.run(
            command, env=environment, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"over {limit:g} s"
    answer = json.loads(result.read_text()) if result.exists() else {}
    if "error" in answer:
        raise ExperimentError(answer["error"])
    if answer:
        return Measurement(**answer)
    # A process that gets no memory may end by an exception, by abort or by the kernel.
    if done.returncode == -9 or any(words in done.stderr for words in _OUT_OF_MEMORY):
        return "out of memory"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"failed: {lines[-1][:80]}"


def main() -> None:
    """The process of one measurement: its answer goes to `result.json` beside the case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=SIDES)
    parser.add_argument("method")
    parser.add_argument("case", type=Path)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--max-gib", type=float, required=True)
    flags = parser.parse_args()
    if sys.platform == "linux":  # macOS refuses
        most = int(flags.max_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
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

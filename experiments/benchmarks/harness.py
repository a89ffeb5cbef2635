"""Runs the scripts of `launch/vnncomp` as VNN-COMP does, and scores what they answer.

    python -m experiments.benchmarks.harness acasxu/instances.csv rl/instances.csv --rows 10

For every row of a benchmark, `prepare_instance.sh` and then `run_instance.sh` are started; what is
still running at its limit is killed with all of its children. A right answer scores 10, a wrong one
-150, anything else 0. Rows without a `known_result` score nothing. `--timeout` replaces the limits
of the files, and `--rows` takes the first rows of each.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from boundjax.verify.instances import Instance, positive_seconds, read_instances

SCRIPTS = Path(__file__).resolve().parents[2] / "launch" / "vnncomp"
PREPARATION = 600.0  # seconds
RIGHT, WRONG = 10, -150


def run_until(command: Sequence[str], seconds: float) -> float:
    """Runs a command in a session of its own and kills it at the limit; the seconds it took."""
    start = time.monotonic()
    # The scripts call the Python that runs this one.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.monotonic() - start


def decide(instance: Instance, category: str, scripts: Path) -> tuple[str, float]:
    """The answer to an instance, in the words of its result file, and the seconds it took."""
    files = str(instance.onnx), str(instance.vnnlib)
    run_until([str(scripts / "prepare_instance.sh"), "v1", category, *files], PREPARATION)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.txt"
        limit = f"{instance.timeout:g}"
        command = [str(scripts / "run_instance.sh"), "v1", category, *files, str(result), limit]
        seconds = run_until(command, instance.timeout)
        lines = result.read_text().split() if result.exists() else []
    return (lines[0] if lines else "no answer"), seconds


def score(answer: str, known_result: str | None) -> int:
    """The points of an answer."""
    if known_result is None or answer not in ("sat", "unsat"):
        return 0
    return RIGHT if answer == known_result else WRONG


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, runs the benchmarks and prints their scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("instances", type=Path, nargs="+", help="csv files: onnx,vnnlib,timeout")
    parser.add_argument("--timeout", help="seconds for each row (default: the csv's)")
    parser.add_argument("--rows", type=int, help="only the first rows of each file")
    parser.add_argument("--results", type=Path, help="a csv file for all rows")
    parser.add_argument("--scripts", type=Path, default=SCRIPTS, help="the tool's folder")
    flags = parser.parse_args(arguments)
    try:
        timeout = None if flags.timeout is None else positive_seconds(flags.timeout, "--timeout")
        benchmarks = {path: read_instances(path, timeout)[: flags.rows] for path in flags.instances}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows: list[list[str]] = [["benchmark", "onnx", "vnnlib", "answer", "seconds", "score"]]
    for path, instances in benchmarks.items():
        category, points = path.resolve().parent.name, 0
        counts: collections.Counter[str] = collections.Counter()
        for instance in instances:
            answer, seconds = decide(instance, category, flags.scripts)
            points += score(answer, instance.known_result)
            counts[answer] += 1
            counts["wrong"] += score(answer, instance.known_result) < 0
            names = category, instance.onnx.name, instance.vnnlib.name
            rows.append(
                [*names, answer, f"{seconds:.2f}", str(score(answer, instance.known_result))]
            )
            if flags.results is not None:  # after each row: a run may be stopped
                with flags.results.open("w", newline="") as file:
                    csv.writer(file).writerows(rows)
        answers = ", ".join(
            f"{count} {answer}" for answer, count in sorted(counts.items()) if count
        )
        print(f"{category}: {points} of {RIGHT * len(instances)} points; {answers}", flush=True)


if __name__ == "__main__":
    main()

"""Benchmarks: the instances of a csv file, decided one after another."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from boundjax.search.limits import MAX_BYTES, MAX_QUEUE_BYTES
from boundjax.search.method import Method
from boundjax.verify.batch import Results, Row, names_of
from boundjax.verify.instances import Instance
from boundjax.verify.messages import ANSWERED, SOLVED, Answer, Request
from boundjax.verify.progress import Progress
from boundjax.verify.supervisor import WORKER, Interrupted, Supervisor

if TYPE_CHECKING:
    from boundjax.sets.rounding import Rounding


def run_benchmark(
    instances: Sequence[Instance],
    method: Method,
    rounding: Rounding,
    results: Path | None = None,
    *,
    proofs: Path | None = None,
    max_bytes: int = MAX_BYTES,
    max_queue_bytes: int = MAX_QUEUE_BYTES,
    count_compilation: bool = True,
    resume: bool = False,
    worker: Sequence[str] = WORKER,
) -> int:
    """Prints a line per instance and a summary.

    A row's time includes reading its network, unless the row before has the same. What a worker
    needs to start is not charged to a row. A worker that crashes or has to be killed costs its own
    row only.

    Args:
      instances: the rows.
      method, rounding: see `boundjax.verify.verify`.
      results: a csv file, see `Results`.
      proofs: a folder for a proof of every `unsat`.
      max_bytes, max_queue_bytes, count_compilation: see `boundjax.verify.verify`.
      resume: continue the results, whose rows are not computed again.
      worker: the command that starts a worker.

    Returns:
      The exit status: 0; 1 after a wrong verdict; 128 plus the number of a signal that ended it.

    Raises:
      FileExistsError, VerifyError: for bad results, or if no worker can start.
    """
    records = None if results is None else Results(results, instances, resume=resume)
    rows = [] if records is None else list(records.kept)
    if rows:
        print(f"resumed: {len(rows)} of {len(instances)} rows are done", flush=True)
    progress = Progress()
    started = time.monotonic()

    def tick(stage: str) -> None:
        solved = sum(row.verdict in SOLVED for row in rows)
        instance = instances[len(rows)]
        progress.show(
            f"row {len(rows)} of {len(instances)}, {solved} solved: {instance.onnx.name} "
            f"{instance.vnnlib.name}, {stage} {time.monotonic() - started:.0f} s"
        )

    try:
        with Supervisor(worker, tick) as supervisor:
            for number in range(len(rows), len(instances)):
                instance = instances[number]
                supervisor.start()
                started = time.monotonic()
                proof = ""
                if proofs is not None:
                    names = names_of(number, instance.onnx, instance.vnnlib)
                    proof = str(proofs / f"{names}.npz")
                paths = str(instance.onnx), str(instance.vnnlib)
                limits = max_bytes, max_queue_bytes, count_compilation
                request = Request(*paths, method, rounding, instance.timeout, proof, *limits)
                answer = supervisor.ask(request, started + instance.timeout)
                row = Row(answer.verdict, time.monotonic() - started)
                progress.clear()
                _record(number, instance, answer, row, records)
                rows.append(row)
    except Interrupted as interrupted:
        progress.clear()
        _print_summary(instances, rows)
        name = interrupted.number.name
        print(f"interrupted by {name} at row {len(rows)} of {len(instances)}", flush=True)
        return 128 + interrupted.number
    finally:
        if records is not None:
            records.close()
    return 1 if _print_summary(instances, rows) else 0


def _record(
    number: int, instance: Instance, answer: Answer, row: Row, records: Results | None
) -> None:
    """Prints the answer to a row and writes it to the results."""
    names = f"{instance.onnx.name} {instance.vnnlib.name}"
    print(f"{number} {names} {row.verdict} {row.seconds:.1f} {answer.message}".rstrip(), flush=True)
    if records is None:
        return
    # Write the counterexample first, so that every row with sat has its file.
    if answer.verdict == "sat":
        _, _, values = answer.text.partition("\n")  # scorers expect no verdict here
        records.add_counterexample(number, instance.onnx, instance.vnnlib, values)
    records.add(instance.onnx, instance.vnnlib, row)


def _print_summary(instances: Sequence[Instance], rows: Sequence[Row]) -> int:
    """Prints the counts of verdicts and the wrong verdicts; returns the number of wrong ones."""
    counts = collections.Counter(row.verdict for row in rows)
    solved = [
        (number, instance, row.verdict)
        for number, (instance, row) in enumerate(zip(instances, rows, strict=False))
        if instance.known_result and row.verdict in SOLVED
    ]
    wrong = [one for one in solved if one[2] != one[1].known_result]
    print()
    print(f"{'instances':12}{len(rows)}")
    print(f"{'solved':12}{sum(counts[verdict] for verdict in SOLVED)}")
    for verdict in ANSWERED:
        print(f"{verdict:12}{counts[verdict]}")
    if any(instance.known_result for instance in instances):
        print(f"{'agreed':12}{len(solved) - len(wrong)}")
        print(f"{'WRONG':12}{len(wrong)}")
    for number, instance, verdict in wrong:
        names = f"{instance.onnx.name} {instance.vnnlib.name}"
        print(f"WRONG: row {number} {names}: {verdict}, known {instance.known_result}")
    return len(wrong)

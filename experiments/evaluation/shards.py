"""Divides one evaluation between several processes, and merges their parts.

The unit of work is a block of one batch: first the batches of the attack, then those of the
misclassified images. Process i mod N takes block i. A block's cost depends on its images (a cascade
skips decided ones, and data sets are sorted by class), so neighbouring blocks go to different
processes. No process waits for another in between: each writes its part to
`NAME.part-K-of-N.npz` after every batch. Process 0 merges the parts into `NAME.npz` at the end, or
when the next evaluation begins, with any number of processes.
"""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cluster import distributed
from experiments.evaluation import certificates
from experiments.evaluation.certificates import ATTACK, Certificates
from experiments.evaluation.measure import (
    Block,
    Network,
    Plan,
    Problem,
    attack_blocks,
    begin,
    finish,
)
from experiments.records.files import temporary_name
from experiments.settings.config import EvaluationConfig
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ContradictionError, ExperimentError

# Seconds to wait until a network file system shows what another machine wrote, and between looks.
_TIMEOUT, _INTERVAL = 60.0, 0.2


def share(
    correct: np.ndarray, size: int, process: int, processes: int
) -> tuple[np.ndarray, list[Block]]:
    """Selects the images that one of several processes evaluates.

    Args:
      correct: which images are classified correctly, bool `[N]`.
      size: images per block.
      process, processes: this process's number, and how many there are.

    Returns:
      Its images, ascending, and its blocks of the attack; their rows index these images.
    """
    attacked, misclassified = attack_blocks(correct, size), attack_blocks(~correct, size)
    blocks = (attacked + misclassified)[process::processes]
    images = np.sort(np.concatenate([np.zeros(0, int), *(block.rows for block in blocks)]))
    return images, [
        Block(block.number, np.searchsorted(images, block.rows))
        for block in attacked[process::processes]
    ]


def complete(
    results: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    path: Path,
    saving: Callable[[Path], Callable[[Certificates], None]],
) -> Certificates:
    """Does `measure.complete` with all processes; all must call it, and all get the result.

    Args:
      results: the content of the file at `path`, the same on all processes.
      problem, config, plan: as in `measure.complete`.
      path: the file.
      saving: (path of this process's part) -> the function to call after every batch.

    Raises:
      ExperimentError, RuntimeError: as `measure.complete`; ExperimentError if the processes do not
        share the folder of `path`.
    """
    process, processes = distributed.process(), distributed.processes()
    begin(results, problem, config, plan)
    network = Network(problem, config)
    if not results.attacked.any():
        results.record_clean_pass(_clean_pass(results, problem, network, process, processes))
    # Write before there are parts: they depend on the clean pass and on which parts were reset.
    distributed.from_main(lambda: certificates.write(path, results))
    save = saving(part_path(path, process, processes))
    state = complete_share(results, problem, config, plan, network, process, processes, save)

    def collect(states: list[Mapping[str, Any] | None]) -> None:
        for number, part_state in enumerate(states):
            if part_state is not None:
                _wait_for(part_path(path, number, processes), part_state, part=True)
        gather(path)

    distributed.decided(state, collect)
    return read_together(path)


def complete_share(
    results: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    network: Network,
    process: int,
    processes: int,
    save: Callable[[Certificates], None],
) -> dict[str, Any] | None:
    """Evaluates the share of one process, after the clean pass; leaves `results` unchanged.

    Returns:
      The state of the part as last saved; None if there was nothing to do.
    """
    images, blocks = share(results.correct, network.size, process, processes)
    if not len(images):
        return None
    part = select(results, images)
    before = part.progress
    share_of_problem = problem._replace(data=problem.data.take(images))
    finish(part, share_of_problem, config, plan, network, blocks, save)
    if part.progress == before:
        return None
    save(part)  # includes methods for which a cascade left no example
    return _state(part)


def _clean_pass(
    results: Certificates, problem: Problem, network: Network, process: int, processes: int
) -> np.ndarray:
    """Runs the clean pass: every process predicts some images, and all get the whole result."""
    began = time.monotonic()
    rows = np.array_split(np.arange(len(problem.data)), processes)
    flags = network.correct(problem.data.take(rows[process]))
    # The processes' store holds text: send one bit per image, in hexadecimal digits.
    texts = distributed.decided(np.packbits(flags).tobytes().hex(), lambda values: values)
    results.parts[ATTACK]["seconds"] += time.monotonic() - began
    return np.concatenate(
        [
            np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=len(part)).astype(
                bool
            )
            for text, part in zip(texts, rows, strict=True)
        ]
    )


# --------------------------------------------------------------------------- parts


def select(results: Certificates, rows: np.ndarray) -> Certificates:
    """Copies the examples at `rows` of `results`; the copy's `seconds` start at 0."""
    metadata = copy.deepcopy(results.metadata)
    for part in metadata["parts"].values():
        part["seconds"] = 0.0

    def at_rows(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array[rows] for name, array in arrays.items()}

    return Certificates(
        metadata=metadata,
        index=results.index[rows],
        labels=results.labels[rows],
        attacked=results.attacked[rows],
        correct=results.correct[rows],
        resisted_by=at_rows(results.resisted_by),
        run_by=at_rows(results.run_by),
        verified_by=at_rows(results.verified_by),
        margins_by=at_rows(results.margins_by),
        falsified_by=at_rows(results.falsified_by),
    )


def part_differences(part: Certificates, whole: Certificates) -> list[str]:
    """Names the settings and arrays in which a part differs from the whole; empty if it fits."""
    keys = differing_keys(whole.metadata["settings"], part.metadata["settings"])
    if keys:
        return keys
    if (whole.labels[part.index] != part.labels).any():
        keys.append("labels")
    # The clean pass is written before the first part is.
    if (whole.correct[part.index] != part.correct).any():
        keys.append("correct")
    margins = (*whole.margins_by.values(), *part.margins_by.values())
    if len({array.shape[-1] for array in margins}) > 1:
        keys.append("the number of classes")
    return keys


def merge(results: Certificates, parts: Sequence[Certificates]) -> None:
    """Adds the new results of `parts` to `results`.

    Results that are already there, per example and method, stay: merging a part twice is harmless.
    The parts ran side by side, so the longest of their times counts.

    Args:
      results: filled in place.
      parts: parts of `results`, for which `part_differences` is empty.
    """
    seconds: dict[str, float] = {}
    for part in parts:
        rows = part.index
        new = {ATTACK: part.attacked & ~results.attacked[rows]}
        here = rows[new[ATTACK]]
        results.correct[here] = part.correct[new[ATTACK]]
        for loss, flags in part.resisted_by.items():
            results.resisted_by[loss][here] = flags[new[ATTACK]]
        results.attacked[here] = True
        for name, run in part.run_by.items():
            if name not in results.run_by:
                results.add_method(name, part.margins_by[name].shape[-1])
            new[name] = run & ~results.run_by[name][rows]
            here = rows[new[name]]
            results.verified_by[name][here] = part.verified_by[name][new[name]]
            results.margins_by[name][here] = part.margins_by[name][new[name]]
            if name in part.falsified_by:
                results.falsified_by[name][here] = part.falsified_by[name][new[name]]
            results.run_by[name][here] = True
        for name, flags in new.items():
            if flags.any():
                record = part.parts[name]
                seconds[name] = max(seconds.get(name, 0.0), record["seconds"])
                before = results.parts.get(name, {}).get("seconds", 0.0)
                results.parts[name] = {**record, "seconds": before}
    for name, longest in seconds.items():
        results.parts[name]["seconds"] += longest


# --------------------------------------------------------------------------- files


def part_path(path: Path, process: int, processes: int) -> Path:
    """Returns the path of one process's part."""
    return path.with_name(f"{path.stem}.part-{process}-of-{processes}{path.suffix}")


def gather(path: Path) -> Certificates | None:
    """Reads the file, merges the parts that a killed evaluation left into it, and removes them.

    Parts without the file are discarded: they are left over from a file that was deleted.

    Raises:
      ExperimentError: if a file is damaged, or a part belongs to another evaluation.
      ContradictionError: if one part broke an example that another one verified.
    """
    if not path.exists():
        discard(path)
        return None
    results = certificates.read(path)
    parts = []
    for name in _parts(path):
        part = certificates.read(name, part=True)
        keys = part_differences(part, results)
        if keys:
            raise ExperimentError(
                f"{name} is not a part of {path.name}: it differs in {', '.join(keys)}; delete it"
            )
        parts.append(part)
    if parts:
        merge(results, parts)
        try:
            # Each file is consistent, but one may have broken what another verified.
            certificates.check_attacked(results)
        except ContradictionError as error:
            raise ContradictionError(f"{path} and its parts: {error}") from error
        certificates.write(path, results)
    discard(path)
    return results


def discard(path: Path) -> None:
    """Removes the parts of a file, and parts that were not completely written.

    Raises:
      ExperimentError: if they cannot be removed.
    """
    for part in (*_parts(path), *_parts(path, temporary_name)):
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            raise ExperimentError(f"{part} cannot be removed ({error.strerror})") from error


def read_together(path: Path) -> Certificates:
    """Reads on every process the file that process 0 sees; all must call this.

    Raises:
      ExperimentError: if it is damaged, or another process does not see the same file.
    """
    on_main: list[Certificates] = []

    def read() -> dict[str, Any]:
        on_main.append(certificates.read(path))
        return _state(on_main[0])

    state = distributed.from_main(read)
    return on_main[0] if on_main else _wait_for(path, state)


def _state(results: Certificates) -> dict[str, Any]:
    """Returns what distinguishes a file from its earlier versions."""
    return {"progress": results.progress, "settings": results.metadata["settings"]}


def _wait_for(path: Path, state: Mapping[str, Any], part: bool = False) -> Certificates:
    """Reads a file, or a part's file, as soon as another process has brought it to `state`."""
    end = time.monotonic() + _TIMEOUT
    while True:
        # Listing the folder makes network file systems drop their cache of absent files.
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            results = certificates.read(path, part=part)
            if _state(results) == state:
                return results
        if time.monotonic() > end:
            raise ExperimentError(
                f"{path} is not shared: what another process wrote there did not come within "
                f"{_TIMEOUT:g} s; use a folder that all machines mount"
            )
        time.sleep(_INTERVAL)


def _parts(path: Path, rename: Callable[[str], str] = lambda name: name) -> list[Path]:
    """Lists the files named like parts of `path`, for any number of processes."""
    if not path.parent.is_dir():
        return []
    stem, suffix = rename(f"{path.stem}\n{path.suffix}").split("\n")
    part = re.compile(rf"{re.escape(stem)}\.part-\d+-of-\d+{re.escape(suffix)}")
    return sorted(file for file in path.parent.iterdir() if part.fullmatch(file.name))

"""One evaluation by several processes: who does what, and how it comes together.

The items are blocks of a batch: the batches of the attack, then those of what is misclassified.
Block i is process i mod N's. What a block costs depends on what is in it (a cascade leaves out what
is decided, and data sets are sorted by class), so neighbours go to different processes. Nothing
waits in between: every process writes the file of its own part, `NAME.part-K-of-N.npz`, after each
batch, and process 0 puts the parts into `NAME.npz` at the end, or when the next evaluation begins,
whatever number of processes that has.
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

# Seconds until a network file system shows what another machine wrote, and between two looks.
_PATIENCE, _INTERVAL = 60.0, 0.2


def share(
    correct: np.ndarray, size: int, process: int, processes: int
) -> tuple[np.ndarray, list[Block]]:
    """What one of several processes evaluates.

    Args:
      correct: which images are classified correctly, bool `[N]`.
      size: of a block.
      process, processes: which one, and of how many.

    Returns:
      Its images, ascending, and its blocks of the attack, whose rows count within these.
    """
    attacked, others = attack_blocks(correct, size), attack_blocks(~correct, size)
    mine = (attacked + others)[process::processes]
    images = np.sort(np.concatenate([np.zeros(0, int), *(block.rows for block in mine)]))
    return images, [
        Block(block.number, np.searchsorted(images, block.rows))
        for block in attacked[process::processes]
    ]


def complete(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    path: Path,
    saving: Callable[[Path], Callable[[Certificates], None]],
) -> Certificates:
    """As `measure.complete`, by all processes together, which all call it and get the result.

    Args:
      found: what the file at `path` holds, the same on all.
      problem, config, plan: as there.
      path: of the file.
      saving: from the path of this process's part to what is called after every batch.

    Raises:
      ExperimentError, RuntimeError: as `measure.complete`; ExperimentError if `path` does not lie
        in a folder of all processes.
    """
    process, processes = distributed.process(), distributed.processes()
    begin(found, problem, config, plan)
    network = Network(problem, config)
    if not found.attacked.any():
        found.know_correct(_clean_pass(found, problem, network, process, processes))
    # Before there are parts: they rest on which images are correct, and on what was forgotten.
    distributed.from_main(lambda: certificates.write(path, found))
    written = part_path(path, process, processes)
    state = complete_share(
        found, problem, config, plan, network, process, processes, saving(written)
    )

    def collect(states: list[Mapping[str, Any] | None]) -> None:
        for number, of_part in enumerate(states):
            if of_part is not None:
                _wait_for(part_path(path, number, processes), of_part, part=True)
        gather(path)

    distributed.decided(state, collect)
    return read_together(path)


def complete_share(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    network: Network,
    process: int,
    processes: int,
    save: Callable[[Certificates], None],
) -> dict[str, Any] | None:
    """The share of one process, of an evaluation whose clean pass is done; left alone otherwise.

    Returns:
      The state of the part that was saved last; None if there was nothing to do.
    """
    images, blocks = share(found.correct, network.size, process, processes)
    if not len(images):
        return None
    part = part_of(found, images)
    before = part.progress
    own = problem._replace(data=problem.data.take(images))
    finish(part, own, config, plan, network, blocks, save)
    if part.progress == before:
        return None
    save(part)  # with methods that a cascade had no example for
    return _state(part)


def _clean_pass(
    found: Certificates, problem: Problem, network: Network, process: int, processes: int
) -> np.ndarray:
    """Which images are correct: every process looks at some, and hears of the others."""
    began = time.monotonic()
    rows = np.array_split(np.arange(len(problem.data)), processes)
    flags = network.correct(problem.data.take(rows[process]))
    # As text through the store of the processes, a bit per image.
    texts = distributed.decided(np.packbits(flags).tobytes().hex(), lambda values: values)
    found.parts[ATTACK]["seconds"] += time.monotonic() - began
    return np.concatenate(
        [
            np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=len(of)).astype(bool)
            for text, of in zip(texts, rows, strict=True)
        ]
    )


# --------------------------------------------------------------------------- parts


def part_of(found: Certificates, rows: np.ndarray) -> Certificates:
    """A copy of some of the examples, at rows of `found`; its `seconds` count from here."""
    metadata = copy.deepcopy(found.metadata)
    for part in metadata["parts"].values():
        part["seconds"] = 0.0

    def taken(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array[rows] for name, array in arrays.items()}

    return Certificates(
        metadata=metadata,
        index=found.index[rows],
        labels=found.labels[rows],
        attacked=found.attacked[rows],
        correct=found.correct[rows],
        resisted_by=taken(found.resisted_by),
        run_by=taken(found.run_by),
        verified_by=taken(found.verified_by),
        margins_by=taken(found.margins_by),
    )


def part_differences(part: Certificates, whole: Certificates) -> list[str]:
    """The settings and arrays that show a part to be of another evaluation; empty if it fits."""
    keys = differing_keys(whole.metadata["settings"], part.metadata["settings"])
    if keys:
        return keys
    if (whole.labels[part.index] != part.labels).any():
        keys.append("labels")
    # The clean pass is finished and written before the first part is.
    if (whole.correct[part.index] != part.correct).any():
        keys.append("correct")
    margins = (*whole.margins_by.values(), *part.margins_by.values())
    if len({array.shape[-1] for array in margins}) > 1:
        keys.append("the number of classes")
    return keys


def put_together(found: Certificates, parts: Sequence[Certificates]) -> None:
    """Takes into `found` what `parts` of it have found since.

    What is known already, of an example and a method, is left as it is: a part may be put in twice.
    The parts worked side by side: of their times the longest counts.

    Args:
      found: filled in place.
      parts: for which `part_differences` returns nothing.
    """
    seconds: dict[str, float] = {}
    for part in parts:
        rows = part.index
        new = {ATTACK: part.attacked & ~found.attacked[rows]}
        here = rows[new[ATTACK]]
        found.correct[here] = part.correct[new[ATTACK]]
        for loss, flags in part.resisted_by.items():
            found.resisted_by[loss][here] = flags[new[ATTACK]]
        found.attacked[here] = True
        for name, run in part.run_by.items():
            if name not in found.run_by:
                found.add_method(name, part.margins_by[name].shape[-1])
            new[name] = run & ~found.run_by[name][rows]
            here = rows[new[name]]
            found.verified_by[name][here] = part.verified_by[name][new[name]]
            found.margins_by[name][here] = part.margins_by[name][new[name]]
            found.run_by[name][here] = True
        for name, flags in new.items():
            if flags.any():
                record = part.parts[name]
                seconds[name] = max(seconds.get(name, 0.0), record["seconds"])
                before = found.parts.get(name, {}).get("seconds", 0.0)
                found.parts[name] = {**record, "seconds": before}
    for name, longest in seconds.items():
        found.parts[name]["seconds"] += longest


# --------------------------------------------------------------------------- files


def part_path(path: Path, process: int, processes: int) -> Path:
    """The file of one process's part."""
    return path.with_name(f"{path.stem}.part-{process}-of-{processes}{path.suffix}")


def gather(path: Path) -> Certificates | None:
    """The file with what a killed evaluation left in parts; puts them into it and removes them.

    Parts without the file are what is left of one that was deleted: they do not count.

    Raises:
      ExperimentError: if a file is damaged, or a part is one of another evaluation.
      ContradictionError: if what one of them has verified another one has broken.
    """
    if not path.exists():
        discard(path)
        return None
    found = certificates.read(path)
    parts = []
    for name in _parts(path):
        part = certificates.read(name, part=True)
        keys = part_differences(part, found)
        if keys:
            raise ExperimentError(
                f"{name} is no part of {path.name}, it differs in {', '.join(keys)}; delete it"
            )
        parts.append(part)
    if parts:
        put_together(found, parts)
        try:
            # Each file agrees with itself, but one may have broken what another has verified.
            certificates.check_attacked(found)
        except ContradictionError as error:
            raise ContradictionError(f"{path} and its parts: {error}") from error
        certificates.write(path, found)
    discard(path)
    return found


def discard(path: Path) -> None:
    """Removes the parts of a file, and what was not written to their end.

    Raises:
      ExperimentError: if they cannot be removed.
    """
    for part in (*_parts(path), *_parts(path, temporary_name)):
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            raise ExperimentError(f"{part} cannot be removed ({error.strerror})") from error


def read_together(path: Path) -> Certificates:
    """The file as process 0 sees it, on every process; all must call this.

    Raises:
      ExperimentError: if it is damaged, or another process does not see the same.
    """
    here: list[Certificates] = []

    def read() -> dict[str, Any]:
        here.append(certificates.read(path))
        return _state(here[0])

    state = distributed.from_main(read)
    return here[0] if here else _wait_for(path, state)


def _state(found: Certificates) -> dict[str, Any]:
    """What tells a file from those that were there before."""
    return {"progress": found.progress, "settings": found.metadata["settings"]}


def _wait_for(path: Path, state: Mapping[str, Any], part: bool = False) -> Certificates:
    """Reads a file, perhaps of a part, that another process has brought to that state."""
    end = time.monotonic() + _PATIENCE
    while True:
        # A listing makes network file systems forget what they remember as absent.
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            found = certificates.read(path, part=part)
            if _state(found) == state:
                return found
        if time.monotonic() > end:
            raise ExperimentError(
                f"{path} is not shared: what another process wrote there did not come within "
                f"{_PATIENCE:g} s; use a folder that all machines mount"
            )
        time.sleep(_INTERVAL)


def _parts(path: Path, named: Callable[[str], str] = lambda name: name) -> list[Path]:
    """The files that are named like its parts, of however many processes."""
    if not path.parent.is_dir():
        return []
    stem, suffix = named(f"{path.stem}\n{path.suffix}").split("\n")
    part = re.compile(rf"{re.escape(stem)}\.part-\d+-of-\d+{re.escape(suffix)}")
    return sorted(file for file in path.parent.iterdir() if part.fullmatch(file.name))

"""Results of attacks on a random network by example, and the files that hold them.

`experiments.evaluate` writes an `.npz` file without pickled objects for a random network as well.
It has no bounds, because nothing certifies such a network. With N examples:

    metadata            JSON: "format", "kind", "settings" (what was evaluated, how) and "parts"
    labels              int [N]
    clean_run           bool [N]: the clean pass is done
    correct             bool [N]: the mean softmax of the label is the largest
    <attack>_run        bool [N]: the attack is done, or the image is misclassified anyway
    <attack>_resisted   bool [N]: correct, and still so at the point that the attack found

Attacks are `eot-fgsm-n20-eps0.3` and `eot-pgd-n5-eps0.3` (`random_network.Attack`). "parts" records
for the clean pass and for each attack the packages and devices it ran with, and its seconds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluation import array_archive
from experiments.evaluation.array_archive import ArrayArchive
from experiments.evaluation.certificate_checks import LONGEST, METADATA, SHA256
from experiments.records.files import replace
from experiments.records.formats import (
    NOT_NEGATIVE,
    OBJECT,
    TEXT,
    FormatError,
    Rule,
    check_group,
    integer,
    one_of,
    parse_object,
    shown,
)
from experiments.settings.config import NORMS
from experiments.settings.errors import ExperimentError

CLEAN = "clean"
KIND = "random network"
_FORMAT = 1
_LABELS, _CORRECT, _RUN, _RESISTED = "labels", "correct", "_run", "_resisted"
_ATTACK_NAME = re.compile(r"(eot-fgsm|eot-pgd)-n([1-9]\d*)-eps(\d+(?:\.\d+)?(?:e[+-]\d+)?)")
_SETTINGS = {
    "parameters_sha256": SHA256,
    "images_sha256": SHA256,
    "data": TEXT,
    "split": one_of(("test", "validation")),
    "count": integer(1),
    "which": TEXT,
    "norm": one_of(NORMS),
    "clip": Rule("[0.0, 1.0] or null", lambda value: value in (None, [0.0, 1.0])),
    "prediction_draws": integer(1),
    "pgd_steps": integer(0),
    "batch_size": integer(1),
    "seed": integer(),
}
_RECORD = {"versions": OBJECT, "device": TEXT, "seconds": NOT_NEGATIVE}


class RandomResults(NamedTuple):
    """The arrays of an evaluation file of a random network (see the module), complete or not.

    They are filled in place; `clean_run` and `run_by` record the progress.
    """

    metadata: dict[str, Any]
    labels: np.ndarray
    clean_run: np.ndarray
    correct: np.ndarray
    run_by: dict[str, np.ndarray]  # per attack
    resisted_by: dict[str, np.ndarray]

    @property
    def settings(self) -> dict[str, Any]:
        """What was evaluated, and how."""
        return self.metadata["settings"]

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The records of the clean pass (`"clean"`) and of each attack."""
        return self.metadata["parts"]

    @property
    def seconds(self) -> float:
        """The total time."""
        return sum(part["seconds"] for part in self.parts.values())

    def add_attack(self, name: str) -> None:
        """Adds the arrays of an attack that has not run yet."""
        self.run_by.setdefault(name, np.zeros(len(self.labels), bool))
        self.resisted_by.setdefault(name, np.zeros(len(self.labels), bool))

    def errors(self) -> dict[str, Any]:
        """The standard error and that under each attack, in [0, 1]; None for one that is not done.

        Raises:
          ExperimentError: if the clean pass is not done.
        """
        if not self.clean_run.all():
            raise ExperimentError("the clean pass is not done; repeat the command to resume")
        return {
            "standard_error": float(1.0 - np.mean(self.correct)),
            "attack_errors": {
                name: float(1.0 - np.mean(flags)) if self.run_by[name].all() else None
                for name, flags in self.resisted_by.items()
            },
        }


def parsed(name: str) -> tuple[str, int, float]:
    """Returns kind, draws and radius of an attack by its name.

    Raises:
      FormatError: for another text.
    """
    match = _ATTACK_NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"expected an attack like eot-pgd-n20-eps0.3, got {shown(name)}")
    return match[1], int(match[2]), float(match[3])


def empty(labels: np.ndarray, settings: dict[str, Any]) -> RandomResults:
    """Starts an evaluation of examples with `labels` `[N]`."""
    metadata = {"format": _FORMAT, "kind": KIND, "settings": settings, "parts": {}}
    flags = np.zeros(len(labels), bool)
    return RandomResults(metadata, np.asarray(labels), flags, flags.copy(), {}, {})


def write(path: Path, results: RandomResults) -> None:
    """Replaces the file atomically.

    Raises:
      ExperimentError: if it cannot be written.
    """
    arrays = {
        METADATA: np.array(json.dumps(results.metadata)),
        _LABELS: results.labels,
        CLEAN + _RUN: results.clean_run,
        _CORRECT: results.correct,
    }
    for name, run in results.run_by.items():
        arrays |= {name + _RUN: run, name + _RESISTED: results.resisted_by[name]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # NumPy's stub checks the arrays against `allow_pickle` as well.
        replace(path, lambda stream: np.savez(stream, **arrays))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror})") from error


def read(path: Path) -> RandomResults:
    """Reads the evaluation file of a random network; refuses a damaged or inconsistent one.

    Raises:
      ExperimentError: if it is not such a file, cannot be read, or contradicts itself.
    """
    try:
        with array_archive.opened(path) as archive:
            metadata = _metadata(archive)
            names = _attacks(archive, metadata["settings"]["count"])
            arrays = {name: archive.array(name) for name in archive.names if name != METADATA}
        results = RandomResults(
            metadata,
            arrays[_LABELS],
            arrays[CLEAN + _RUN],
            arrays[_CORRECT],
            {name: arrays[name + _RUN] for name in names},
            {name: arrays[name + _RESISTED] for name in names},
        )
        _check_contents(results)
    except FormatError as error:
        raise ExperimentError(
            f"{path} is not an evaluation file of a random network: {error}; "
            f"{error.advice or 'delete it to evaluate anew'}"
        ) from error
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be read ({error.strerror or type(error).__name__}); "
            "if it is damaged, delete it to evaluate anew"
        ) from error
    return results


def _metadata(archive: ArrayArchive) -> dict[str, Any]:
    if METADATA not in archive.names:
        raise FormatError(f"array {METADATA!r} is missing")
    header = archive.header(METADATA)
    if header.dtype.kind != "U" or header.shape != () or header.dtype.itemsize > 4 * LONGEST:
        raise FormatError(f"{METADATA} must be a text of at most {LONGEST:,} characters")
    try:
        metadata = parse_object(archive.array(METADATA).item())
    except ValueError as error:  # NumPy raises it for invalid text
        raise FormatError(f"{METADATA}: {error}") from error
    formats = Rule(f"{_FORMAT}", lambda value: value == _FORMAT and type(value) is int)
    rules = {"format": formats, "kind": one_of((KIND,)), "settings": OBJECT, "parts": OBJECT}
    check_group("", metadata, rules)
    check_group("settings.", metadata["settings"], _SETTINGS)
    for name, record in metadata["parts"].items():
        if not isinstance(record, dict):
            raise FormatError(f"parts.{shown(name)} must be an object, got {shown(record)}")
        check_group(f"parts.{name}.", record, _RECORD)
    return metadata


def _attacks(archive: ArrayArchive, count: int) -> tuple[str, ...]:
    """Checks names, types and shapes of the arrays, and returns the names of the attacks."""
    flags = [CLEAN + _RUN, _CORRECT]
    names = [n.removesuffix(_RUN) for n in archive.names if n.endswith(_RUN) and n not in flags]
    for name in names:
        parsed(name)
        flags += [name + _RUN, name + _RESISTED]
    expected = {METADATA, _LABELS, *flags}
    if expected != set(archive.names):
        differing = sorted(expected ^ set(archive.names))[0]
        problem = "is missing" if differing in expected else "is unknown"
        raise FormatError(f"array {shown(differing)} {problem}")
    for name in (_LABELS, *flags):
        header = archive.header(name)
        kinds = "iu" if name == _LABELS else "b"
        if header.dtype.kind not in kinds or header.shape != (count,):
            kind = "int" if name == _LABELS else "bool"
            raise FormatError(f"{name} must be {kind} [{count}], got {header}")
    return tuple(names)


def _check_contents(results: RandomResults) -> None:
    if (results.correct & ~results.clean_run).any():
        raise FormatError(f"{_CORRECT} is True of an example without a clean pass")
    for name, flags in results.resisted_by.items():
        if (flags & ~(results.run_by[name] & results.correct)).any():
            raise FormatError(
                f"{name}{_RESISTED} is True of an example that is misclassified or not attacked"
            )
    for name, run in ((CLEAN, results.clean_run), *results.run_by.items()):
        if run.any() and name not in results.parts:
            raise FormatError(f"parts.{name} is missing, expected the record of {name}")

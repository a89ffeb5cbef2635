"""Evaluations example by example, their files, and the check that they are consistent.

A file of `experiments.evaluate` is an `.npz` without pickled objects: numpy alone reads it, and
everything that its errors rest on can be checked again (`read`). Of N examples with C classes:

    metadata            JSON: "settings" (what was evaluated, and how) and "parts" (see below)
    index               int [N]: which images of the split
    labels              int [N]
    attacked            bool [N]: the clean pass and the attacks are done
    correct             bool [N]: the logit of the label is the largest
    resisted_<loss>     bool [N]: correct at the strongest point of the attack on that loss
    <method>_run        bool [N]: the method was run on it (all, unless in a cascade)
    <method>_verified   bool [N]: every margin is positive
    <method>_margins    float32 [N, C]: lower bounds on z_label - z_c; NaN where it was not run

"parts" says of the attacks and of every method with which packages and devices it was run, for how
many seconds, and for which arithmetic a certificate holds.

Several processes write such a file each, of their own examples, which become one at the end
(`experiments.evaluation.shards`).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.records.files import replace
from experiments.settings.errors import ContradictionError, ExperimentError, one_line

ATTACK = "attack"
_FORMAT = 1
_RESISTED, _RUN, _VERIFIED, _MARGINS = "resisted_", "_run", "_verified", "_margins"


class Evaluation(NamedTuple):
    """What was found for each example (bool `[N]`); the errors are fractions in `[0, 1]`."""

    correct: np.ndarray
    resisted: np.ndarray  # still correct at the strongest point of every attack
    verified_by: dict[str, np.ndarray]  # per method of `boundjax.certify`
    run_by: dict[str, np.ndarray] = {}  # noqa: RUF012 - where each was run; all, if left out

    @property
    def verified(self) -> np.ndarray:
        """Verified by at least one of the methods, which are all sound."""
        return np.logical_or.reduce(list(self.verified_by.values()))

    def errors(self) -> dict[str, Any]:
        """The errors, as `summary.json` holds them; None of a method not run on all examples."""
        return {
            "standard_error": _error(self.correct),
            "pgd_error": _error(self.resisted),
            "verified_error": _error(self.verified),
            "verified_error_by": {
                name: _error(flags) if self.run_by.get(name, np.True_).all() else None
                for name, flags in self.verified_by.items()
            },
        }


class Certificates(NamedTuple):
    """An evaluation that is under way or done: the arrays of a file (see the module).

    They are filled in place, `attacked` and `run_by` say how far; `metadata` is that of the file.
    """

    metadata: dict[str, Any]
    index: np.ndarray
    labels: np.ndarray
    attacked: np.ndarray
    correct: np.ndarray
    resisted_by: dict[str, np.ndarray]  # per loss
    run_by: dict[str, np.ndarray]  # per method
    verified_by: dict[str, np.ndarray]
    margins_by: dict[str, np.ndarray]

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """What the attacks (`"attack"`) and each method were run with."""
        return self.metadata["parts"]

    @property
    def seconds(self) -> float:
        """The time it took in all."""
        return sum(part["seconds"] for part in self.parts.values())

    @property
    def evaluation(self) -> Evaluation:
        """What it says of each example, without how it is known."""
        resisted = np.logical_and.reduce(list(self.resisted_by.values()))
        return Evaluation(self.correct, resisted, self.verified_by, self.run_by)

    @property
    def progress(self) -> dict[str, int]:
        """On how many examples each part is done."""
        counts = {ATTACK: self.attacked} | self.run_by
        return {name: int(flags.sum()) for name, flags in counts.items()}

    def know_correct(self, correct: np.ndarray) -> None:
        """Takes in the clean pass, bool `[N]`."""
        self.correct[:] = correct
        # The centre is a point of the ball as well: what is wrong there needs no attack.
        self.attacked[~correct] = True

    def add_method(self, name: str, classes: int) -> None:
        """Makes room for a method, which was run on nothing yet."""
        self.run_by[name] = np.zeros(len(self.labels), bool)
        self.verified_by[name] = np.zeros(len(self.labels), bool)
        self.margins_by[name] = np.full((len(self.labels), classes), np.nan, np.float32)

    def errors(self) -> dict[str, Any]:
        """The errors, computed from the arrays.

        Raises:
          ExperimentError: for an evaluation that has not met every example yet.
        """
        if not self.attacked.all():
            raise ExperimentError(
                f"only {self.attacked.sum():,} of {len(self.attacked):,} images are evaluated; "
                "repeat the command to go on"
            )
        return self.evaluation.errors()


def nothing_found(labels: np.ndarray, losses: tuple[str, ...], settings: Any) -> Certificates:
    """The start of an evaluation of examples with `labels` `[N]`, attacked by `losses`."""

    def no() -> np.ndarray:
        return np.zeros(len(labels), bool)

    return Certificates(
        metadata={"format": _FORMAT, "settings": settings, "parts": {}},
        index=np.arange(len(labels)),
        labels=np.asarray(labels),
        attacked=no(),
        correct=no(),
        resisted_by={loss: no() for loss in losses},
        run_by={},
        verified_by={},
        margins_by={},
    )


def proven(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which certificates `margins` `[N, C]` are: bool `[N]`, finite and positive off the label."""
    own = np.arange(margins.shape[-1])[None] == labels[:, None]
    return ((own | (margins > 0)) & np.isfinite(margins)).all(axis=-1)


def check_consistency(evaluation: Evaluation, index: np.ndarray | None = None) -> None:
    """Standard <= PGD <= verified error by example: what is verified is correct and resists.

    Args:
      evaluation: of the examples `index`; None: of 0, 1, ...
      index: int `[N]`.

    Raises:
      ContradictionError: naming the first example and the method that break it.
    """

    def require(holds: np.ndarray, what: str) -> None:
        broken = np.flatnonzero(~holds)
        if broken.size:
            example = broken[0] if index is None else index[broken[0]]
            raise ContradictionError(
                f"example {example} ({broken.size} in all) {what}: "
                "a bound or the attack is wrong, please report it"
            )

    require(~evaluation.resisted | evaluation.correct, "resists PGD but is misclassified")
    for name, flags in evaluation.verified_by.items():
        require(~flags | evaluation.correct, f"is verified by {name} but misclassified")
        require(~flags | evaluation.resisted, f"is verified by {name} but PGD breaks it")


def write(path: Path, found: Certificates) -> None:
    """Replaces the file whole: whoever reads it, or kills this, never sees half of one.

    Raises:
      ExperimentError: if it cannot be written.
    """
    arrays = {
        "metadata": np.array(json.dumps(found.metadata)),
        "index": found.index,
        "labels": found.labels,
        "attacked": found.attacked,
        "correct": found.correct,
    }
    arrays |= {f"{_RESISTED}{loss}": flags for loss, flags in found.resisted_by.items()}
    for name in found.run_by:
        arrays[f"{name}{_RUN}"] = found.run_by[name]
        arrays[f"{name}{_VERIFIED}"] = found.verified_by[name]
        arrays[f"{name}{_MARGINS}"] = found.margins_by[name]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda stream: np.savez(stream, **arrays))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror})") from error


def read(path: Path) -> Certificates:
    """Reads a file of `experiments.evaluate` and checks that it agrees with itself.

    `read(path).errors()` are the errors, recomputed; `check_consistency(read(path).evaluation)`
    compares certificates with attacks.

    Raises:
      ExperimentError: if it is no such file, or its flags are not what its margins say.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = dict(stored)
        metadata = json.loads(str(arrays.pop("metadata")))
        if metadata["format"] != _FORMAT:
            raise ValueError(f"format {metadata['format']}, this version reads {_FORMAT}")
        run_by = _with_suffix(arrays, _RUN)
        found = Certificates(
            metadata=metadata,
            index=arrays["index"],
            labels=arrays["labels"],
            attacked=arrays["attacked"],
            correct=arrays["correct"],
            resisted_by={
                name.removeprefix(_RESISTED): flags
                for name, flags in arrays.items()
                if name.startswith(_RESISTED)
            },
            run_by=run_by,
            verified_by={name: arrays[f"{name}{_VERIFIED}"] for name in run_by},
            margins_by={name: arrays[f"{name}{_MARGINS}"] for name in run_by},
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ExperimentError(
            f"{path} is no file of evaluations ({one_line(error)}); delete it to evaluate anew"
        ) from error
    for name, margins in found.margins_by.items():
        differing = np.flatnonzero(proven(margins, found.labels) != found.verified_by[name])
        if differing.size:
            raise ExperimentError(
                f"{path}: {name} of example {differing[0]} ({differing.size} in all) is not what "
                "its margins say; delete the file to evaluate anew"
            )
    return found


def _with_suffix(arrays: dict[str, np.ndarray], suffix: str) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(suffix): array for name, array in arrays.items() if name.endswith(suffix)
    }


def _error(good: np.ndarray) -> float:
    return float(1.0 - np.mean(good))

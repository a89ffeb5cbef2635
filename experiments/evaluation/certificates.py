"""Evaluations example by example, their files, and the check that they are consistent.

A file of `experiments.evaluate` is an `.npz` without pickled objects: numpy alone reads it, and
everything that its errors rest on can be checked again (`read`). Of N examples with C classes:

    metadata            JSON: "format", "settings" (what was evaluated, how) and "parts" (see below)
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

What a file must hold to be read is in `experiments.evaluation.certificate_checks`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluation import array_archive
from experiments.evaluation.certificate_checks import (
    ATTACK,
    ATTACKED,
    CORRECT,
    FORMAT,
    INDEX,
    LABELS,
    MARGINS,
    METADATA,
    RESISTED,
    RUN,
    VERIFIED,
    check_arrays,
    check_contents,
    read_metadata,
)
from experiments.records.files import replace
from experiments.records.formats import FormatError
from experiments.settings.errors import ContradictionError, ExperimentError


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
        """Records the clean pass, bool `[N]`, and forgets the results of earlier attacks."""
        self.correct[:] = correct
        for resisted in self.resisted_by.values():
            resisted[:] = False
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
        metadata={"format": FORMAT, "settings": settings, "parts": {}},
        index=np.arange(len(labels)),
        labels=np.asarray(labels),
        attacked=no(),
        correct=no(),
        resisted_by={loss: no() for loss in losses},
        run_by={},
        verified_by={},
        margins_by={},
    )


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


def check_attacked(certificates: Certificates) -> None:
    """As `check_consistency`, but an example that is not attacked yet counts as resisting.

    Raises:
      ContradictionError: as there.
    """
    evaluation = certificates.evaluation
    resisted = np.where(certificates.attacked, evaluation.resisted, certificates.correct)
    check_consistency(evaluation._replace(resisted=resisted), certificates.index)


def write(path: Path, found: Certificates) -> None:
    """Replaces the file whole: whoever reads it, or kills this, never sees half of one.

    Raises:
      ExperimentError: if it cannot be written.
    """
    arrays = {
        METADATA: np.array(json.dumps(found.metadata)),
        INDEX: found.index,
        LABELS: found.labels,
        ATTACKED: found.attacked,
        CORRECT: found.correct,
    }
    arrays |= {f"{RESISTED}{loss}": flags for loss, flags in found.resisted_by.items()}
    for name in found.run_by:
        arrays[f"{name}{RUN}"] = found.run_by[name]
        arrays[f"{name}{VERIFIED}"] = found.verified_by[name]
        arrays[f"{name}{MARGINS}"] = found.margins_by[name]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda stream: np.savez(stream, **arrays))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror})") from error


def read(path: Path, *, part: bool = False) -> Certificates:
    """Reads a file of `experiments.evaluate`, and refuses one that is damaged or inconsistent.

    `read(path).errors()` are the errors, recomputed. Only the network itself could show whether the
    margins are its bounds; everything else is checked
    (`experiments.evaluation.certificate_checks`).

    Args:
      path: of the file.
      part: whether one of several processes wrote it, with its own examples only
        (`experiments.evaluation.shards`).

    Raises:
      ExperimentError: if it is no such file, cannot be read, or does not agree with itself.
      ContradictionError: if an example is verified that is misclassified or broken by an attack.
    """
    try:
        with array_archive.opened(path) as archive:
            metadata = read_metadata(archive)
            layout = check_arrays(archive, metadata, part)
            arrays = {name: archive.array(name) for name in archive.names if name != METADATA}
        check_contents(layout, metadata, arrays)
    except FormatError as error:
        raise ExperimentError(
            f"{path} is not an evaluation file: {error}; "
            f"{error.advice or 'delete it to evaluate anew'}"
        ) from error
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be read ({error.strerror or type(error).__name__}); "
            "if it is damaged, delete it to evaluate anew"
        ) from error
    certificates = Certificates(
        metadata=metadata,
        index=arrays[INDEX],
        labels=arrays[LABELS],
        attacked=arrays[ATTACKED],
        correct=arrays[CORRECT],
        # In the order in which they are attacked.
        resisted_by={loss: arrays[f"{RESISTED}{loss}"] for loss in layout.losses},
        run_by={name: arrays[f"{name}{RUN}"] for name in layout.methods},
        verified_by={name: arrays[f"{name}{VERIFIED}"] for name in layout.methods},
        margins_by={name: arrays[f"{name}{MARGINS}"] for name in layout.methods},
    )
    try:
        check_attacked(certificates)
    except ContradictionError as error:
        raise ContradictionError(
            f"{path}: {error}; if the file was changed, delete it to evaluate anew"
        ) from error
    return certificates


def _error(good: np.ndarray) -> float:
    return float(1.0 - np.mean(good))

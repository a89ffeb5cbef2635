"""Results by example, the files that hold them, and the check that they are consistent.

`experiments.evaluate` writes an `.npz` file without pickled objects. NumPy alone can read it, and
everything that its errors rest on can be checked again (`read`). With N examples and C classes:

    metadata            JSON: "format", "settings" (what was evaluated, how) and "parts" (see below)
    index               int [N]: which images of the split
    labels              int [N]
    attacked            bool [N]: the clean pass and the attacks are done
    correct             bool [N]: the logit of the label is the largest
    resisted_<loss>     bool [N]: correct at the strongest point of the attack on that loss
    <method>_run        bool [N]: the method was run on it (all, unless in a cascade)
    <method>_verified   bool [N]: every margin is positive
    <method>_margins    float32 [N, C]: lower bounds on z_label - z_c; NaN where it was not run
    complete_falsified  bool [N]: the search came to a counterexample

"parts" records for the attacks and for each method the packages and devices it ran with, the
seconds it took, and the arithmetic for which a certificate holds; for `complete` also how many
seconds every undecided image was searched.

Several processes write one such file each, with the examples of their share; the files are merged
at the end (`experiments.evaluation.shards`).

`experiments.evaluation.certificate_checks` states what a file must hold to be read.
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
    FALSIFIED,
    FORMAT,
    INDEX,
    LABELS,
    MARGINS,
    METADATA,
    RESISTED,
    RUN,
    SEARCHED,
    VERIFIED,
    check_arrays,
    check_contents,
    read_metadata,
)
from experiments.records.files import replace
from experiments.records.formats import FormatError
from experiments.settings.errors import ContradictionError, ExperimentError


class Evaluation(NamedTuple):
    """Results for each example (bool `[N]`); the errors are fractions in `[0, 1]`."""

    correct: np.ndarray
    resisted: np.ndarray  # still correct at the strongest point of every attack
    verified_by: dict[str, np.ndarray]  # per method of `boundjax.certify`
    run_by: dict[str, np.ndarray] = {}  # noqa: RUF012 - where each ran; a missing one ran everywhere

    @property
    def verified(self) -> np.ndarray:
        """Verified by at least one of the methods; all of them are sound."""
        return np.logical_or.reduce(list(self.verified_by.values()))

    def errors(self) -> dict[str, Any]:
        """Returns the errors as in `summary.json`; None for a method not run on all examples."""
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
    """The arrays of an evaluation file (see the module), complete or not.

    They are filled in place; `attacked` and `run_by` record the progress.
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
    falsified_by: dict[str, np.ndarray]  # per method that looks for counterexamples

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The records of the attacks (`"attack"`) and of each method."""
        return self.metadata["parts"]

    @property
    def seconds(self) -> float:
        """The total time."""
        return sum(part["seconds"] for part in self.parts.values())

    @property
    def evaluation(self) -> Evaluation:
        """The results by example, without their evidence."""
        resisted = np.logical_and.reduce(list(self.resisted_by.values()))
        return Evaluation(self.correct, resisted, self.verified_by, self.run_by)

    @property
    def progress(self) -> dict[str, int]:
        """How many examples each part has finished."""
        counts = {ATTACK: self.attacked} | self.run_by
        return {name: int(flags.sum()) for name, flags in counts.items()}

    def record_clean_pass(self, correct: np.ndarray) -> None:
        """Records the clean pass, bool `[N]`, and discards the results of earlier attacks."""
        self.correct[:] = correct
        for resisted in self.resisted_by.values():
            resisted[:] = False
        # The ball contains its centre, so a misclassified image needs no attack.
        self.attacked[~correct] = True

    def add_method(self, name: str, classes: int) -> None:
        """Adds the arrays of a method that has not run yet."""
        self.run_by[name] = np.zeros(len(self.labels), bool)
        self.verified_by[name] = np.zeros(len(self.labels), bool)
        self.margins_by[name] = np.full((len(self.labels), classes), np.nan, np.float32)
        if name in SEARCHED:
            self.falsified_by[name] = np.zeros(len(self.labels), bool)

    def reset(self, name: str, rows: np.ndarray) -> None:
        """Discards the results of a method for some examples, bool `[N]`."""
        self.run_by[name][rows] = False
        self.verified_by[name][rows] = False
        self.margins_by[name][rows] = np.nan
        if name in self.falsified_by:
            self.falsified_by[name][rows] = False

    def errors(self) -> dict[str, Any]:
        """Computes the errors from the arrays.

        Raises:
          ExperimentError: if some examples are not evaluated yet.
        """
        if not self.attacked.all():
            raise ExperimentError(
                f"only {self.attacked.sum():,} of {len(self.attacked):,} images are evaluated; "
                "repeat the command to resume"
            )
        return self.evaluation.errors()


def empty(labels: np.ndarray, losses: tuple[str, ...], settings: Any) -> Certificates:
    """Starts an evaluation of examples with `labels` `[N]` that attacks `losses`."""

    def all_false() -> np.ndarray:
        return np.zeros(len(labels), bool)

    return Certificates(
        metadata={"format": FORMAT, "settings": settings, "parts": {}},
        index=np.arange(len(labels)),
        labels=np.asarray(labels),
        attacked=all_false(),
        correct=all_false(),
        resisted_by={loss: all_false() for loss in losses},
        run_by={},
        verified_by={},
        margins_by={},
        falsified_by={},
    )


def check_consistency(evaluation: Evaluation, index: np.ndarray | None = None) -> None:
    """Checks standard <= PGD <= verified error: a verified example is correct and resists.

    Args:
      evaluation: the results to check.
      index: int `[N]`, the examples' numbers for messages; None: 0, 1, ...

    Raises:
      ContradictionError: names the first example and the method that break it.
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
    """Does `check_consistency`, but counts an example that is not attacked yet as resisting.

    Raises:
      ContradictionError: as `check_consistency`.
    """
    evaluation = certificates.evaluation
    resisted = np.where(certificates.attacked, evaluation.resisted, certificates.correct)
    check_consistency(evaluation._replace(resisted=resisted), certificates.index)


def write(path: Path, results: Certificates) -> None:
    """Replaces the file atomically: no reader sees half a file, and no killed writer leaves one.

    Raises:
      ExperimentError: if it cannot be written.
    """
    arrays = {
        METADATA: np.array(json.dumps(results.metadata)),
        INDEX: results.index,
        LABELS: results.labels,
        ATTACKED: results.attacked,
        CORRECT: results.correct,
    }
    arrays |= {f"{RESISTED}{loss}": flags for loss, flags in results.resisted_by.items()}
    for name in results.run_by:
        arrays[f"{name}{RUN}"] = results.run_by[name]
        arrays[f"{name}{VERIFIED}"] = results.verified_by[name]
        arrays[f"{name}{MARGINS}"] = results.margins_by[name]
    for name, flags in results.falsified_by.items():
        arrays[f"{name}{FALSIFIED}"] = flags
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # NumPy's stub checks the arrays against `allow_pickle` as well.
        replace(path, lambda stream: np.savez(stream, **arrays))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror})") from error


def read(path: Path, *, part: bool = False) -> Certificates:
    """Reads a file of `experiments.evaluate`, and refuses one that is damaged or inconsistent.

    `read(path).errors()` recomputes the errors. Everything is checked
    (`experiments.evaluation.certificate_checks`) except whether the margins are bounds of the
    network, which only the network itself could show.

    Args:
      path: the file.
      part: whether one of several processes wrote it, with its share of the examples only
        (`experiments.evaluation.shards`).

    Raises:
      ExperimentError: if it is not such a file, cannot be read, or contradicts itself.
      ContradictionError: if a verified example is misclassified or broken by an attack.
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
        # The order is that of the attacks.
        resisted_by={loss: arrays[f"{RESISTED}{loss}"] for loss in layout.losses},
        run_by={name: arrays[f"{name}{RUN}"] for name in layout.methods},
        verified_by={name: arrays[f"{name}{VERIFIED}"] for name in layout.methods},
        margins_by={name: arrays[f"{name}{MARGINS}"] for name in layout.methods},
        falsified_by={
            name: arrays[f"{name}{FALSIFIED}"] for name in layout.methods if name in SEARCHED
        },
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

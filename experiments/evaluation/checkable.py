"""The files by which `python -m boundjax.check` proves an evaluation again, without JAX.

`runs/X/certificates/NAME/` belongs to `runs/X/evaluations/NAME.npz`:

    weights.npz     the network, as `boundjax.export_weights` writes it
    inputs.npz      the images, entry `x`: float32 [N, ...], compressed
    METHOD.npz      a certificate for each method: margins and verified examples
    pgd.npz         the misclassified images, and the points at which the attack succeeded, for
                    `python -m boundjax.check_attack`

They are made from the evaluation's own file once that is complete, so a run that was killed and
resumed ends with the same files. `docs/certificates.md` describes them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

import boundjax as bj
from boundjax.certification import files
from boundjax.certification.presets import NAMES
from boundjax.check import WITNESSES
from experiments.cluster import distributed
from experiments.evaluation import attack_points
from experiments.evaluation.certificates import ATTACK, Certificates
from experiments.evaluation.network import Problem
from experiments.records.files import replace
from experiments.settings.errors import ExperimentError, one_line

_WEIGHTS, _INPUTS, _PGD = "weights.npz", "inputs.npz", "pgd.npz"
# The rules by which the checker bounds methods that it has no rule for; they may prove less.
_SUBSTITUTES = ("crown-ibp", "crown")
# Seconds to wait until a network file system shows the points that another machine wrote.
_TIMEOUT, _INTERVAL = 60.0, 0.2


def folder_of(path: Path) -> Path:
    """Returns the folder of the certificate files of the evaluation file at `path`."""
    return path.parent.parent / "certificates" / path.stem


def discard(folder: Path) -> None:
    """Removes the files of an evaluation that begins anew.

    Raises:
      ExperimentError: if they cannot be removed.
    """
    attack_points.discard(folder)
    names = (_WEIGHTS, _INPUTS, _PGD, *(f"{name}.npz" for name in NAMES))
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"{folder / name} cannot be removed ({error.strerror})"
            ) from error


def write(folder: Path, results: Certificates, problem: Problem) -> bool:
    """Writes the files of a complete evaluation; called by process 0 alone.

    A network with an op that the checker does not know has none of them: one line names the op.

    Args:
      folder: what `folder_of` gives.
      results: the evaluation.
      problem: what was evaluated.

    Returns:
      Whether the files were written.

    Raises:
      ExperimentError: if a file cannot be written, or points of the attack are damaged.
    """
    images = problem.data.images
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            bj.export_weights(problem.model, images[:1], folder / _WEIGHTS)
        except (bj.UnsupportedOpError, ValueError, TypeError, MemoryError) as error:
            print(f"no certificate files: {one_line(error)}", flush=True)
            return False
        if not (folder / _INPUTS).exists():
            replace(folder / _INPUTS, lambda stream: np.savez_compressed(stream, x=images))
        for name in results.run_by:
            _write_method(folder, name, results, problem)
        _write_attack(folder, results, problem)
    except OSError as error:
        raise ExperimentError(
            f"{folder}: certificate files cannot be written ({error.strerror})"
        ) from error
    return True


def _write_method(folder: Path, name: str, results: Certificates, problem: Problem) -> None:
    """Writes the certificate of one method; nothing is claimed where it was not run."""
    if not results.run_by[name].any():
        return
    if name in results.falsified_by:
        print(
            f"{name}: no certificate file, because the checker has no rule for splits; the files "
            "of the other methods claim what these verify",
            flush=True,
        )
        return
    part = results.parts[name]
    has_witnesses = name in WITNESSES
    bj.Certificate(
        verified=results.verified_by[name],
        margins=results.margins_by[name],
        labels=results.labels,
        threat=problem.threat,
        method=name,
        # The word of the first versions.
        arithmetic="nearest" if part["arithmetic"] == "exact-real" else part["arithmetic"],
    ).save(
        folder / f"{name}.npz",
        folder / _WEIGHTS,
        problem.data.images,
        witness=None if has_witnesses else _SUBSTITUTES,
        margins=has_witnesses,
        with_inputs=False,
        versions=_versions(part),
    )
    if not has_witnesses:
        print(
            f"{name}.npz: the checker has no rule for {name}; it derives the bounds by "
            f"{' and '.join(_SUBSTITUTES)}, which may prove fewer examples",
            flush=True,
        )


def _write_attack(folder: Path, results: Certificates, problem: Problem) -> None:
    """Writes the points of the attack, from those of its batches and an earlier such file."""
    evaluation = results.evaluation
    broken = results.index[evaluation.correct & ~evaluation.resisted].tolist()
    points = _points(folder, broken, problem)
    waits = distributed.processes() > 1 and not (folder / _PGD).exists()
    end = time.monotonic() + _TIMEOUT * waits
    while len(points) < len(broken) and time.monotonic() < end:
        time.sleep(_INTERVAL)
        points = _points(folder, broken, problem)
    if len(points) < len(broken):
        print(
            f"{_PGD}: the points of {len(broken) - len(points)} of {len(broken)} images that "
            "PGD breaks were not kept, because an earlier version attacked them",
            flush=True,
        )
    files.write_attack(
        folder / _PGD,
        folder / _WEIGHTS,
        problem.data.images,
        results.labels,
        problem.threat,
        method="pgd",
        misclassified=~evaluation.correct,
        points=points,
        versions=_versions(results.parts[ATTACK]),
    )
    attack_points.discard(folder)


def _points(folder: Path, broken: list[int], problem: Problem) -> dict[int, np.ndarray]:
    """The points of the images whose numbers are `broken`, as far as they are there."""
    shape = problem.data.images.shape[1:]
    stored: dict[int, np.ndarray] = {}
    if (folder / _PGD).exists():
        try:
            stored = files.read_points(folder / _PGD)
        except ValueError as error:
            raise ExperimentError(
                f"{folder / _PGD} is damaged: {one_line(error)}; delete it to go on without it"
            ) from error
    stored |= attack_points.read(folder, shape)
    return {k: stored[k] for k in broken if k in stored and stored[k].shape == shape}


def _versions(part: dict[str, Any]) -> dict[str, str]:
    return {name: text or "unknown" for name, text in part["versions"].items()}

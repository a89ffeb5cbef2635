"""The points at which attacks succeeded, kept until the certificate files are written.

Every batch of the attack leaves a file of its own, `attack-BLOCK.npz`, before its results count as
done. A batch has the same number in every process and after every kill, so a run that is resumed
needs no merging: it overwrites a batch that was not done, and reads those that were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import boundjax as bj
from boundjax.sets import rounding
from experiments.evaluation import array_archive
from experiments.records.files import replace
from experiments.records.formats import FormatError
from experiments.settings.errors import ExperimentError

_NAME = re.compile(r"\.?attack-\d+\.npz(\.new)?")


def moved_inside(points: np.ndarray, images: np.ndarray, threat: bj.Threat) -> np.ndarray:
    """Moves points that rounding left outside of the exact set back into it.

    A projection in float32 may end an ulp outside. The points returned here lie in the set of the
    certificate, whose radius is `eps` rounded up to float32: a program that subtracts the image in
    float64 can check it.

    Args:
      points, images: float32 `[B, ...]`; the images lie in the clip range.
      threat: a scalar `eps`, norm 2 or inf.

    Returns:
      float32 `[B, ...]`; each element is moved towards its image by rounding errors only.
    """
    x, eps = images.astype(np.float64), float(rounding.up(threat.eps, np.dtype(np.float32)))
    offset = points.astype(np.float64) - x
    if threat.norm == np.inf:
        offset = np.clip(offset, -eps, eps)
    else:
        length = np.sqrt((offset**2).sum(axis=tuple(range(1, x.ndim)), keepdims=True))
        # The margin covers the roundings of this program and of one that checks it.
        longest = eps * (1.0 - 1e-9)
        offset *= np.minimum(1.0, longest / np.maximum(length, np.finfo(np.float64).tiny))
    inside = (x + offset).astype(np.float32)
    if threat.clip is not None:
        low, high = (np.asarray(end, np.float32) for end in threat.clip)
        inside = np.clip(inside, low, high)
    further = np.abs(inside.astype(np.float64) - x) > np.abs(offset)
    return np.where(further, np.nextafter(inside, images), inside)


def keep(folder: Path, block: int, index: np.ndarray, points: np.ndarray) -> None:
    """Writes the points of a batch of the attack; one without any leaves no file.

    Args:
      folder: of the evaluation's certificate files.
      block: the number of the batch.
      index: int `[K]`, the images' numbers.
      points: float32 `[K, ...]`.

    Raises:
      ExperimentError: if the file cannot be written.
    """
    path = folder / f"attack-{block}.npz"
    try:
        if not len(index):
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, lambda stream: np.savez(stream, index=index, points=points))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror})") from error


def read(folder: Path, shape: Sequence[int]) -> dict[int, np.ndarray]:
    """Reads the points of all batches: the image's number -> float32 `shape`.

    Raises:
      ExperimentError: for a file that is damaged or of images of another shape.
    """
    points: dict[int, np.ndarray] = {}
    for path in _files(folder):
        try:
            with array_archive.opened(path) as archive:
                arrays = {name: archive.array(name) for name in archive.names}
            points |= _checked(arrays, tuple(shape))
        except FormatError as error:
            raise ExperimentError(
                f"{path} has no points of an attack: {error}; delete it to go on without them"
            ) from error
        except OSError as error:
            raise ExperimentError(f"{path} cannot be read ({error.strerror})") from error
    return points


def _checked(arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    expected = f"index int [K] and points float32 [K, {', '.join(map(str, shape))}]"
    if set(arrays) != {"index", "points"}:
        raise FormatError(f"expected {expected}, got {', '.join(arrays) or 'nothing'}")
    index, points = arrays["index"], arrays["points"]
    fits = index.ndim == 1 and index.dtype.kind == "i" and points.dtype == np.float32
    if not fits or points.shape != (*index.shape, *shape):
        raise FormatError(
            f"expected {expected}, got {index.dtype} {list(index.shape)} and "
            f"{points.dtype} {list(points.shape)}"
        )
    return dict(zip(index.tolist(), points, strict=True))


def discard(folder: Path) -> None:
    """Removes the files of all batches, and those that were not completely written.

    Raises:
      ExperimentError: if they cannot be removed.
    """
    for path in _files(folder, complete=False):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ExperimentError(f"{path} cannot be removed ({error.strerror})") from error


def _files(folder: Path, complete: bool = True) -> list[Path]:
    """Lists the files of batches; listing makes network file systems look for new ones."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(path for path in files if not complete or path.suffix == ".npz")

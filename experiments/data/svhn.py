"""Reads the official Matlab files of SVHN's cropped digits, with scipy."""

from __future__ import annotations

import io
from pathlib import Path

from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import read_bytes, reason
from experiments.data.images import need_labels
from experiments.settings.errors import ExperimentError

_NAMES = ("train_32x32.mat", "test_32x32.mat")
_FILES = " and ".join(_NAMES)


def _read(folder: Path, dataset: DataSet) -> Parts:
    """Reads `X`, uint8 `[32, 32, 3, N]`, and `y` `[N, 1]`, the classes 1 to 10; 10 is digit 0."""
    train, test = (_part(folder / name, dataset.classes) for name in _NAMES)
    return train, test


def _part(path: Path, classes: int) -> Raw:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ExperimentError(
            f"reading {path.name} needs scipy ({error}); install it with: pip install scipy"
        ) from error
    content = read_bytes(path, _FILES)
    try:
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        images, labels = arrays["X"], arrays["y"]
    except Exception as error:  # scipy raises many types for damaged files
        raise ExperimentError(
            f"{path}: cannot be read as a Matlab file with X and y ({reason(error)}); "
            "fetch it again"
        ) from error
    if (
        images.ndim != 4
        or labels.ndim != 2
        or labels.shape[1] != 1
        or labels.dtype.kind not in "iu"
    ):
        raise ExperimentError(
            f"{path}: expected X [32, 32, 3, N] and integers y [N, 1], got {list(images.shape)} "
            f"and {labels.dtype} {list(labels.shape)}; fetch it again"
        )
    labels = labels[:, 0]
    need_labels(labels, 1, classes, str(path))
    return Raw(images.transpose(3, 0, 1, 2), labels % classes, str(path))


READER = Reader(_NAMES, _read, files=_FILES)

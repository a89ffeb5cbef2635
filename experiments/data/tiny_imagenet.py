"""Reads Tiny ImageNet as its archive unpacks: a folder of JPEG files for each of 200 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.data.dataset import DataSet, Parts, Raw, Reader
from experiments.data.files import read_bytes
from experiments.data.jpeg import decode, need_pillow
from experiments.settings.errors import ExperimentError

_FOLDER = "tiny-imagenet-200"
_FILES = f"{_FOLDER} (wnids.txt, train, val)"
# The images come class by class, and the last ones may be held out, so a fixed permutation mixes
# them. It defines that split and must not depend on the run's seed.
_ORDER_SEED = 0


def _read(folder: Path, dataset: DataSet) -> Parts:
    """Reads `train` for training and `val` for tests; classes are in the order of WordNet ids.

    That is the order of the class folders, by which published models number the classes.
    """
    need_pillow(_FILES)
    ids = _text(folder / "wnids.txt").split()
    if len(set(ids)) != dataset.classes or len(ids) != dataset.classes:
        raise ExperimentError(
            f"{folder / 'wnids.txt'}: expected {dataset.classes} different ids, "
            f"got {len(set(ids))} in {len(ids)} lines; fetch it again"
        )
    classes = {wnid: index for index, wnid in enumerate(sorted(ids))}

    train = []
    for wnid, label in classes.items():
        images = folder / "train" / wnid / "images"
        if not images.is_dir():
            raise ExperimentError(f"{images}: no such folder; unpack the archive again")
        train += [(path, label) for path in sorted(images.glob("*.JPEG"))]
    _need_count(folder / "train", len(train), dataset.train)
    order = np.random.default_rng(_ORDER_SEED).permutation(len(train))
    train = [train[index] for index in order]

    annotations = folder / "val" / "val_annotations.txt"
    test = []
    for number, line in enumerate(_text(annotations).splitlines(), start=1):
        name, wnid = [*line.split("\t"), ""][:2]  # a box around the object follows
        if wnid not in classes or Path(name).name != name:
            raise ExperimentError(
                f"{annotations}: expected a file name and an id of wnids.txt in line {number}, "
                f"got {line[:80]!r}; fetch it again"
            )
        test.append((folder / "val" / "images" / name, classes[wnid]))
    _need_count(annotations, len(test), dataset.test)
    return _decoded(train, dataset, folder / "train"), _decoded(test, dataset, folder / "val")


def _text(path: Path) -> str:
    try:
        return read_bytes(path, _FILES).decode("ascii")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}: is not text ({error}); fetch it again") from error


def _need_count(source: Path, count: int, expected: int) -> None:
    """Checks the number of images before 110 000 files are decoded."""
    if count != expected:
        raise ExperimentError(
            f"{source}: expected {expected} images, got {count}; unpack the archive again"
        )


def _decoded(files: list[tuple[Path, int]], dataset: DataSet, source: Path) -> Raw:
    images = np.empty((len(files), *dataset.shape), np.uint8)
    for index, (path, _) in enumerate(files):
        images[index] = decode(read_bytes(path, _FILES), dataset.shape[0], str(path))
    return Raw(images, np.asarray([label for _, label in files]), str(source))


READER = Reader(("wnids.txt",), _read, files=_FILES, folder=_FOLDER)

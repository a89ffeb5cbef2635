"""CIFAR-10, 50 000 + 10 000 colour images of 32x32 pixels.

Read from the official binary version, from TensorFlow Datasets, or from `cifar10_jpeg.npz`: copies
of the images as JPEG. JPEG loses detail, so results on the copies are not results on CIFAR-10, and
their title says so.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.config import DataConfig
from experiments.data.images import Images, Loaded, from_bytes
from experiments.data.tfds import read_tfds
from experiments.errors import ExperimentError

_CLASSES = 10
_SIZE = 32
_RECORD = 1 + 3 * _SIZE * _SIZE  # a label, then the red, the green and the blue plane
_RECORDS_PER_FILE = 10_000
_BINARIES = {
    "train": tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
    "test": ("test_batch.bin",),
}
_COPIES = "cifar10_jpeg.npz"
_TITLE = "CIFAR-10"
_FILES = f"the files of the binary version (data_batch_1.bin ... test_batch.bin) or {_COPIES}"


def load(config: DataConfig) -> Loaded:
    """Training and test images: from `config.dir` if it is set, else from TFDS.

    The folder holds the official binary version or `cifar10_jpeg.npz`; with both, the official one
    is read.

    Raises:
      ExperimentError: if the data is missing or damaged; the message names the ways to provide it.
    """
    if not config.dir:
        train, test = (
            from_bytes(
                *read_tfds("cifar10", split, config, title=_TITLE, files=_FILES),
                _CLASSES,
                f"tfds cifar10 ({split})",
            )
            for split in ("train", "test")
        )
        return Loaded(train, test, _TITLE)
    folder = Path(config.dir).expanduser()
    if not folder.is_dir():
        raise ExperimentError(
            f"--config.data.dir={config.dir}: no such folder; it must hold {_FILES}"
        )
    official = [name for names in _BINARIES.values() for name in names]
    copies = folder / _COPIES
    if copies.is_file() and not any((folder / name).is_file() for name in official):
        train, test = _read_copies(copies)
        return Loaded(train, test, f"{_TITLE} (JPEG copies)")
    train, test = (_read_binaries(folder, split) for split in ("train", "test"))
    return Loaded(train, test, _TITLE)


def _read_binaries(folder: Path, split: str) -> Images:
    records = []
    for name in _BINARIES[split]:
        path = folder / name
        if not path.is_file():
            raise ExperimentError(
                f"{folder}: {name} is not there; --config.data.dir must name a folder with {_FILES}"
            )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExperimentError(f"{path}: cannot be read ({error}); fetch it again") from error
        expected = _RECORDS_PER_FILE * _RECORD
        if len(content) != expected:
            raise ExperimentError(
                f"{path}: expected {expected} bytes ({_RECORDS_PER_FILE} records of {_RECORD}), "
                f"got {len(content)}; the file is truncated or damaged, fetch it again"
            )
        records.append(np.frombuffer(content, np.uint8).reshape(-1, _RECORD))
    everything = np.concatenate(records)
    planes = everything[:, 1:].reshape(-1, 3, _SIZE, _SIZE)
    return from_bytes(
        planes.transpose(0, 2, 3, 1), everything[:, 0], _CLASSES, f"{folder} ({split})"
    )


def _read_copies(path: Path) -> tuple[Images, Images]:
    decode = _decoder()
    try:
        # Opened here: numpy leaves a file open where the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {
                f"{split}_{part}": archive[f"{split}_{part}"]
                for split in ("train", "test")
                for part in ("jpeg", "offsets", "labels")
            }
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExperimentError(
            f"{path}: cannot be read ({reason[:160]}); it must hold train_ and test_ jpeg, offsets "
            "and labels; fetch it again"
        ) from error
    train, test = (
        _decoded(
            *(arrays[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels")),
            source=f"{path} ({split})",
            decode=decode,
        )
        for split in ("train", "test")
    )
    return train, test


def _decoded(
    jpeg: np.ndarray,
    offsets: np.ndarray,
    labels: np.ndarray,
    source: str,
    decode: Callable[[bytes], np.ndarray],
) -> Images:
    """Image i is the file `jpeg[offsets[i]:offsets[i + 1]]`, bytes; `labels` `[N]`."""
    if jpeg.ndim != 1 or jpeg.dtype != np.uint8:
        raise ExperimentError(
            f"{source}: expected jpeg as uint8 [bytes], got {jpeg.dtype} {list(jpeg.shape)}"
        )
    if offsets.ndim != 1 or labels.ndim != 1 or len(offsets) != len(labels) + 1:
        raise ExperimentError(
            f"{source}: expected one offset more than labels, got shapes {list(offsets.shape)} "
            f"and {list(labels.shape)}; fetch the file again"
        )
    if not (np.issubdtype(offsets.dtype, np.integer) and np.issubdtype(labels.dtype, np.integer)):
        raise ExperimentError(
            f"{source}: expected integer offsets and labels, got {offsets.dtype} and {labels.dtype}"
        )
    ends = offsets.astype(np.int64)
    if ends[0] != 0 or ends[-1] != len(jpeg) or np.any(np.diff(ends) <= 0):
        raise ExperimentError(
            f"{source}: offsets must rise from 0 to the {len(jpeg)} bytes of jpeg, "
            f"got {ends[0]} to {ends[-1]}; fetch the file again"
        )
    images = np.empty((len(labels), _SIZE, _SIZE, 3), np.uint8)
    for index in range(len(labels)):
        try:
            images[index] = decode(jpeg[ends[index] : ends[index + 1]].tobytes())
        except Exception as error:  # Pillow raises many types for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExperimentError(
                f"{source}: image {index} is no JPEG of {_SIZE}x{_SIZE} pixels ({reason[:160]}); "
                "fetch the file again"
            ) from error
    return from_bytes(images, labels, _CLASSES, source)


def _decoder() -> Callable[[bytes], np.ndarray]:
    """A JPEG file as uint8 `[32, 32, 3]`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ExperimentError(
            f"reading {_COPIES} needs Pillow ({error}); install it with: pip install pillow"
        ) from error

    def decode(content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            # Before any pixel is decoded: the header of a damaged file may promise gigabytes.
            if image.size != (_SIZE, _SIZE) or image.mode != "RGB":
                raise ValueError(f"it has {image.size[0]}x{image.size[1]} pixels, {image.mode}")
            return np.asarray(image)

    return decode

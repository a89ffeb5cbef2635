"""Data sets by name, in one in-memory form with random access."""

from __future__ import annotations

from pathlib import Path

from experiments.data import npz
from experiments.data.dataset import DataSet, Parts, Reader
from experiments.data.images import Images as Images
from experiments.data.images import Splits as Splits
from experiments.data.images import first, from_raw, hold_out
from experiments.data.table import DATASETS as DATASETS
from experiments.data.tfds import read_tfds
from experiments.settings.config import DataConfig
from experiments.settings.errors import ExperimentError


def load(config: DataConfig) -> Splits:
    """Loads the training, validation and test images that `config` names.

    With `config.dir` it reads the files there, in the data set's first format that has a file.
    Without it, it reads the data set from its Python package, or as TFDS has prepared it.

    Of the training images the first `config.train` are kept; 0 keeps all. The validation images are
    the last `config.validation` of these, which are then held out from training; 0 holds out none.

    Raises:
      ExperimentError: for an unknown name, missing or damaged data, or a validation split that
        leaves nothing. If the data is missing, the message names the ways to provide it.
    """
    if config.name not in DATASETS:
        raise ExperimentError(
            f"unknown data.name {config.name!r}: use one of {', '.join(sorted(DATASETS))}"
        )
    dataset = DATASETS[config.name]
    if config.dir:
        path = Path(config.dir).expanduser()
        reader, place = _reader(dataset, path)
        title = f"{dataset.title} ({reader.remark})" if reader.remark else dataset.title
        parts, complete = reader.read(place, dataset), reader.complete
    else:
        title, complete = dataset.title, True
        parts = dataset.bundled() if dataset.bundled else _from_tfds(dataset, config)
    train, test = (
        from_raw(raw, dataset, count, complete)
        for raw, count in zip(parts, (dataset.train, dataset.test), strict=True)
    )
    del parts  # frees the bytes before the images are processed further
    train = first(train, config.train)
    train, validation = hold_out(train, config.validation)
    return Splits(train, validation, test, title, dataset.classes)


def _reader(dataset: DataSet, path: Path) -> tuple[Reader, Path]:
    """Selects the reader for the folder or file at `path`, and the folder that it reads."""
    if path.is_file():
        for reader in dataset.readers:
            if reader.names == (path.name,):  # a format of one file, and `path` names that file
                return reader, path.parent
        if path.suffix == ".npz":
            return npz.reader(path.name), path.parent
        raise _missing(dataset, f"--config.data.dir={path}: neither a folder nor an .npz file")
    if not path.is_dir():
        raise _missing(dataset, f"--config.data.dir={path}: no such folder or file")
    for reader in dataset.readers:
        for folder in dict.fromkeys((path, path / reader.folder)):
            if any((folder / name).exists() for name in reader.names):
                return reader, folder
    raise _missing(dataset, f"--config.data.dir={path}: none of the files of {dataset.title} in it")


def _from_tfds(dataset: DataSet, config: DataConfig) -> Parts:
    if not dataset.tfds:
        raise _missing(dataset, "--config.data.dir is empty")
    try:
        return read_tfds(dataset, config.tfds_dir)
    except FileNotFoundError as error:
        raise _missing(dataset, str(error)) from error


def _missing(dataset: DataSet, reason: str) -> ExperimentError:
    """Creates the error of one line: the reason, and every way to provide the data set."""
    files = [reader.files for reader in dataset.readers if reader.files]
    ways = [f"--config.data.dir=FOLDER with {' or '.join(files)}"] if files else []
    ways.append(f"--config.data.dir=FILE.npz with {npz.contents(dataset)}")
    if dataset.tfds:
        ways.append(
            "TFDS (its folder: --config.data.tfds_dir) after: pip install tensorflow && "
            f"tfds build {dataset.tfds} --file_format=array_record"
        )
    return ExperimentError(f"{reason}; {dataset.title} is read from {', or from '.join(ways)}")

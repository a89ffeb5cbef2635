import gzip
import struct

import numpy as np
import pytest

from experiments import data
from experiments.config import DataConfig
from experiments.data.idx import read_idx
from experiments.errors import ExperimentError

FILES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


def _idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _write_mnist(folder, compress=True, train=12, test=5):
    """A tiny MNIST of random images; returns the training images and labels."""
    rng = np.random.default_rng(0)
    written = {}
    for name, dimensions in FILES.items():
        count = train if name.startswith("train") else test
        shape = (count, 28, 28) if dimensions == 3 else (count,)
        written[name] = rng.integers(0, 256 if dimensions == 3 else 10, shape, np.uint8)
        content = _idx(written[name])
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return written


@pytest.mark.parametrize("compress", [True, False])
def test_reads_idx_files(tmp_path, compress):
    written = _write_mnist(tmp_path, compress)
    splits = data.load(DataConfig(name="mnist", dir=str(tmp_path), validation=2))
    images = written["train-images-idx3-ubyte"]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 2, 5)
    assert splits.train.images.dtype == np.float32
    assert splits.train.labels.dtype == np.int32
    np.testing.assert_array_equal(
        splits.train.images, images[:10, ..., None].astype(np.float32) / np.float32(255)
    )
    np.testing.assert_array_equal(splits.validation.labels, written["train-labels-idx1-ubyte"][10:])
    np.testing.assert_array_equal(
        splits.train.take(np.array([3, 1])).labels[1], splits.train.labels[1]
    )


def test_real_mnist(shared):
    folder = shared / "data" / "mnist"
    splits = data.load(DataConfig(name="mnist", dir=str(folder), validation=5000))
    assert splits.train.images.shape == (55_000, 28, 28, 1)
    assert (len(splits.validation), len(splits.test)) == (5_000, 10_000)
    everything = np.concatenate([splits.train.images, splits.validation.images])
    # The published mean and standard deviation of the training pixels.
    assert everything.mean(dtype=np.float64) == pytest.approx(0.1307, abs=1e-4)
    assert everything.std(dtype=np.float64) == pytest.approx(0.3081, abs=1e-4)
    assert np.bincount(splits.test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]  # fmt: skip


def test_digits():
    splits = data.load(DataConfig(name="digits", validation=144))
    assert [len(split) for split in splits] == [1293, 144, 360]
    assert splits.train.images.shape[1:] == (8, 8, 1)
    assert splits.train.images.min() == 0.0
    assert splits.train.images.max() == 1.0
    for split in splits:
        assert set(split.labels) == set(range(10))
    again = data.load(DataConfig(name="digits", validation=144))
    np.testing.assert_array_equal(splits.test.images, again.test.images)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _wrong_magic(path):
    path.write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + gzip.decompress(path.read_bytes())[4:]))


def _short(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-7]))


def _long(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\x00"))


def _header_only(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:6]))


def _garbage(path):
    path.write_bytes(path.read_bytes()[:30] + b"\xff" * 200)


def _empty(path):
    path.write_bytes(b"")


def _directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"cannot be read \(.*\); the file is truncated or damaged"),
        (_garbage, r"cannot be read \(.*\); the file is truncated or damaged"),
        (_wrong_magic, r"expected an IDX file of unsigned bytes with 3 dimensions .*got 00000d03"),
        (_short, r"its header promises 9408 values of shape \[12, 28, 28\], but 9401 follow"),
        (_long, r"its header promises 9408 values of shape \[12, 28, 28\], but 9409 follow"),
        (_header_only, r"truncated inside its header \(6 of 16 bytes\)"),
        (_empty, r"got an empty file"),
        (_directory, r"neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz is there"),
        (lambda path: path.unlink(), r"neither train-images-idx3-ubyte nor .* is there"),
    ],
)
def test_damaged_files_are_one_line_errors(tmp_path, damage, message):
    _write_mnist(tmp_path)
    damage(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(ExperimentError, match=message) as caught:
        data.load(DataConfig(name="mnist", dir=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_unreadable_file_is_an_error(tmp_path):
    with pytest.raises(ExperimentError, match=r"cannot be read"):
        read_idx(tmp_path / "absent", dimensions=1)


def test_images_and_labels_must_belong_together(tmp_path):
    _write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(_idx(np.zeros(11, np.uint8))))
    with pytest.raises(ExperimentError, match=r"12 images but labels of shape \(11,\)"):
        data.load(DataConfig(name="mnist", dir=str(tmp_path)))
    labels.write_bytes(gzip.compress(_idx(np.array([0, 12] * 6, np.uint8))))
    with pytest.raises(ExperimentError, match=r"labels must lie in \[0, 10\), got 12 at index 1"):
        data.load(DataConfig(name="mnist", dir=str(tmp_path)))


def test_missing_data_names_both_ways_to_provide_it(tmp_path):
    with pytest.raises(ExperimentError, match=r"no such folder"):
        data.load(DataConfig(name="mnist", dir=str(tmp_path / "absent")))
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(
        ExperimentError, match=r"--config\.data\.dir=FOLDER .* tfds build mnist"
    ) as e:
        data.load(DataConfig(name="mnist", tfds_dir=str(tmp_path)))
    assert "\n" not in str(e.value)


def test_reads_tfds(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)

    def data_source(name, *, split, data_dir, download):
        assert (name, data_dir, download) == ("mnist", None, False)
        count = {"train": 9, "test": 4}[split]
        return [
            {"image": rng.integers(0, 256, (28, 28, 1), np.uint8), "label": np.int64(i % 10)}
            for i in range(count)
        ]

    monkeypatch.setattr(tfds, "data_source", data_source)
    splits = data.load(DataConfig(name="mnist"))
    assert splits.train.images.shape == (9, 28, 28, 1)
    assert len(splits.validation) == 0
    assert splits.test.labels.tolist() == [0, 1, 2, 3]


def test_wrong_names_and_splits_are_errors():
    with pytest.raises(
        ExperimentError, match=r"unknown data\.name 'cifar': use one of digits, mnist"
    ):
        data.load(DataConfig(name="cifar"))
    for count in (1437, -1):
        with pytest.raises(ExperimentError, match=r"data\.validation must lie in \[0, 1437\)"):
            data.load(DataConfig(name="digits", validation=count))

import gzip
import io
import struct
import sys

import numpy as np
import pytest

from experiments import data
from experiments.config import DataConfig
from experiments.data import cifar10
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
    assert [len(split) for split in splits[:3]] == [1293, 144, 360]
    assert splits.title == "UCI digits"
    assert splits.train.images.shape[1:] == (8, 8, 1)
    assert splits.train.images.min() == 0.0
    assert splits.train.images.max() == 1.0
    for split in splits[:3]:
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
        ExperimentError, match=r"unknown data\.name 'cifar': use one of cifar10, digits, mnist"
    ):
        data.load(DataConfig(name="cifar"))
    for count in (1437, -1):
        with pytest.raises(ExperimentError, match=r"data\.validation must lie in \[0, 1437\)"):
            data.load(DataConfig(name="digits", validation=count))


# --------------------------------------------------------------------------- CIFAR-10

RECORDS = 3
BINARIES = {f"data_batch_{index}.bin": RECORDS for index in range(1, 6)} | {
    "test_batch.bin": RECORDS
}


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with the binary version of a tiny CIFAR-10, and its records by file."""
    monkeypatch.setattr(cifar10, "_RECORDS_PER_FILE", RECORDS)
    rng = np.random.default_rng(0)
    records = {}
    for name in BINARIES:
        records[name] = rng.integers(0, 256, (RECORDS, 3073), np.uint8)
        records[name][:, 0] %= 10
        (tmp_path / name).write_bytes(records[name].tobytes())
    return tmp_path, records


def test_reads_the_binary_version_of_cifar10(cifar):
    folder, records = cifar
    splits = data.load(DataConfig(name="cifar10", dir=str(folder), validation=4))
    assert [len(split) for split in splits[:3]] == [11, 4, 3]
    assert splits.title == "CIFAR-10"
    assert splits.train.images.shape[1:] == (32, 32, 3)
    third = records["data_batch_2.bin"][1]
    assert splits.train.labels[4] == third[0]
    # Byte 1 + 1024 c + 32 i + j of a record is channel c of pixel (i, j).
    for channel, row, column in [(0, 0, 0), (1, 2, 31), (2, 31, 5)]:
        expected = np.float32(third[1 + 1024 * channel + 32 * row + column]) / np.float32(255)
        assert splits.train.images[4, row, column, channel] == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], r"expected 9219 bytes \(3 records of 3073\), got 9218; .* truncated"),
        (lambda b: b + b[:3073], r"expected 9219 bytes \(3 records of 3073\), got 12292"),
        (lambda b: b"", r"expected 9219 bytes .* got 0"),
        (lambda b: b"\x0b" + b[1:], r"labels must lie in \[0, 10\), got 11 at index 9"),
        (None, r"data_batch_4\.bin is not there; --config\.data\.dir must name a folder with"),
    ],
)
def test_damaged_binaries_are_one_line_errors(cifar, damage, message):
    path = cifar[0] / "data_batch_4.bin"
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(ExperimentError, match=message) as caught:
        data.load(DataConfig(name="cifar10", dir=str(cifar[0])))
    assert "\n" not in str(caught.value)
    assert str(cifar[0]) in str(caught.value)


def _jpeg(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def _copies(train=5, test=2):
    """The arrays of `cifar10_jpeg.npz`, and their images: smooth, so JPEG hardly changes them."""
    ramp = np.arange(32, dtype=np.float64)
    images = [
        np.broadcast_to(3 * ramp[:, None, None] + 2 * ramp[None, :, None] + 10 * i, (32, 32, 3))
        for i in range(train + test)
    ]
    images = [image.astype(np.uint8) for image in images]
    files = [_jpeg(image) for image in images]
    arrays = {"class_names": np.array(["airplane", "automobile"])}
    for split, part in (("train", files[:train]), ("test", files[train:])):
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(part), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, part)])
        arrays[f"{split}_labels"] = np.arange(len(part), dtype=np.uint8)
    return arrays, images


def test_reads_jpeg_copies_and_says_so(tmp_path):
    pytest.importorskip("PIL")
    arrays, images = _copies()
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    splits = data.load(DataConfig(name="cifar10", dir=str(tmp_path)))
    assert splits.title == "CIFAR-10 (JPEG copies)"
    assert splits.train.images.shape == (5, 32, 32, 3)
    assert splits.test.labels.tolist() == [0, 1]
    np.testing.assert_allclose(splits.train.images, np.stack(images[:5]) / 255.0, atol=0.03)
    # The official files are preferred, even where some are missing.
    (tmp_path / "test_batch.bin").write_bytes(b"")
    with pytest.raises(ExperimentError, match=r"data_batch_1\.bin is not there"):
        data.load(DataConfig(name="cifar10", dir=str(tmp_path)))


def _changed(**changes):
    return lambda arrays: arrays | {k: change(arrays[k]) for k, change in changes.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "test_labels"}, r"cannot be read .*labels"),
        (_changed(train_jpeg=lambda v: v[:-9]), r"offsets must rise from 0 to the \d+ bytes"),
        (_changed(train_offsets=lambda v: v[::-1]), r"offsets must rise from 0"),
        (
            _changed(train_offsets=lambda v: v[:-1]),
            r"one offset more than labels, got shapes \[5\]",
        ),
        (_changed(train_offsets=lambda v: v * 1.0), r"expected integer offsets and labels"),
        (_changed(test_labels=lambda v: v + np.uint8(9)), r"must lie in \[0, 10\), got 10"),
        (_changed(test_jpeg=lambda v: v * np.uint8(0)), r"image 0 is no JPEG of 32x32"),
        (_changed(test_jpeg=lambda v: v.astype(np.int64)), r"jpeg as uint8 \[bytes\], got int64"),
        (_changed(test_labels=lambda v: v.astype(object)), r"cannot be read \(Object arrays"),
    ],
)
def test_damaged_copies_are_one_line_errors(tmp_path, damage, message):
    pytest.importorskip("PIL")
    np.savez(tmp_path / "cifar10_jpeg.npz", **damage(_copies()[0]))
    with pytest.raises(ExperimentError, match=message) as caught:
        data.load(DataConfig(name="cifar10", dir=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_copies_of_another_size_and_damaged_archives_are_errors(tmp_path):
    pytest.importorskip("PIL")
    arrays, _ = _copies(test=1)
    large = _jpeg(np.zeros((64, 32, 3), np.uint8))
    arrays |= {
        "test_jpeg": np.frombuffer(large, np.uint8),
        "test_offsets": np.array([0, len(large)]),
    }
    path = tmp_path / "cifar10_jpeg.npz"
    np.savez(path, **arrays)
    config = DataConfig(name="cifar10", dir=str(tmp_path))
    with pytest.raises(ExperimentError, match=r"image 0 is no JPEG .* 32x64 pixels, RGB"):
        data.load(config)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExperimentError, match=r"cannot be read"):
        data.load(config)


def test_copies_without_pillow_are_one_line(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10_jpeg.npz", train_jpeg=np.zeros(3, np.uint8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ExperimentError, match=r"needs Pillow .* pip install pillow") as caught:
        data.load(DataConfig(name="cifar10", dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_reads_cifar10_from_tfds(monkeypatch, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ExperimentError, match=r"no such folder; it must hold the files of the bin"):
        data.load(DataConfig(name="cifar10", dir=str(tmp_path / "absent")))
    with pytest.raises(ExperimentError, match=r"CIFAR-10 is not there .* tfds build cifar10"):
        data.load(DataConfig(name="cifar10", tfds_dir=str(tmp_path)))
    record = {"id": b"train_1", "image": np.zeros((32, 32, 3), np.uint8), "label": np.int64(7)}
    monkeypatch.setattr(tfds, "data_source", lambda name, **_: [record] * len(name))
    splits = data.load(DataConfig(name="cifar10"))
    assert splits.train.images.shape == (len("cifar10"), 32, 32, 3)
    assert (splits.title, splits.test.labels[0]) == ("CIFAR-10", 7)

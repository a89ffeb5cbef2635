import dataclasses
import gzip
import struct
import sys

import numpy as np
import pytest
from data_files import shrink

from experiments import data
from experiments.data.idx import read_idx
from experiments.settings.config import DataConfig
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.quick

FILES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The data sets of IDX files at 12 + 5 images."""
    for name in ("mnist", "fashion_mnist"):
        shrink(monkeypatch, name, train=12, test=5)


def _idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _write_mnist(folder, compress=True, train=12, test=5, size=28):
    """A tiny MNIST of random images; returns the training images and labels."""
    rng = np.random.default_rng(0)
    written = {}
    for name, dimensions in FILES.items():
        count = train if name.startswith("train") else test
        shape = (count, size, size) if dimensions == 3 else (count,)
        written[name] = rng.integers(0, 256 if dimensions == 3 else 10, shape, np.uint8)
        content = _idx(written[name])
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return written


@pytest.mark.parametrize(("name", "compress"), [("mnist", True), ("fashion_mnist", False)])
def test_reads_idx_files(tmp_path, name, compress):
    written = _write_mnist(tmp_path, compress)
    splits = data.load(DataConfig(name=name, dir=str(tmp_path), validation=2))
    assert splits.title == {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}[name]
    assert (splits.shape, splits.classes) == ((28, 28, 1), 10)
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


def test_real_mnist(shared, monkeypatch):
    monkeypatch.undo()
    folder = shared / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip("no MNIST in the folder beside the checkout")
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


def test_what_is_read_must_be_the_data_set(tmp_path):
    config = DataConfig(name="mnist", dir=str(tmp_path))
    _write_mnist(tmp_path, train=11)
    with pytest.raises(
        ExperimentError, match=r"\(train\): expected the 12 images of MNIST, got 11"
    ):
        data.load(config)
    _write_mnist(tmp_path, size=27)
    with pytest.raises(
        ExperimentError,
        match=r"uint8 images \[N, 28, 28, 1\] of MNIST, got uint8 \[12, 27, 27, 1\]",
    ):
        data.load(config)
    _write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(_idx(np.zeros(11, np.uint8))))
    with pytest.raises(ExperimentError, match=r"12 images but 11 labels; they do not belong"):
        data.load(config)
    labels.write_bytes(gzip.compress(_idx(np.array([0, 12] * 6, np.uint8))))
    with pytest.raises(ExperimentError, match=r"labels must be 0 to 9, got 12 at index 1"):
        data.load(config)


# --------------------------------------------------------------------------- validation images


def test_images_sorted_by_class_are_not_held_out(tmp_path):
    arrays = _arrays("mnist")
    config = DataConfig(name="mnist", dir=str(tmp_path / "mnist.npz"), validation=2)
    for labels in (np.arange(12) // 4, 3 - np.arange(12) // 4):
        np.savez(tmp_path / "mnist.npz", **arrays | {"train_labels": labels})
        with pytest.raises(ExperimentError, match=r"these are sorted by class; shuffle them"):
            data.load(config)
        assert len(data.load(dataclasses.replace(config, validation=0)).train) == 12
    # One class is in every order.
    np.savez(tmp_path / "mnist.npz", **arrays | {"train_labels": np.full(12, 3)})
    assert len(data.load(config).validation) == 2


# --------------------------------------------------------------------------- .npz


def _arrays(name, train=12, test=5):
    """Random images and labels of a data set, as its `.npz` file holds them."""
    rng = np.random.default_rng(1)
    dataset = data.DATASETS[name]
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        shape = (count, *dataset.shape)
        arrays[f"{part}_images"] = rng.integers(0, dataset.white + 1, shape, np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, dataset.classes, count)
    return arrays


@pytest.mark.parametrize("name", sorted(data.DATASETS))
def test_reads_any_data_set_from_npz(tmp_path, name):
    dataset = data.DATASETS[name]
    arrays = _arrays(name)
    np.savez(tmp_path / f"{name}.npz", **arrays)
    splits = data.load(DataConfig(name=name, dir=str(tmp_path), validation=3))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 3, 5)
    assert splits.title == f"{dataset.title} (npz file)"
    assert (splits.shape, splits.classes) == (dataset.shape, dataset.classes)
    np.testing.assert_array_equal(
        splits.test.images, arrays["test_images"].astype(np.float32) / np.float32(dataset.white)
    )
    np.testing.assert_array_equal(splits.validation.labels, arrays["train_labels"][9:])
    # The file itself may be named, whatever it is called; grey images need no axis of channels.
    if dataset.shape[2] == 1:
        arrays |= {key: arrays[key][..., 0] for key in ("train_images", "test_images")}
    np.savez(tmp_path / "other.npz", **arrays)
    again = data.load(DataConfig(name=name, dir=str(tmp_path / "other.npz"), validation=3))
    np.testing.assert_array_equal(again.train.images, splits.train.images)


def _changed(**changes):
    return lambda arrays: arrays | {k: change(arrays[k]) for k, change in changes.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed(train_images=lambda v: v / np.float32(255)), r"expected uint8 .* got float32"),
        (_changed(test_images=lambda v: v[:, 1:]), r"got uint8 \[5, 27, 28, 1\]"),
        (_changed(test_images=lambda v: v[0, :, :, 0]), r"got uint8 \[28, 28\]"),
        (_changed(test_labels=lambda v: v[:, None]), r"integer labels \[N\], got int64 \[5, 1\]"),
        (_changed(test_labels=lambda v: v * 1.0), r"integer labels \[N\], got float64"),
        # In 32 bits this would be 0.
        (_changed(test_labels=lambda v: v * 0 + 2**32), r"0 to 9, got 4294967296 at index 0"),
        (_changed(test_labels=lambda v: v - 10), r"labels must be 0 to 9, got -"),
        (_changed(train_labels=lambda v: v[:7]), r"12 images but 7 labels"),
        (lambda a: a | _arrays("mnist", train=13), r"expected 1 to 12 images of MNIST, got 13"),
        (lambda a: a | _arrays("mnist", test=0), r"expected 1 to 5 images of MNIST, got 0"),
        (lambda a: {k: v for k, v in a.items() if k != "test_images"}, r"cannot .*test_images"),
        (_changed(test_labels=lambda v: v.astype(object)), r"cannot be read \(Object arrays"),
    ],
)
def test_bad_arrays_are_one_line_errors(tmp_path, damage, message):
    np.savez(tmp_path / "mnist.npz", **damage(_arrays("mnist")))
    with pytest.raises(ExperimentError, match=message) as caught:
        data.load(DataConfig(name="mnist", dir=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "mnist.npz") in str(caught.value)


def test_pixels_above_white_are_an_error(tmp_path):
    arrays = _arrays("digits")
    arrays["test_images"][2, 3, 4] = 17
    np.savez(tmp_path / "digits.npz", **arrays)
    with pytest.raises(ExperimentError, match=r"pixels of UCI digits lie in \[0, 16\], got 17"):
        data.load(DataConfig(name="digits", dir=str(tmp_path)))


def test_damaged_archives_are_one_line_errors(tmp_path):
    path = tmp_path / "mnist.npz"
    config = DataConfig(name="mnist", dir=str(path))
    np.savez_compressed(path, **_arrays("mnist"))
    content = path.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    damaged = [b"", b"garbage", content[:-40], (tmp_path / "one.npy").read_bytes()]
    rng = np.random.default_rng(0)
    for _ in range(60):
        copy = bytearray(content)
        for place in rng.integers(0, len(copy), 8):
            copy[place] ^= int(rng.integers(1, 256))
        damaged.append(bytes(copy))
    messages = []
    for copy in damaged:
        path.write_bytes(copy)
        try:
            data.load(config)
        except ExperimentError as error:
            messages.append(str(error))
    assert len(messages) >= 50  # what remains is in bytes that nobody reads
    assert all(str(path) in message and "\n" not in message for message in messages)


# --------------------------------------------------------------------------- missing data


@pytest.mark.parametrize(
    ("name", "files", "tfds"),
    [
        ("mnist", "the four IDX files", "mnist"),
        (
            "cifar10",
            "the binary version (data_batch_1.bin ... test_batch.bin) or the python version",
            "cifar10",
        ),
        ("svhn", "train_32x32.mat and test_32x32.mat", "svhn_cropped"),
        ("stl10", "the binary files train_X.bin", "stl10"),
        ("tiny_imagenet", "tiny-imagenet-200 (wnids.txt, train, val)", None),
    ],
)
def test_missing_data_names_every_way_to_provide_it(tmp_path, name, files, tfds):
    (tmp_path / "file.bin").write_bytes(b"")
    reasons = {
        tmp_path / "absent": "no such folder or file",
        tmp_path / "file.bin": "neither a folder nor an .npz file",
        tmp_path: "none of the files of",
    }
    for path, reason in reasons.items():
        with pytest.raises(ExperimentError) as caught:
            data.load(DataConfig(name=name, dir=str(path)))
        message = str(caught.value)
        assert message.startswith(f"--config.data.dir={path}: {reason}")
        assert f"--config.data.dir=FOLDER with {files}" in message
        shape = ", ".join(map(str, data.DATASETS[name].shape))
        assert f"FILE.npz with train_images and test_images uint8 [N, {shape}]" in message
        assert ("tfds build" in message) == (tfds is not None)
        assert tfds is None or f"tfds build {tfds} --file_format=array_record" in message
        assert "\n" not in message


def test_data_that_tfds_cannot_have_is_missing_without_a_folder():
    with pytest.raises(
        ExperimentError, match=r"^--config\.data\.dir is empty; Tiny ImageNet is read from"
    ):
        data.load(DataConfig(name="tiny_imagenet"))


def test_tfds_without_the_data_or_the_package(tmp_path, monkeypatch):
    config = DataConfig(name="svhn", tfds_dir=str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ExperimentError, match=r"^TFDS cannot be used \(.*; SVHN is read from") as e:
        data.load(config)
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ExperimentError, match=r"^TFDS has no svhn_cropped .*SVHN is read") as e:
        data.load(config)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------- TFDS


@pytest.fixture
def records(monkeypatch):
    """What TFDS has of MNIST, by split; tests change it."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)
    result = {
        split: [
            {"image": rng.integers(0, 256, (28, 28, 1), np.uint8), "label": np.int64(i % 10)}
            for i in range(count)
        ]
        for split, count in (("train", 12), ("test", 5))
    }

    def data_source(name, *, split, data_dir, download):
        assert (name, data_dir, download) == ("mnist", None, False)
        return result[split]

    monkeypatch.setattr(tfds, "data_source", data_source)
    return result


def test_reads_tfds(records):
    splits = data.load(DataConfig(name="mnist"))
    assert splits.title == "MNIST"
    assert splits.train.images.shape == (12, 28, 28, 1)
    np.testing.assert_array_equal(
        splits.train.images[3], records["train"][3]["image"].astype(np.float32) / np.float32(255)
    )
    assert len(splits.validation) == 0
    assert splits.test.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": 3}, r"record 1 cannot be read \('image'\); prepare it again"),
        (
            {"image": np.zeros((28, 28, 3), np.uint8), "label": 3},
            r"expected images uint8 \[28, 28, 1\], got uint8 \[28, 28, 3\] in record 1",
        ),
        ({"image": np.zeros((28, 28, 1), np.uint8), "label": -1}, r"0 to 9, got -1 at index 1"),
    ],
)
def test_bad_records_of_tfds_are_one_line_errors(records, record, message):
    records["test"][1] = record
    with pytest.raises(ExperimentError, match=rf"^TFDS mnist \(test\): .*{message}"):
        data.load(DataConfig(name="mnist"))


def test_tfds_must_have_all_images(records):
    del records["train"][0]
    with pytest.raises(ExperimentError, match=r"expected the 12 images of MNIST, got 11"):
        data.load(DataConfig(name="mnist"))


# --------------------------------------------------------------------------- names


def test_wrong_names_and_splits_are_errors():
    with pytest.raises(
        ExperimentError, match=r"unknown data\.name 'cifar': use one of cifar10, digits, fashion_m"
    ):
        data.load(DataConfig(name="cifar"))
    for count in (1437, -1):
        with pytest.raises(ExperimentError, match=r"data\.validation must lie in \[0, 1437\)"):
            data.load(DataConfig(name="digits", validation=count))

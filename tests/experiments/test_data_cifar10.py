"""CIFAR-10 in its official files and as JPEG copies, written small and read back."""

import codecs
import os
import pickle
import sys

import numpy as np
import pytest
from data_files import assert_refused, jpeg, shrink

from experiments import data
from experiments.data import restricted_pickle
from experiments.settings.config import DataConfig
from experiments.settings.errors import ExperimentError

RECORDS = 3
BATCHES = (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder for a tiny CIFAR-10, and the records of its batches: a label and 3072 pixels."""
    shrink(monkeypatch, "cifar10", train=5 * RECORDS, test=RECORDS)
    rng = np.random.default_rng(0)
    records = {name: rng.integers(0, 256, (RECORDS, 3073), np.uint8) for name in BATCHES}
    for batch in records.values():
        batch[:, 0] %= 10
    return tmp_path, records


def _write_binary(folder, records):
    for name, batch in records.items():
        (folder / f"{name}.bin").write_bytes(batch.tobytes())


def _write_python(folder, records, order="C"):
    for name, batch in records.items():
        result = {
            b"batch_label": b"a part",
            b"labels": batch[:, 0].tolist(),
            b"data": np.array(batch[:, 1:], order=order),
            b"filenames": [b"a.png"] * RECORDS,
        }
        (folder / name).write_bytes(pickle.dumps(result, protocol=2))


def _as_python_2(records, folder):
    """The opcodes that Python 2 writes: strings of bytes, and numpy's module of that time."""

    def string(value):
        return b"U" + bytes([len(value)]) + value

    for name, batch in records.items():
        pixels = batch[:, 1:].tobytes()
        labels = b"".join(b"K" + bytes([label]) for label in batch[:, 0])
        (folder / name).write_bytes(
            b"\x80\x02}(" + string(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n"
            b"cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01K\x03M\x00\x0c\x86"
            b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + b"T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
            + string(b"labels") + b"](" + labels + b"eu."
        )  # fmt: skip


@pytest.mark.parametrize("written", ["binary", "python", "fortran", "python 2", "unpacked"])
def test_reads_the_official_files_of_cifar10(cifar, written):
    folder, records = cifar
    place = folder
    if written == "unpacked":  # the archive, in the folder that it makes
        place = folder / "cifar-10-batches-py"
        place.mkdir()
    if written == "binary":
        _write_binary(place, records)
    elif written == "python 2":
        _as_python_2(records, place)
    else:
        _write_python(place, records, order="F" if written == "fortran" else "C")
    splits = data.load(DataConfig(name="cifar10", dir=str(folder), validation=4))
    assert [len(split) for split in splits[:3]] == [11, 4, 3]
    assert splits.title == "CIFAR-10"
    assert (splits.shape, splits.classes) == ((32, 32, 3), 10)
    assert splits.train.images.flags.c_contiguous
    third = records["data_batch_2"][1]
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
        (lambda b: b"\x0b" + b[1:], r"labels must be 0 to 9, got 11 at index 9"),
        (None, r"data_batch_4\.bin is not there; --config\.data\.dir must name a folder with"),
    ],
)
def test_damaged_binaries_are_one_line_errors(cifar, damage, message):
    _write_binary(*cifar)
    path = cifar[0] / "data_batch_4.bin"
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    assert_refused("cifar10", cifar[0], message)


PLANES = np.zeros((RECORDS, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"is not a batch of CIFAR-10 \(expected a dictionary, got list\)"),
        ({b"labels": [1, 2, 3]}, r"expected b'data' as uint8 \[3, 3072\], got NoneType"),
        ({b"data": PLANES[:2], b"labels": [1, 2, 3]}, r"got \[2, 3072\]; fetch it again"),
        ({b"data": PLANES * 1.0, b"labels": [1, 2, 3]}, r"an array in it is not one of uint8"),
        ({b"data": PLANES}, r"expected b'labels' as a list of 3 class numbers, got NoneType"),
        ({b"data": PLANES, b"labels": [1, 2]}, r"class numbers, got 2 items"),
        ({b"data": PLANES, b"labels": [1, 2, True]}, r"class numbers, got 3 items"),
        ({b"data": PLANES, b"labels": [1, 2, -1]}, r"class numbers, got 3 items"),
        ({b"data": PLANES, b"labels": [1, 2, 10]}, r"labels must be 0 to 9, got 10 at index 5"),
        (None, r"data_batch_2 is not there; .* the python version"),
    ],
)
def test_other_pickles_are_one_line_errors(cifar, content, message):
    _write_python(*cifar)
    path = cifar[0] / "data_batch_2"
    path.unlink()
    if content is not None:
        path.write_bytes(pickle.dumps(content, protocol=2))
    assert_refused("cifar10", cifar[0], message)


class _Malicious:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(cifar, protocol):
    folder = cifar[0]
    _write_python(*cifar)
    trace = folder / "trace"
    for function, argument in [(os.system, f"touch {trace}"), (os.mkdir, str(trace))]:
        result = {b"data": PLANES, b"labels": _Malicious(function, argument)}
        content = pickle.dumps(result, protocol=protocol)
        (folder / "data_batch_1").write_bytes(content)
        assert_refused(
            "cifar10", folder, r"data_batch_1: is not a batch .*refused: it would run '(posix|nt)\."
        )
        assert not trace.exists()
        pickle.loads(content)  # an unpickler without restrictions does run it
        assert trace.exists()
        trace.unlink() if trace.is_file() else trace.rmdir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Malicious(eval, "1"), r"would run '__builtin__\.eval'"),
        (_Malicious(getattr, "a", "upper"), r"would run '__builtin__\.getattr'"),
        (np.float64(1), r"would run 'numpy\._?core\.multiarray\.scalar'"),
        (np.random.default_rng, r"would run 'numpy\.random.*default_rng'"),
        (_Malicious(codecs.encode, "a", "rot13"), r"encoding 'rot13' instead of 'latin1'"),
        (np.array([None]), r"an array in it is not one of uint8"),
    ],
)
def test_the_unpickler_knows_nothing_but_arrays(content, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        restricted_pickle.load(pickle.dumps({b"data": content}, protocol=2))


def test_a_pickle_cannot_fill_the_memory():
    content = b"\x80\x02}r\xff\xff\xff\x7f."  # one entry of the memo, at place 2^31 - 1
    with pytest.raises(
        pickle.UnpicklingError, match=r"its memo has an index 2147483647, but it has 9 bytes only"
    ):
        restricted_pickle.load(content)


def test_a_damaged_pickle_raises_one_type():
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = pickle.dumps({b"data": values, b"labels": [1, 2], b"name": b"a"}, protocol=2)
    np.testing.assert_array_equal(restricted_pickle.load(content)[b"data"], values)
    rng = np.random.default_rng(0)
    damaged = [content[:length] for length in range(0, len(content), 7)]
    damaged.append(content.replace(b"K\x02K\x03K\x04", b"K\x02K\x03K\x05"))  # the shape
    for _ in range(300):
        copy = bytearray(content)
        copy[rng.integers(len(copy))] = rng.integers(256)
        damaged.append(bytes(copy))
    refused = 0
    for copy in damaged:  # any other type fails the test
        try:
            restricted_pickle.load(copy)
        except pickle.UnpicklingError:
            refused += 1
    assert len(damaged) / 2 < refused < len(damaged)
    with pytest.raises(pickle.UnpicklingError, match=r"shape \[2, 3, 5\] in it has 24 bytes"):
        restricted_pickle.load(damaged[-301])


# --------------------------------------------------------------------------- JPEG copies


def _copies(train=5, test=2):
    """The arrays of `cifar10_jpeg.npz`, and their images: smooth, so JPEG hardly changes them."""
    ramp = np.arange(32, dtype=np.float64)
    images = [
        np.broadcast_to(3 * ramp[:, None, None] + 2 * ramp[None, :, None] + 10 * i, (32, 32, 3))
        for i in range(train + test)
    ]
    images = [image.astype(np.uint8) for image in images]
    files = [jpeg(image) for image in images]
    arrays = {"class_names": np.array(["airplane", "automobile"])}
    for split, part in (("train", files[:train]), ("test", files[train:])):
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(part), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, part)])
        arrays[f"{split}_labels"] = np.arange(len(part), dtype=np.uint8)
    return arrays, images


def test_reads_jpeg_copies_and_says_so(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    shrink(monkeypatch, "cifar10", train=5, test=2)
    arrays, images = _copies()
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    for place in (tmp_path / "cifar10_jpeg.npz", tmp_path):
        splits = data.load(DataConfig(name="cifar10", dir=str(place)))
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
            r"one more offset than labels, got shapes \[5\]",
        ),
        (_changed(train_offsets=lambda v: v * 1.0), r"expected integer offsets, got float64"),
        (_changed(train_labels=lambda v: v * 1.0), r"expected integer labels \[N\], got float64"),
        (_changed(test_labels=lambda v: v + np.uint8(9)), r"must be 0 to 9, got 10 at index 1"),
        (_changed(test_jpeg=lambda v: v * np.uint8(0)), r"image 0: is not a JPEG of 32x32"),
        (_changed(test_jpeg=lambda v: v.astype(np.int64)), r"jpeg as uint8 \[bytes\], got int64"),
        (_changed(test_labels=lambda v: v.astype(object)), r"cannot be read \(Object arrays"),
    ],
)
def test_damaged_copies_are_one_line_errors(tmp_path, monkeypatch, damage, message):
    pytest.importorskip("PIL")
    shrink(monkeypatch, "cifar10", train=5, test=2)
    np.savez(tmp_path / "cifar10_jpeg.npz", **damage(_copies()[0]))
    assert_refused("cifar10", tmp_path, message)


def test_copies_of_another_size_and_damaged_archives_are_errors(tmp_path):
    pytest.importorskip("PIL")
    arrays, _ = _copies(test=1)
    large = jpeg(np.zeros((64, 32, 3), np.uint8))
    arrays |= {
        "test_jpeg": np.frombuffer(large, np.uint8),
        "test_offsets": np.array([0, len(large)]),
    }
    path = tmp_path / "cifar10_jpeg.npz"
    np.savez(path, **arrays)
    config = DataConfig(name="cifar10", dir=str(tmp_path))
    with pytest.raises(ExperimentError, match=r"image 0: is not a JPEG .* 32x64 pixels, RGB"):
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


def test_copies_must_be_all_images(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    shrink(monkeypatch, "cifar10", train=6, test=2)
    np.savez(tmp_path / "cifar10_jpeg.npz", **_copies()[0])
    assert_refused("cifar10", tmp_path, r"\(train\): expected the 6 images of CIFAR-10, got 5")

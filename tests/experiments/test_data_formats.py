"""The official files of SVHN, STL-10 and Tiny ImageNet, written small and read back."""

import sys

import numpy as np
import pytest
from data_files import assert_refused, jpeg, shrink

from experiments import data
from experiments.settings.config import DataConfig
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.quick

# --------------------------------------------------------------------------- SVHN


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """A folder with the Matlab files of a tiny SVHN, and their arrays by name."""
    scipy_io = pytest.importorskip("scipy.io")
    shrink(monkeypatch, "svhn", train=4, test=3)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, labels in (("train_32x32.mat", [10, 1, 9, 2]), ("test_32x32.mat", [3, 10, 1])):
        images = rng.integers(0, 256, (32, 32, 3, len(labels)), np.uint8)
        arrays[name] = {"X": images, "y": np.array(labels, np.uint8)[:, None]}
        scipy_io.savemat(tmp_path / name, arrays[name], do_compression=True)
    return tmp_path, arrays


def test_reads_the_matlab_files_of_svhn(svhn):
    folder, arrays = svhn
    splits = data.load(DataConfig(name="svhn", dir=str(folder)))
    assert splits.title == "SVHN"
    assert splits.train.labels.tolist() == [0, 1, 9, 2]  # 10 is the digit 0
    assert splits.test.labels.tolist() == [3, 0, 1]
    pixel = arrays["train_32x32.mat"]["X"][5, 7, 1, 2]
    assert splits.train.images[2, 5, 7, 1] == np.float32(pixel) / np.float32(255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.array([[1], [0], [2]], np.uint8)}, r"labels must be 1 to 10, got 0 at index 1"),
        ({"y": np.array([[1.5], [2.0], [3.0]])}, r"integers y \[N, 1\], got .* float64 \[3, 1\]"),
        ({"y": np.array([[1, 2, 3]], np.uint8)}, r"expected X \[32, 32, 3, N\] .* uint8 \[1, 3\]"),
        ({"X": np.zeros((32, 32, 3), np.uint8)}, r"got \[32, 32, 3\] and uint8"),
        (
            {"X": np.zeros((32, 30, 3, 3), np.uint8)},
            r"\[N, 32, 32, 3\] of SVHN, got uint8 \[3, 32, 30, 3\]",
        ),
        ({"X": np.zeros((32, 32, 3, 3))}, r"expected uint8 images .* got float64"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, r"2 images but 3 labels"),
        ({"X": None}, r"test_32x32\.mat: cannot be read as a Matlab file with X and y \('X'\)"),
    ],
)
def test_other_matlab_files_are_one_line_errors(svhn, change, message):
    from scipy.io import savemat

    folder, arrays = svhn
    arrays = arrays["test_32x32.mat"] | change
    savemat(folder / "test_32x32.mat", {k: v for k, v in arrays.items() if v is not None})
    assert_refused("svhn", folder, message)


def test_damaged_and_missing_matlab_files_are_one_line_errors(svhn, monkeypatch):
    folder = svhn[0]
    path = folder / "test_32x32.mat"
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-50], content[:128] + b"\xff" * 500):
        path.write_bytes(damaged)
        assert_refused("svhn", folder, r"test_32x32\.mat: cannot be read as a Matlab file")
    path.unlink()
    assert_refused("svhn", folder, r"test_32x32\.mat is not there; .* with train_32x32\.mat and")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ExperimentError, match=r"needs scipy .* pip install scipy"):
        data.load(DataConfig(name="svhn", dir=str(folder)))


# --------------------------------------------------------------------------- STL-10


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """A folder with the binary files of a tiny STL-10, and the planes of its training images."""
    shrink(monkeypatch, "stl10", train=3, test=2)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (3, 3 * 96 * 96), np.uint8)
    (folder / "train_X.bin").write_bytes(planes.tobytes())
    (folder / "train_y.bin").write_bytes(bytes([10, 1, 7]))
    (folder / "test_X.bin").write_bytes(planes[:2].tobytes())
    (folder / "test_y.bin").write_bytes(bytes([2, 3]))
    return folder, planes


def test_reads_the_binary_files_of_stl10(stl10):
    folder, planes = stl10
    for place in (folder, folder.parent):
        splits = data.load(DataConfig(name="stl10", dir=str(place)))
    assert (splits.title, splits.shape) == ("STL-10", (96, 96, 3))
    assert splits.train.labels.tolist() == [9, 0, 6]
    # Planes are stored column by column: byte 9216 c + 96 j + i is channel c of pixel (i, j).
    for channel, row, column in [(0, 0, 0), (1, 2, 90), (2, 95, 5)]:
        expected = np.float32(planes[1, 9216 * channel + 96 * column + row]) / np.float32(255)
        assert splits.train.images[1, row, column, channel] == expected


def test_damaged_files_of_stl10_are_one_line_errors(stl10):
    folder, planes = stl10
    (folder / "test_y.bin").write_bytes(bytes([0, 3]))
    assert_refused("stl10", folder, r"test_y\.bin: labels must be 1 to 10, got 0 at index 0")
    (folder / "test_y.bin").write_bytes(bytes([1, 3, 4]))
    assert_refused("stl10", folder, r"test_y\.bin: expected 2 bytes \(2 records of 1\), got 3")
    (folder / "train_X.bin").write_bytes(planes.tobytes()[1:])
    assert_refused("stl10", folder, r"train_X\.bin: expected 82944 bytes \(3 records of 27648\)")
    (folder / "train_X.bin").unlink()
    assert_refused("stl10", folder, r"train_X\.bin is not there; .* with the binary files train_X")


# --------------------------------------------------------------------------- Tiny ImageNet

IDS = ["n03", "n01", "n02"]  # as in the archive, not sorted


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a Tiny ImageNet of 3 classes: image k is of one colour, 10 k."""
    pytest.importorskip("PIL")
    shrink(monkeypatch, "tiny_imagenet", train=6, test=3, classes=3)
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(IDS) + "\n")
    lines = []
    for index, wnid in enumerate(sorted(IDS)):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for number in range(2):
            colour = np.full((64, 64, 3), 10 * (2 * index + number), np.uint8)
            # Some files of the archive are grey.
            (images / f"{wnid}_{number}.JPEG").write_bytes(
                jpeg(colour[..., 0] if number else colour)
            )
        (folder / "val" / "images" / f"val_{index}.JPEG").write_bytes(
            jpeg(np.full((64, 64, 3), 100 + 10 * index, np.uint8))
        )
        lines.append(f"val_{index}.JPEG\t{IDS[index]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_reads_the_folders_of_tiny_imagenet(tiny):
    for place in (tiny, tiny.parent):
        splits = data.load(DataConfig(name="tiny_imagenet", dir=str(place)))
    assert (splits.title, splits.shape, splits.classes) == ("Tiny ImageNet", (64, 64, 3), 3)
    # Classes are numbered in the order of their ids, and images are not in that order.
    colours = splits.train.images[:, 30, 30, 0] * 255.0
    np.testing.assert_allclose(colours // 19.9, splits.train.labels, atol=0.0)
    np.testing.assert_allclose(np.sort(colours), np.arange(0, 60, 10), atol=2.0)
    assert np.any(np.diff(splits.train.labels) < 0)
    assert np.all(splits.train.images == splits.train.images[..., :1])
    # The validation images, in the order of their list, are the test images.
    assert splits.test.labels.tolist() == [2, 0, 1]
    np.testing.assert_allclose(splits.test.images[:, 9, 9, 1] * 255.0, [100, 110, 120], atol=2.0)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("wnids.txt", b"n01\nn02\n", r"wnids\.txt: expected 3 different ids, got 2 in 2 lines"),
        ("wnids.txt", b"n01\nn02\nn01\n", r"expected 3 different ids, got 2 in 3 lines"),
        ("wnids.txt", b"n01\nn02\nn04\n", r"n04/images: no such folder; unpack the archive again"),
        ("wnids.txt", b"\xff\xfe", r"wnids\.txt: is not text"),
        ("val/val_annotations.txt", None, r"val_annotations\.txt is not there"),
        ("val/val_annotations.txt", b"", r"val_annotations\.txt: expected 3 images, got 0"),
        ("val/val_annotations.txt", b"a.JPEG\tn09\n", r"an id of wnids\.txt in line 1, got 'a\.JP"),
        ("val/val_annotations.txt", b"../a.JPEG\tn01\n", r"expected a file name .* in line 1"),
        ("val/val_annotations.txt", b"a.JPEG", r"expected a file name .* got 'a\.JPEG'"),
        ("val/images/val_1.JPEG", None, r"val_1\.JPEG is not there"),
        ("val/images/val_1.JPEG", b"GIF89a", r"val_1\.JPEG: is not a JPEG of 64x64 pixels"),
        ("train/n02/images/n02_1.JPEG", None, r"train: expected 6 images, got 5; unpack"),
        ("train/n02/images/more.JPEG", b"", r"train: expected 6 images, got 7; unpack"),
    ],
)
def test_damaged_folders_of_tiny_imagenet_are_one_line_errors(tiny, path, content, message):
    (tiny / path).unlink(missing_ok=True)
    if content is not None:
        (tiny / path).write_bytes(content)
    assert_refused("tiny_imagenet", tiny, message)


def test_images_of_another_size_are_an_error(tiny):
    path = tiny / "train" / "n02" / "images" / "n02_0.JPEG"
    path.write_bytes(jpeg(np.zeros((64, 32, 3), np.uint8)))
    assert_refused("tiny_imagenet", tiny, r"n02_0\.JPEG: is not a JPEG .*it has 32x64 pixels, RGB")
    content = jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(content[: len(content) // 2])
    assert_refused("tiny_imagenet", tiny, r"n02_0\.JPEG: is not a JPEG .*truncated")

"""The table of data sets: their facts and their formats."""

from __future__ import annotations

from experiments.data import cifar10, copies, digits, idx, npz, stl10, svhn, tiny_imagenet
from experiments.data.dataset import DataSet

DATASETS = {
    # The part of https://archive.ics.uci.edu/dataset/80 that scikit-learn ships.
    "digits": DataSet(
        title="UCI digits",
        shape=(8, 8, 1),
        classes=10,
        train=1437,
        test=360,
        readers=(npz.reader("digits.npz"),),
        bundled=digits.read,
        white=16,
    ),
    # LeCun et al. 1998.
    "mnist": DataSet(
        title="MNIST",
        shape=(28, 28, 1),
        classes=10,
        train=60_000,
        test=10_000,
        readers=(idx.READER, npz.reader("mnist.npz")),
        tfds="mnist",
    ),
    # Xiao et al. 2017; its files have the names of MNIST's.
    "fashion_mnist": DataSet(
        title="Fashion-MNIST",
        shape=(28, 28, 1),
        classes=10,
        train=60_000,
        test=10_000,
        readers=(idx.READER, npz.reader("fashion_mnist.npz")),
        tfds="fashion_mnist",
    ),
    # Krizhevsky 2009. JPEG loses detail, so the copies come last and results name them.
    "cifar10": DataSet(
        title="CIFAR-10",
        shape=(32, 32, 3),
        classes=10,
        train=50_000,
        test=10_000,
        readers=(cifar10.BINARY, cifar10.PYTHON, npz.reader("cifar10.npz"), copies.READER),
        tfds="cifar10",
    ),
    # Netzer et al. 2011: the cropped digits, without the 531 131 extra images.
    "svhn": DataSet(
        title="SVHN",
        shape=(32, 32, 3),
        classes=10,
        train=73_257,
        test=26_032,
        readers=(svhn.READER, npz.reader("svhn.npz")),
        tfds="svhn_cropped",
    ),
    # Coates et al. 2011, without the images that have no label.
    "stl10": DataSet(
        title="STL-10",
        shape=(96, 96, 3),
        classes=10,
        train=5_000,
        test=8_000,
        readers=(stl10.READER, npz.reader("stl10.npz")),
        tfds="stl10",
    ),
    # Stanford CS231n, from ImageNet. The labels of its test images are not public; papers test on
    # its 10 000 validation images.
    "tiny_imagenet": DataSet(
        title="Tiny ImageNet",
        shape=(64, 64, 3),
        classes=200,
        train=100_000,
        test=10_000,
        readers=(tiny_imagenet.READER, npz.reader("tiny_imagenet.npz")),
    ),
}

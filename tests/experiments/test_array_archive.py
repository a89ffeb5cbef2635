"""Archives of arrays that are damaged, or that lie about what is in them."""

import errno
import io
import os
import warnings
import zipfile

import jax
import numpy as np
import pytest
from evaluation_files import refusal, whole_file

from experiments.evaluation import certificates
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.quick


@pytest.fixture
def path(tmp_path):
    """The file of a finished cascade."""
    return whole_file(tmp_path)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, contents, compression=zipfile.ZIP_STORED):
    """Writes an archive of (name, bytes), in which a name may stand twice."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for name, content in contents:
            archive.writestr(name, content)


def npy(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def doubled(path):
    pack(path, [*members(path).items(), ("correct.npy", npy(np.ones(8, bool)))])


def doubled_without_suffix(path):
    pack(path, [*members(path).items(), ("correct", npy(np.ones(8, bool)))])


def with_folder(path):
    pack(path, [*members(path).items(), ("folder/", b"")])


def with_text(path):
    pack(path, [*members(path).items(), ("README.txt", b"hello")])


def renamed(path):
    pack(path, [(name.removesuffix(".npy"), content) for name, content in members(path).items()])


def compressed(path):
    pack(path, members(path).items(), zipfile.ZIP_DEFLATED)


def bomb(path):
    contents = members(path) | {"index.npy": npy(np.zeros(30_000_000, np.int64))}
    pack(path, contents.items(), zipfile.ZIP_DEFLATED)


def bomb_of_metadata(path):
    contents = members(path) | {"metadata.npy": npy(np.array(" " * 10_000_000))}
    pack(path, contents.items(), zipfile.ZIP_DEFLATED)


def header_of(shape, descr="|b1", fortran=False):
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def replaced(content):
    def change(path):
        pack(path, (members(path) | {"correct.npy": content}).items())

    return change


def patched(old, new):
    """Bytes of the archive exchanged where they stand first, of the same length."""

    def change(path):
        content = path.read_bytes()
        assert old in content
        assert len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))

    return change


def declared_sizes(path):
    """The directory says of a member that it is larger than it is, and than the file."""
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 20 : start + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(content)


def shifted(path):
    """The directory leads to the wrong places."""
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 42 : start + 46] = (7).to_bytes(4, "little")
    path.write_bytes(content)


def encrypted(path):
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 8] |= 1
    path.write_bytes(content)


def method_99(path):
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 10] = 99
    path.write_bytes(content)


def changed_number(path):
    """A byte of the data, which only the archive's checksum can tell."""
    content = bytearray(path.read_bytes())
    start = content.index(b"interval_margins.npy")
    place = content.index(np.float32(-0.5).tobytes(), start)
    content[place : place + 4] = np.float32(-0.625).tobytes()
    path.write_bytes(content)


def pickled(path):
    contents = members(path)
    objects = npy(np.array([print], dtype=object), allow_pickle=True)
    pack(path, (contents | {"correct.npy": objects}).items())


def directory(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


NO_ARCHIVE = "the archive is damaged"
COMPRESSED = "expected arrays as numpy.savez stores them, got '.*' compressed"
DAMAGED = "array 'correct' is damaged"
ARCHIVES = {
    "half": (lambda path: path.write_bytes(path.read_bytes()[:1500]), NO_ARCHIVE),
    "one byte less": (lambda path: path.write_bytes(path.read_bytes()[:-1]), NO_ARCHIVE),
    "without its head": (lambda path: path.write_bytes(path.read_bytes()[100:]), "points outside"),
    "empty": (lambda path: path.write_bytes(b""), NO_ARCHIVE),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), NO_ARCHIVE),
    "an empty archive": (lambda path: pack(path, []), "array 'metadata' is missing"),
    "text": (lambda path: path.write_text("evaluation\n"), NO_ARCHIVE),
    "a plain npy": (lambda path: path.write_bytes(npy(np.zeros(8))), NO_ARCHIVE),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04N."), NO_ARCHIVE),
    "a folder": (directory, "expected a file, got something else"),
    "missing": (lambda path: path.unlink(), "expected a file, got nothing"),
    "a pipe": (pipe, "expected a file, got something else"),
    "two members of one name": (doubled, "got 'correct' twice"),
    "two members of one array": (doubled_without_suffix, "NAME.npy, got 'correct'"),
    "a folder inside": (with_folder, "NAME.npy, got 'folder/'"),
    "a text inside": (with_text, r"NAME.npy, got 'README\.txt'"),
    "members without suffix": (renamed, "NAME.npy, got 'metadata'"),
    "compressed": (compressed, COMPRESSED),
    "a bomb": (bomb, COMPRESSED),
    "a bomb of metadata": (bomb_of_metadata, COMPRESSED),
    "sizes beyond the file": (declared_sizes, r"got a file of \d+ bytes"),
    # Which of the overlapping arrays is named depends on the version of Python.
    "places beyond the member": (shifted, "array '(crown-ibp_margins|metadata)' is damaged"),
    "encrypted": (encrypted, "array 'crown-ibp_margins' is damaged .* is encrypted"),
    "an unknown compression": (method_99, COMPRESSED),
    "a changed number": (changed_number, "array 'interval_margins' is damaged .*CRC"),
    "pickled objects": (pickled, "array 'correct' must hold .*, got Python objects"),
    "no npy": (replaced(b"hello"), DAMAGED),
    "an empty member": (replaced(b""), DAMAGED),
    "a cut npy": (replaced(npy(np.ones(8, bool))[:-1]), r"8 bytes of bool \[8\], got 7"),
    "more than an npy": (replaced(npy(np.ones(8, bool)) + b"\0"), r"bool \[8\], got 9"),
    "no data": (replaced(header_of((8,))), r"bool \[8\], got 0"),
    "2**62 numbers": (replaced(header_of((2**62,))), r"bool \[4611686018427387904\], got 0"),
    "2**70 numbers": (replaced(header_of((2**70,))), "array 'correct' must have the 11805916"),
    "a negative shape": (replaced(header_of((-1,)) + bytes(8)), r">= 0, got bool \[-1\]"),
    "negative sizes": (replaced(header_of((-2, -4)) + bytes(8)), r">= 0, got bool \[-2, -4\]"),
    "a shape that is no tuple": (replaced(header_of([8]) + bytes(8)), DAMAGED),
    "code": (replaced(header_of((8,)).replace(b"(8,)", b"f(8)") + bytes(8)), DAMAGED),
    "an unknown dtype": (replaced(header_of((8,), "|b9") + bytes(8)), DAMAGED),
    "bytes that are no bool": (replaced(header_of((8,)) + b"\2" * 8), "'correct' must be True or"),
    "npy of version 9": (
        replaced(npy(np.ones(8, bool)).replace(b"Y\x01\x00", b"Y\x09\x00")),
        r"'correct' must be .npy of version 1.0, got \(9, 0\)",
    ),
    "a deep header": (
        replaced(header_of((8,)).replace(b"(8,)", b"(" * 5000 + b"8,)") + bytes(8)),
        DAMAGED,
    ),
    "names that differ inside": (patched(b"labels.npy", b"lables.npy"), "'labels' is damaged"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_what_is_no_archive_of_arrays_is_refused(path, what):
    change, match = ARCHIVES[what]
    change(path)
    refusal(path, match)


def test_nothing_is_read_of_what_is_too_large(path, monkeypatch):
    """An array of the wrong shape is refused by its header; its data may be larger than memory."""
    contents = members(path) | {"index.npy": npy(np.zeros(100_000, np.int64))}
    pack(path, contents.items())
    opened = []
    read = zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, name: opened.append(name.filename) or read(self, name)
    )
    refusal(path, r"index must be int \[8\], .* got int64 \[100000\]")
    assert opened == ["metadata.npy"]


def test_a_file_that_cannot_be_read_is_not_called_damaged(path, monkeypatch):
    def fails(self, name):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "read", fails)
        refusal(path, r"cannot be read \(Input/output error\)")

    def too_large(self, name):
        raise MemoryError

    monkeypatch.setattr(zipfile.ZipFile, "read", too_large)
    refusal(path, r"cannot be read \(not enough memory\)")


def test_every_damaged_byte_is_refused_or_harmless(path):
    """One byte changed anywhere, and the file cut anywhere: never other numbers, never an error."""
    whole, content = certificates.read(path), path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [content[:length] for length in range(0, len(content), 61)]
    for place in random.integers(len(content), size=400):
        changed = bytearray(content)
        changed[place] ^= int(random.integers(1, 256))
        damaged.append(bytes(changed))
    messages = []
    for one in damaged:
        path.write_bytes(one)
        try:
            result = certificates.read(path)
        except ExperimentError as error:
            messages.append(str(error))
            continue
        assert result.metadata == whole.metadata
        arrays = zip(*map(jax.tree.leaves, (result[1:], whole[1:])), strict=True)
        assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in arrays)
    assert len(messages) > 400
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)

"""Changed, damaged and malicious certificate files are refused."""

import io
import zipfile

import numpy as np
import pytest
from certificate_files import contents, rewritten, run, save_true_certificate

import boundjax as bj
from boundjax import check

pytestmark = pytest.mark.quick

# 1000 mutants would take 15 s.
MUTANTS = 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A true certificate: its folder, the certificate itself, the model and the inputs."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, *save_true_certificate(folder)


def test_wrong_claims_are_refused(saved, tmp_path, capsys):
    """Raised margins, and an example claimed as verified although it is not robust."""
    folder, certificate, *_ = saved
    arrays, claims = contents(folder / "certificate.npz")
    weak = int(np.argmin(certificate.verified))
    raised = {**arrays, "margins": np.where(arrays["margins"] != 0, arrays["margins"] + 0.01, 0.0)}
    path = rewritten(tmp_path / "c.npz", raised, claims)
    status, lines = run(capsys, path, "--weights", folder / "weights.npz")
    assert status == 1, lines
    assert sum(line.startswith("example ") for line in lines) == 12  # two margins each
    flipped = {**arrays, "verified": arrays["verified"] | (np.arange(6) == weak)}
    path = rewritten(tmp_path / "c.npz", flipped, claims)
    status, lines = run(capsys, path, "--weights", folder / "weights.npz")
    assert status == 1, lines
    (line, *_) = [line for line in lines if line.startswith("example ")]
    assert line.startswith(f"example {weak}, class ")
    assert ": verified, margin " in line


def mutants(folder, seed):
    """Changed certificates or weights, as a name and the arrays and claims of both files."""
    random = np.random.default_rng(seed)
    arrays, claims = contents(folder / "certificate.npz")
    weights, header = contents(folder / "weights.npz")
    arrays, weights = dict(arrays), dict(weights)
    count, classes = arrays["margins"].shape
    n = int(random.integers(count))
    m = int(random.integers(classes))

    def changed(name, change):
        value = arrays[name].copy()
        change(value)
        arrays[name] = value

    def weight():
        name = random.choice([k for k in weights if weights[k].size])
        value = weights[name].copy()
        flat = value.reshape(-1)
        k = random.integers(flat.size)
        flat[k] = flat[k] + 1 if value.dtype.kind == "i" else np.nextafter(flat[k], np.float32(9e9))
        weights[name] = value

    def margin():
        other = (arrays["labels"][n] + 1 + m % (classes - 1)) % classes
        changed(
            "margins", lambda v: v.__setitem__((n, other), v[n, other] + random.uniform(1e-3, 9))
        )

    def label():
        changed("labels", lambda v: v.__setitem__(n, (v[n] + 1 + m % (classes - 1)) % classes))

    def nan():
        name = random.choice(["margins", "eps", "x", "clip_low"])
        changed(name, lambda v: v.reshape(-1).__setitem__(0, random.choice([np.nan, np.inf])))

    def shape():
        name = random.choice(list(arrays))
        arrays[name] = arrays[name][..., None] if random.random() < 0.5 else arrays[name][None]
        if name in ("eps", "clip_low", "clip_high"):
            arrays[name] = np.zeros((3, 5), np.float32)

    def kind():
        name = random.choice(list(arrays))
        arrays[name] = arrays[name].astype(
            random.choice(["complex64", "U4", "uint16", "datetime64[s]"])
        )

    def key():
        name = random.choice(list(claims))
        if random.random() < 0.5:
            del claims[name]
        else:
            wrong = [None, 7, "wrong", [], {}, [1], -1.5, [["crown"]]]
            # The method and the versions are words for the reader, which prove nothing.
            name = name if name not in ("method", "versions") else "network"
            claims[name] = wrong[random.integers(len(wrong))]

    def entry():
        if random.random() < 0.5:
            del arrays[random.choice(["labels", "verified", "margins", "eps", "x", "clip_low"])]
        else:
            arrays[f"extra{m}"] = np.zeros(3, np.float32)

    def node():
        k = random.integers(len(header["nodes"]))
        wrong = [["gelu", 0], ["product", 99], ["product", -1], [], "x", ["input"], ["add", 0]]
        wrong = [entry for entry in wrong if entry != header["nodes"][k]]
        header["nodes"][k] = wrong[random.integers(len(wrong))]

    def eps():
        arrays["eps"] = arrays["eps"] * np.float32(random.choice([1.3, 2.0, 10.0, -1.0]))

    changes = {
        "weight": weight,
        "margin": margin,
        "verified": lambda: changed("verified", lambda v: v.__ior__(True)),
        "label": label,
        "eps": eps,
        "input": lambda: changed(
            "x", lambda v: v.reshape(-1).__setitem__(m, random.choice([0.0, 0.5, 2.0]))
        ),
        "clip": lambda: changed("clip_high", lambda v: v.__setitem__((), 0.5)),
        "nan": nan,
        "shape": shape,
        "type": kind,
        "key": key,
        "entry": entry,
        "node": node,
        "witness": lambda: claims.update(witness=["interval"]),
        "norm": lambda: claims.update(norm=random.choice([3, 0, -1, 2.5]).item()),
        "hash": lambda: claims["network"].__setitem__(1, "0" * 64),
        "inputs": lambda: claims.update(inputs=claims["inputs"][::-1]),
        "no claims": lambda: arrays.update({k: v[:0] for k, v in arrays.items() if v.ndim}),
    }
    name = list(changes)[seed % len(changes)]
    changes[name]()
    return name, (arrays, claims), (weights, header)


@pytest.mark.parametrize("seed", range(0, MUTANTS, 20))
def test_mutants_are_refused_with_one_line_each(saved, seed, tmp_path, capsys):
    folder, *_ = saved
    for number in range(seed, min(seed + 20, MUTANTS)):
        name, certificate, weights = mutants(folder, number)
        status, lines = run(
            capsys,
            rewritten(tmp_path / "c.npz", *certificate),
            "--weights",
            rewritten(tmp_path / "w.npz", *weights),
        )
        assert status in (1, 2), (number, name)
        if status == 2:
            assert len(lines) == 1, lines
            assert len(lines[0]) < 400
        else:
            assert any(line.startswith("example ") for line in lines)


@pytest.mark.parametrize("which", ["certificate", "weights"])
def test_damaged_files_are_refused_or_hold_the_same(saved, which, tmp_path, capsys):
    """Flipped or missing bytes; a few, such as those of a date, carry no content."""
    folder, *_ = saved
    content = (folder / f"{which}.npz").read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / f"{which}.npz"
    expected = check.read_arrays(folder / f"{which}.npz")
    refused = 0
    for k in range(100):
        if k % 2:
            damaged = bytearray(content)
            damaged[random.integers(len(content))] ^= int(random.integers(1, 256))
        else:
            damaged = content[: random.integers(len(content))]
        path.write_bytes(damaged)
        files = {"certificate": folder / "certificate.npz", "weights": folder / "weights.npz"}
        files[which] = path
        status, lines = run(capsys, files["certificate"], "--weights", files["weights"])
        if status == 0:
            same = check.read_arrays(path)
            assert {k: v.tobytes() for k, v in same.items()} == {
                k: v.tobytes() for k, v in expected.items()
            }
        else:
            assert status == 2
            assert len(lines) == 1
            refused += 1
    assert refused > 80


def zipped(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def npy(header, content=b""):
    """An npy file with this header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
NEGATIVE = "{'descr': '<f4', 'fortran_order': False, 'shape': (-5,), }"
OBJECT = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
SMALL = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("labels.npy", npy(HUGE))], "declares arrays of more than"),
        ([("labels.npy", npy(NEGATIVE, bytes(20)))], "no plain numbers"),
        ([("labels.npy", npy(OBJECT, b"cos\nsystem\n"))], "no plain numbers"),
        ([("labels.npy", npy(SMALL, bytes(5)))], "size not as declared"),
        ([("labels.npy", npy(SMALL, bytes(3)))], "size not as declared"),
        ([("labels.npy", b"nothing")], "magic string"),
        ([("labels.npy", npy("__import__('os')"))], "malformed node"),
        ([(f"{k}.npy", npy(SMALL, bytes(4))) for k in range(3)], "boundjax-certificate"),
        ([("json.npy", npy(SMALL.replace("f4", "u1").replace("<", "|"), b"["))], "Expecting"),
    ],
)
def test_files_that_are_made_to_do_damage(entries, message, saved, tmp_path, capsys):
    folder, *_ = saved
    path = zipped(tmp_path / "bad.npz", entries)
    status, lines = run(capsys, path, "--weights", folder / "weights.npz")
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]
    with pytest.raises(ValueError, match=r"^bad\.npz: "):
        bj.load_certificate(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros(2**20, np.float32))
    path = zipped(tmp_path / "bomb.npz", [(f"{k}.npy", stream.getvalue()) for k in range(3)])
    assert path.stat().st_size < 2**15
    with pytest.raises(ValueError, match="more than 10000000 bytes"):
        check.read_arrays(path, 10_000_000)


def test_files_that_are_not_there(saved, tmp_path, capsys):
    folder, *_ = saved
    with pytest.raises(FileNotFoundError):
        bj.load_certificate(tmp_path / "none.npz")
    status, lines = run(capsys, tmp_path / "none.npz", "--weights", folder / "weights.npz")
    assert (status, len(lines)) == (2, 1)
    with pytest.raises(SystemExit) as exit_status:
        check.main([])
    assert exit_status.value.code == 2

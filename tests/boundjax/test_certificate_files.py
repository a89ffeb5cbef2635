"""Certificates as files: saved, loaded, proved again without JAX, and refused when changed."""

import io
import json
import re
import subprocess
import sys
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx_models
import pytest
from flax import nnx

import boundjax as bj
from boundjax import check, check_onnx
from boundjax.certification import export

pytestmark = pytest.mark.quick

# `python -m pytest tests/boundjax/test_certificate_files.py` with 1000 here takes 20 s.
MUTANTS = 200
BIAS = nn.initializers.normal(0.1)


class Mlp(nn.Module):
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = self.activation(nn.Dense(12, bias_init=BIAS)(x))
        x = self.activation(nn.Dense(12, bias_init=BIAS)(x))
        return nn.Dense(3, bias_init=BIAS)(x)


class Cnn(nn.Module):
    """Strides, groups, dilation, BatchNorm, a residual sum, max and average pooling."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, bias_init=BIAS)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        y = nn.Conv(4, (3, 3), feature_group_count=2, kernel_dilation=2, bias_init=BIAS)(x)
        x = nn.relu(x + y)
        x = nn.max_pool(x, (2, 2), (1, 1), padding="SAME")
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID") / 4.0
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(3)(x)


class Piecewise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Dense(8)(x)) / 3.0
        x = 0.5 - jnp.abs(nn.Dense(8)(x))
        x = jnp.clip(nn.Dense(8)(x), -0.5, 0.3)
        x = nn.relu6(jnp.maximum(jnp.concatenate([x, 2.0 * x], axis=-1), -0.1))
        return nn.Dense(3)(jnp.pad(x, ((0, 0), (1, 1)), constant_values=0.5)[:, ::-1])


NETWORKS = {
    "mlp": (Mlp(), (2, 4)),
    "cnn": (Cnn(), (6, 6, 2)),
    "piecewise": (Piecewise(), (6,)),
    "tanh": (Mlp(nn.tanh), (8,)),
    "sigmoid": (Mlp(nn.sigmoid), (8,)),
    "exp": (Mlp(jnp.exp), (8,)),
}


def model_of(name, seed=0):
    module, shape = NETWORKS[name]
    variables = module.init(jax.random.key(seed), jnp.zeros((1, *shape)))
    if "batch_stats" in variables:
        variables = jax.tree.map(
            lambda v: v + 0.3 * jnp.cos(jnp.arange(1.0 * v.size)).reshape(v.shape), variables
        )
    return (module, variables), shape


def inputs_of(shape, count=6):
    return np.random.default_rng(0).uniform(size=(count, *shape)).astype(np.float32)


def run(capsys, *arguments):
    """The exit status and the printed lines of the checker."""
    status = check.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines() + printed.err.splitlines()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A certificate that is true, with its network: the paths, the model and the inputs."""
    folder = tmp_path_factory.mktemp("saved")
    model, shape = model_of("mlp")
    x = inputs_of(shape)
    certificate = bj.certify(model, x, 0.1, clip=(0.0, 1.0), method="crown-ibp")
    assert 0 < certificate.verified.sum() < len(x)
    bj.export_weights(model, x, folder / "weights.npz")
    certificate.save(folder / "certificate.npz", model, x)
    return folder, certificate, model, x


def contents(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("json").tobytes())


def rewritten(path, arrays, claims):
    export.write(path, {**arrays, "json": export.encoded(claims)})
    return path


# --- proved again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "eps", "options"),
    [
        ("mlp", "interval", 0.02, {"clip": (0.0, 1.0)}),
        ("mlp", "crown", 0.05, {}),
        ("mlp", "fast-lin", 0.05, {}),
        ("mlp", "crown", 0.2, {"norm": 2, "clip": (0.0, 1.0)}),
        ("mlp", "crown-ibp", 0.2, {"norm": 1}),
        ("cnn", "crown-ibp", 0.03, {}),
        ("cnn", "crown", 0.03, {"clip": (0.0, 1.0)}),
        ("cnn", "crown-ibp", 0.3, {"norm": 2}),
        ("piecewise", "crown", 0.1, {}),
        ("tanh", "crown", 0.1, {}),
        ("sigmoid", "crown-ibp", 0.1, {}),
        ("exp", "crown-ibp", 0.02, {}),
    ],
)
def test_what_certify_claims_is_proved_again(name, method, eps, options, tmp_path, capsys):
    model, shape = model_of(name)
    x = inputs_of(shape)
    certificate = bj.certify(model, x, eps, method=method, **options)
    bj.export_weights(model, x, tmp_path / "w.npz")
    certificate.save(tmp_path / "c.npz", model, x)
    assert certificate.margins.max() > 0
    status, lines = run(capsys, tmp_path / "c.npz", "--weights", tmp_path / "w.npz")
    assert status == 0, lines
    assert "6 of 6 examples checked" in lines[-1]
    assert "real numbers" in lines[0]


def test_the_exported_network_is_the_model(capsys):
    for name in NETWORKS:
        model, shape = model_of(name)
        x = inputs_of(shape)
        weights = export.weights_of(model, x)
        values = [x.reshape(len(x), -1).astype(np.float64)]
        for node in nodes_of(weights.arrays)[1:]:
            operands = [values[i] for i in node.inputs]
            if node.op in check.LINEAR:
                values.append(node.forward(operands))
            elif node.op == "max":
                windows = check.windows(operands[0], node.index)[..., 0]
                values.append(np.where(node.index < 0, -np.inf, windows).max(axis=-1))
            else:
                with np.errstate(all="ignore"):
                    values.append(node.value(operands[0]))
        module, variables = model
        np.testing.assert_allclose(values[-1], module.apply(variables, x), rtol=1e-5, atol=1e-5)


def nodes_of(arrays):
    nodes = []
    for k, (op, *inputs) in enumerate(json.loads(arrays["json"].tobytes())["nodes"]):
        prefix = f"{k}."
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        check.append(nodes, op, inputs, **own)
    return nodes


def test_the_same_for_programs(saved, tmp_path, capsys):
    """The margins of today's bounds do not allow for programs, but the slack is small."""
    folder, *_ = saved
    arrays, claims = contents(folder / "certificate.npz")
    claims["arithmetic"] = "float32"
    path = rewritten(tmp_path / "c.npz", arrays, claims)
    status, lines = run(capsys, path, "--weights", folder / "weights.npz")
    assert status == 0, lines
    assert "programs with unit 5.96e-08" in lines[0]
    slack = float(lines[-1].rpartition(" ")[2])
    assert 1e-7 < slack < 1e-4  # by which programs lose


def test_radii(tmp_path, capsys):
    model, shape = model_of("mlp")
    x = inputs_of(shape)
    radii = bj.certified_radius(model, x, method="crown-ibp", steps=6)
    module, variables = model
    labels = np.argmax(module.apply(variables, x), axis=-1)
    certificate = bj.Certificate.of_radii(radii, labels, method="crown-ibp")
    certificate.save(tmp_path / "c.npz", model, x)
    bj.export_weights(model, x, tmp_path / "w.npz")
    status, lines = run(capsys, tmp_path / "c.npz", "--weights", tmp_path / "w.npz")
    assert status == 0, lines
    loaded = bj.load_certificate(tmp_path / "c.npz")
    assert (loaded.threat.eps == radii).all()
    assert loaded.margins.shape == (6, 0)
    wider = bj.Certificate.of_radii(radii * 1.5, labels, method="crown-ibp")
    wider.save(tmp_path / "c.npz", model, x)
    status, lines = run(capsys, tmp_path / "c.npz", "--weights", tmp_path / "w.npz")
    assert status == 1, lines
    assert sum(line.startswith("example") for line in lines) >= (radii > 0).sum()
    with pytest.raises(ValueError, match="radii and labels must be"):
        bj.Certificate.of_radii(radii, labels[:2], method="crown-ibp")


@pytest.mark.parametrize("kind", ["nnx", "callable"])
def test_other_models(kind, tmp_path, capsys):
    if kind == "nnx":
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
    else:
        weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        model = lambda x: jax.nn.relu(x @ weights) @ jnp.eye(3) * 0.5  # noqa: E731
    x = inputs_of((4,))
    certificate = bj.certify(model, x, 0.01)
    bj.export_weights(model, x, tmp_path / "w.npz")
    certificate.save(tmp_path / "c.npz", tmp_path / "w.npz", x, with_inputs=False)
    np.savez(tmp_path / "data.npz", x=x)
    files = [tmp_path / "c.npz", "--weights", tmp_path / "w.npz"]
    assert run(capsys, *files, "--data", tmp_path / "data.npz")[0] == 0
    assert run(capsys, *files, "--data", tmp_path / "w.npz")[0] == 2
    assert run(capsys, *files)[0] == 2
    np.savez(tmp_path / "data.npz", x=x + np.float32(0.01))
    assert run(capsys, *files, "--data", tmp_path / "data.npz")[0] == 2


def test_an_onnx_file(tmp_path, capsys):
    random = np.random.default_rng(1)
    node, f32 = onnx_models.node, onnx_models.f32
    constants = {
        "k": 0.4 * f32(3, 1, 3, 3),
        "b": f32(3),
        "w": 0.3 * f32(27, 3),
        "c": f32(3, seed=2),
    }
    model = onnx_models.network(
        [
            node("Conv", "x k b", "a", pads=[1, 1, 1, 1], strides=[2, 2]),
            node("Relu", "a", "r"),
            node("Flatten", "r", "f"),
            node("Gemm", "f w c", "y"),
        ],
        [1, 1, 6, 6],
        constants,
    )
    path = onnx_models.save(model, tmp_path)
    x = random.uniform(size=(5, 1, 6, 6)).astype(np.float32)
    certificate = bj.certify(bj.from_onnx(path), x, 0.02)
    certificate.save(tmp_path / "c.npz", path, x)
    status, lines = run(capsys, tmp_path / "c.npz", "--onnx", path)
    assert status == 0, lines
    path.write_bytes(path.read_bytes()[:-1])
    status, lines = run(capsys, tmp_path / "c.npz", "--onnx", path)
    assert status == 2
    assert len(lines) == 1


# ONNX models that the checker does not read, of those of test_onnx.py: one of each operator.
READ = 50


def test_onnx_operators_compute_what_onnxruntime_does(tmp_path):
    read = 0
    for name, model in onnx_models.CASES.items():
        path = onnx_models.save(model, tmp_path)
        try:
            nodes, _ = check_onnx.read_onnx(path, check.append)
        except ValueError:
            continue
        x = np.random.default_rng(0).normal(size=(2, nodes[0].size)).astype(np.float32)
        values = [x.astype(np.float64)]
        for node in nodes[1:]:
            operands = [values[i] for i in node.inputs]
            if node.op in check.LINEAR:
                values.append(node.forward(operands))
            elif node.op == "max":
                windows = check.windows(operands[0], node.index)[..., 0]
                values.append(np.where(node.index < 0, -np.inf, windows).max(axis=-1))
            else:
                values.append(node.value(operands[0]))
        expected = onnx_models.reference(path, x).reshape(2, -1)
        np.testing.assert_allclose(values[-1], expected, rtol=1e-5, atol=1e-5, err_msg=name)
        read += 1
    assert read >= READ


def test_several_witnesses_prove_the_best_margins(tmp_path, capsys):
    model, shape = model_of("mlp")
    x = inputs_of(shape)
    certificate = bj.certify(model, x, 0.05, method="best")
    bj.export_weights(model, x, tmp_path / "w.npz")
    with pytest.raises(ValueError, match="cannot derive the bounds of method 'best' again"):
        certificate.save(tmp_path / "c.npz", model, x)
    with pytest.raises(ValueError, match="witness must be a list"):
        certificate.save(tmp_path / "c.npz", model, x, witness="crown")
    certificate.save(tmp_path / "c.npz", model, x, witness=["crown-ibp", "crown"], margins=False)
    status, lines = run(capsys, tmp_path / "c.npz", "--weights", tmp_path / "w.npz")
    assert status == 0, lines


def test_a_sample_says_so(saved, capsys):
    folder, *_ = saved
    files = [folder / "certificate.npz", "--weights", folder / "weights.npz"]
    status, lines = run(capsys, *files, "--sample", 2, "--seed", 7)
    assert status == 0
    assert "2 of 6 examples checked (seed 7)" in lines[-1]
    # None is not a sample.
    assert "1 of 6 examples checked" in run(capsys, *files, "--sample", 0)[1][-1]


def test_loading_gives_the_certificate_back(saved, tmp_path):
    folder, certificate, model, x = saved
    loaded = bj.load_certificate(folder / "certificate.npz")
    for name in ("verified", "margins", "labels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(certificate, name))
    assert (loaded.method, loaded.arithmetic) == (certificate.method, certificate.arithmetic)
    assert loaded.threat.norm == np.inf
    assert np.float64(loaded.threat.eps) >= 0.1  # rounded up to float32
    assert loaded.threat.clip == (0.0, 1.0)
    assert "crown-ibp" in str(loaded)
    _, claims = contents(folder / "certificate.npz")
    assert claims["versions"]["jax"] == jax.__version__
    loaded.save(tmp_path / "again.npz", model, x)
    first, second = (contents(p) for p in (folder / "certificate.npz", tmp_path / "again.npz"))
    assert first[1] == second[1]
    assert {k: v.tobytes() for k, v in first[0].items()} == {
        k: v.tobytes() for k, v in second[0].items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, m, x: c.save("f", m, x[:2]), "x must be the 6 finite inputs"),
        (lambda c, m, x: c.save("f", m, x * np.nan), "finite"),
        (lambda c, m, x: c.save("f", m, x.astype(int)), "x must be a float32 batch"),
        (lambda c, m, x: c.save("f", lambda x: x.reshape(len(x), -1), x), "the model has 8 logits"),
    ],
)
def test_what_does_not_belong_together_is_not_saved(saved, change, message, tmp_path, monkeypatch):
    _, certificate, model, x = saved
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        change(certificate, model, x)
    assert not list(tmp_path.iterdir())


def test_an_op_that_the_checker_does_not_know_is_named(tmp_path):
    with pytest.raises(bj.UnsupportedOpError, match="checker does not know the op 'softplus'"):
        bj.export_weights(jax.nn.softplus, inputs_of((3,)), tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


# --- without JAX ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "module"])
def test_the_checker_runs_without_jax(saved, how, tmp_path, project):
    folder, *_ = saved
    hidden = ["jax", "flax", "optax", "chex", "onnx"]
    if how == "path":
        hidden += ["boundjax", "lazy_loader"]
    for name in hidden:
        (tmp_path / f"{name}.py").write_text("raise ImportError('hidden by the test')\n")
    program = [project / "boundjax" / "check.py"] if how == "path" else ["-m", "boundjax.check"]
    files = [folder / "certificate.npz", "--weights", folder / "weights.npz"]
    result = subprocess.run(
        [sys.executable, *map(str, [*program, *files])],
        capture_output=True,
        text=True,
        check=False,
        cwd=project if how == "module" else tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "0 margins not proved" in result.stdout


def test_the_checker_is_one_file_of_500_lines(project):
    text = (project / "boundjax" / "check.py").read_text()
    assert len(text.splitlines()) <= 500
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    outside = [
        line for line in imports if line.split()[1].split(".")[0] not in sys.stdlib_module_names
    ]
    assert outside == ["import numpy as np"]


# --- the page ------------------------------------------------------------------------------------


def rows_of(text, first):
    """The cells of a table whose first column has this title."""
    (body,) = re.findall(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]


def test_the_page_describes_what_the_checker_reads(project):
    text = (project / "docs" / "certificates.md").read_text()
    ops = {row[0].strip("`"): tuple(re.findall(r"`(\w+)`", row[1])) for row in rows_of(text, "op")}
    assert ops == check.OPS
    entries = [name for row in rows_of(text, "entry") for name in re.findall(r"`(\w+)`", row[0])]
    assert set(entries) == set(check.ENTRIES)
    keys = {row[0].strip("`") for row in rows_of(text, "key of `json`")}
    assert keys == check.CLAIMS
    assert {row[0].strip("`") for row in rows_of(text, "witness")} == set(check.WITNESSES)
    assert f"up to {check.TOLERANCE:g} of".replace("-05", "-5") in text


def test_the_code_of_the_page_runs(project, tmp_path, monkeypatch, capsys):
    text = (project / "docs" / "certificates.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    (command,) = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "certificates.md", "exec"), {})
    assert "4 of 4 examples verified within eps 0.05 (linf" in capsys.readouterr().out
    program, arguments = command.split()[:3], command.split()[3:]
    assert program == ["python", "-m", "boundjax.check"]
    for name in ("certificate.npz", "radii.npz"):
        status, lines = run(capsys, name, *arguments[1:])
        assert status == 0, lines


def test_a_certificate_takes_what_the_page_says(saved):
    folder, certificate, _, x = saved
    arrays, _ = contents(folder / "certificate.npz")
    size = sum(a.nbytes for a in arrays.values() if a.ndim)
    assert size == len(x) * (5 + 4 * certificate.margins.shape[1] + 4 * x[0].size)


# --- refused -------------------------------------------------------------------------------------


def test_wrong_claims_are_refused(saved, tmp_path, capsys):
    """Margins that are raised, and an example that is not robust and called verified."""
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
    """Changed certificates or weights: a name, the arrays and claims of both files."""
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
            # A method and versions are words that are printed nowhere and prove nothing.
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
    """Bytes that are flipped or cut off; a few of them say nothing, such as a date."""
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

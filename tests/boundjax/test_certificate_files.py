"""Certificates as files: saved, loaded, and proved again without JAX."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx_models
import pytest
from certificate_files import (
    NETWORKS,
    contents,
    evaluated,
    inputs_of,
    model_of,
    nodes_of,
    rewritten,
    run,
    save_true_certificate,
)
from flax import nnx

import boundjax as bj
from boundjax import check, check_onnx, check_tree
from boundjax.certification import export


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A true certificate: its folder, the certificate itself, the model and the inputs."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, *save_true_certificate(folder)


# --- proved again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "eps", "options"),
    [
        ("mlp", "interval", 0.02, {"clip": (0.0, 1.0)}),
        ("mlp", "crown", 0.05, {}),
        pytest.param("mlp", "fast-lin", 0.05, {}, marks=pytest.mark.slow),
        ("mlp", "crown", 0.2, {"norm": 2, "clip": (0.0, 1.0)}),
        pytest.param("mlp", "crown-ibp", 0.2, {"norm": 1}, marks=pytest.mark.slow),
        pytest.param("cnn", "crown-ibp", 0.03, {}, marks=pytest.mark.slow),
        ("cnn", "crown", 0.03, {"clip": (0.0, 1.0)}),
        pytest.param("cnn", "crown-ibp", 0.3, {"norm": 2}, marks=pytest.mark.slow),
        ("piecewise", "crown", 0.1, {}),
        ("tanh", "crown", 0.1, {}),
        pytest.param("sigmoid", "crown-ibp", 0.1, {}, marks=pytest.mark.slow),
        pytest.param("exp", "crown-ibp", 0.02, {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sampled(3)
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


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_network_is_the_model(name):
    (module, variables), shape = model_of(name)
    x = inputs_of(shape)
    nodes = nodes_of(export.weights_of((module, variables), x).arrays)
    expected = module.apply(variables, x)
    np.testing.assert_allclose(evaluated(nodes, x), expected, rtol=1e-5, atol=1e-5)


def test_the_same_for_programs(saved, tmp_path, capsys):
    """Margins for real arithmetic leave no room for float32 programs, but the slack is small."""
    folder, *_ = saved
    arrays, claims = contents(folder / "certificate.npz")
    claims["arithmetic"] = "float32"
    path = rewritten(tmp_path / "c.npz", arrays, claims)
    status, lines = run(capsys, path, "--weights", folder / "weights.npz")
    assert status == 0, lines
    assert "programs with unit 5.96e-08" in lines[0]
    slack = float(lines[-1].rpartition(" ")[2])
    assert 1e-7 < slack < 1e-4  # what float32 programs need


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


# Models of test_onnx.py that the checker cannot read, one for each operator.
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
        expected = onnx_models.reference(path, x).reshape(2, -1)
        np.testing.assert_allclose(
            evaluated(nodes, x), expected, rtol=1e-5, atol=1e-5, err_msg=name
        )
        read += 1
    assert read >= READ


@pytest.mark.slow
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


def test_several_ties_at_once(tmp_path, capsys):
    """Rounding decides the slope at units with symmetric intervals, so the checker tries both."""
    of_hidden, of_x = np.zeros((2, 4, 2), np.float32)
    of_hidden[:, 0] = 1.0
    # Only slope 1 proves that the first two units contribute at least 0; the last two need slope 0.
    of_x[:2, 0] = -1.0

    def model(x):
        return jax.nn.relu(x) @ of_hidden + x @ of_x + np.float32([[0.05, 0.0]])

    x = np.zeros((1, 4), np.float32)
    bj.export_weights(model, x, tmp_path / "w.npz")
    nodes, _ = check.read_weights(tmp_path / "w.npz")
    threat = bj.Threat(np.float32(0.1))
    sets = *check.sets_of({"eps": np.float32(0.1)}, x), np.inf
    proved = []
    for tie in (0.0, 1e-5, -1e-5, np.array([-1e-5, -1e-5, 1e-5, 1e-5])):
        with np.errstate(all="ignore"):
            walk = check.Bounds(nodes, sets, "crown-ibp", 0.0, tie)
            proved.append(walk.bound(len(nodes) - 1, np.array([[[1.0, -1.0]]])).item())
    assert max(proved[:3]) < 0 < 0.0499 < proved[3]
    margins = np.float32([[0.0, proved[3]]])
    certificate = bj.Certificate(
        np.array([True]), margins, np.zeros(1, np.int32), threat, "crown-ibp"
    )
    certificate.save(tmp_path / "c.npz", tmp_path / "w.npz", x)
    status, lines = run(capsys, tmp_path / "c.npz", "--weights", tmp_path / "w.npz")
    assert status == 0, lines
    assert "1 of 1 examples checked (seed 0), 1 claimed robust" in lines[-1]


def test_examples_without_a_claim_cost_nothing(saved, tmp_path, monkeypatch, capsys):
    """In a cascade the expensive methods claim margins for few of the examples."""
    folder, *_ = saved
    arrays, claims = contents(folder / "certificate.npz")
    rows = np.arange(6) == 2
    arrays["margins"] = np.where(rows[:, None], arrays["margins"], -np.inf).astype(np.float32)
    arrays["verified"] = arrays["verified"] & rows
    sizes, bounds = [], check.Bounds.__init__

    def counted(walk, nodes, sets, *rest):
        sizes.append(len(sets[0]))
        bounds(walk, nodes, sets, *rest)

    monkeypatch.setattr(check.Bounds, "__init__", counted)
    for kept in (arrays, {**arrays, "margins": arrays["margins"][:, :0], "verified": ~rows & rows}):
        path = rewritten(tmp_path / "c.npz", kept, claims)
        status, lines = run(capsys, path, "--weights", folder / "weights.npz")
        assert status == 0, lines
        assert "6 of 6 examples checked" in lines[-1]
    assert sizes == [1]


def test_a_sample_says_so(saved, capsys):
    folder, *_ = saved
    files = [folder / "certificate.npz", "--weights", folder / "weights.npz"]
    status, lines = run(capsys, *files, "--sample", 2, "--seed", 7)
    assert status == 0
    assert "2 of 6 examples checked (seed 7)" in lines[-1]
    # A sample of none is not allowed: at least one example is checked.
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


def tables_of(text, first):
    """The cells of the tables whose first column is called `first`."""
    bodies = re.findall(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]
        for body in bodies
    ]


def rows_of(text, first):
    """The cells of the one table whose first column is called `first`."""
    (rows,) = tables_of(text, first)
    return rows


def test_the_page_describes_what_the_checker_reads(project):
    text = (project / "docs" / "certificates.md").read_text()
    ops = {row[0].strip("`"): tuple(re.findall(r"`(\w+)`", row[1])) for row in rows_of(text, "op")}
    assert ops == check.OPS
    described = [
        {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
        for rows in tables_of(text, "entry")
    ]
    assert described == [set(check.ENTRIES), set(check_tree.ENTRIES)]
    keys = {row[0].strip("`") for row in rows_of(text, "key of `json`")}
    assert keys == check.CLAIMS
    assert {row[0].strip("`") for row in rows_of(text, "witness")} == set(check.WITNESSES)
    assert f"up to {check.TOLERANCE:g} of".replace("-05", "-5") in text


def test_the_code_of_the_page_runs(project, tmp_path, monkeypatch, capsys):
    text = (project / "docs" / "certificates.md").read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))
    (command,) = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    (of_tree,) = re.findall(r"^\$ python -m boundjax.check_tree (.*)$", text, re.M)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "certificates.md", "exec"), {})
    assert check_tree.main(of_tree.split()) == 0
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

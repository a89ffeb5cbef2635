"""The certificate files of evaluations: proved again without JAX, the same after every kill."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

import boundjax as bj
from boundjax import check_attack
from experiments import models
from experiments.evaluation import attack_points, certificates, checkable, trained
from experiments.evaluation.evaluate import (
    Options,
    evaluate_run,
    evaluate_trained,
    print_evaluated,
)
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError

# One worker makes the trained network, once.
pytestmark = pytest.mark.xdist_group("evaluate_certificates")

MODEL = {"hidden": (16,)}
OPTIONS = Options(methods=("interval", "crown-ibp"), count=120, pgd_steps=3, batch_size=50)
NAME = "test-last-l-inf-eps0.03-first120"
FILES = {"weights.npz", "inputs.npz", "interval.npz", "crown-ibp.npz", "pgd.npz"}


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "test_mlp", MODEL)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The folder of a run on digits, and its evaluation, in which PGD breaks some images."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    config = from_config_dict(
        {
            "data": {"name": "digits", "validation": 0},
            "model": {"name": "test_mlp"},
            "train": {"epochs": 4, "batch_size": 128},
            "optim": {"lr": 5e-3},
            "robust": {"method": "ibp", "eps_train": 0.03, "eps_test": 0.03},
            "evaluation": {"methods": ("interval",), "pgd_steps": 0},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", MODEL)
        runs.run(config, workdir, "test")
        result = evaluate_run(workdir, OPTIONS)
    evaluation = result.certificates.evaluation
    assert (evaluation.correct & ~evaluation.resisted).sum() > 2
    assert 0 < evaluation.verified.sum() < 120
    return workdir, result


@pytest.fixture
def workdir(evaluated, tmp_path):
    """A copy of the run, without evaluations."""
    left_out = {"evaluations", "certificates"}
    return shutil.copytree(
        evaluated[0], tmp_path / "run", ignore=lambda _, names: left_out & set(names)
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_jax(project, folder, program, name):
    """What a checker prints about a file, where nothing but NumPy can be imported; its status."""
    hidden = folder.parent / "hidden"
    hidden.mkdir(exist_ok=True)
    for module in ("jax", "flax", "optax", "chex", "onnx", "boundjax", "lazy_loader"):
        (hidden / f"{module}.py").write_text("raise ImportError('hidden by the test')\n")
    files = [folder / name, "--weights", folder / "weights.npz", "--data", folder / "inputs.npz"]
    result = subprocess.run(
        [sys.executable, *map(str, [project / "boundjax" / program, *files])],
        capture_output=True,
        text=True,
        check=False,
        cwd=hidden,
        env={"PYTHONPATH": str(hidden)},
        timeout=120,
    )
    return result.returncode, result.stdout + result.stderr


def test_an_evaluation_is_proved_again_with_numpy_alone(evaluated, project):
    workdir, result = evaluated
    folder = workdir / "certificates" / NAME
    assert set(contents(folder)) == FILES
    for method in ("interval", "crown-ibp"):
        status, printed = without_jax(project, folder, "check.py", f"{method}.npz")
        assert status == 0, printed
        verified = result.certificates.verified_by[method]
        assert f"120 of 120 examples checked (seed 0), {verified.sum()} claimed robust" in printed
        loaded = bj.load_certificate(folder / f"{method}.npz")
        np.testing.assert_array_equal(loaded.verified, verified)
        np.testing.assert_array_equal(loaded.margins, result.certificates.margins_by[method])
        assert loaded.arithmetic == result.certificates.parts[method]["arithmetic"] == "real"
    status, printed = without_jax(project, folder, "check_attack.py", "pgd.npz")
    assert status == 0, printed
    errors = result.certificates.errors()
    assert f"at least {100 * errors['pgd_error']:.2f} %; 0 points do not show" in printed
    wrong = (~result.certificates.correct).sum()
    assert f"({wrong} the input itself)" in printed


def test_the_files_take_what_the_page_says(evaluated, project):
    workdir, result = evaluated
    folder = workdir / "certificates" / NAME
    evaluation = result.certificates.evaluation
    points = (evaluation.correct & ~evaluation.resisted).sum()
    text = " ".join((project / "docs" / "certificates.md").read_text().split())
    assert "5 bytes for each example and 4 bytes for each feature of a point" in text
    with np.load(folder / "pgd.npz") as file:
        size = sum(file[name].nbytes for name in file.files if file[name].ndim and name != "json")
    assert size == 5 * 120 + 4 * 64 * points
    with np.load(folder / "interval.npz") as file:
        size = sum(file[name].nbytes for name in file.files if file[name].ndim and name != "json")
    assert size == 120 * (5 + 4 * 10)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("writes", [1, 4])
def test_what_was_killed_ends_with_the_same_files(evaluated, workdir, monkeypatch, writes):
    """Killed after the first batch of the attack, or among the methods."""
    write, count = certificates.write, iter(range(writes))

    def until(path, record):
        if next(count, None) is None:
            raise _Interrupted
        write(path, record)

    folder = workdir / "certificates" / NAME
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "write", until)
        with pytest.raises(_Interrupted):
            evaluate_run(workdir, OPTIONS)
    assert any(name.startswith("attack-") for name in contents(folder))
    assert "pgd.npz" not in contents(folder)
    result = evaluate_run(workdir, OPTIONS)
    assert result.checkable
    expected = contents(evaluated[0] / "certificates" / NAME)
    assert contents(folder) == expected
    # And once more, when nothing is left to do; and for one method after the other.
    evaluate_run(workdir, OPTIONS)
    assert contents(folder) == expected


def test_methods_that_come_later_add_their_files(evaluated, workdir, capsys):
    folder = workdir / "certificates" / NAME
    evaluate_run(workdir, OPTIONS._replace(methods=("interval",)))
    assert set(contents(folder)) == FILES - {"crown-ibp.npz"}
    evaluate_run(workdir, OPTIONS)
    assert contents(folder) == contents(evaluated[0] / "certificates" / NAME)
    capsys.readouterr()
    result = evaluate_run(workdir, OPTIONS._replace(methods=("best",)))
    printed = capsys.readouterr().out
    assert "best.npz: the checker has no rule for best; it derives the bounds by" in printed
    loaded = bj.load_certificate(folder / "best.npz")
    np.testing.assert_array_equal(loaded.verified, result.certificates.verified_by["best"])
    assert loaded.margins.shape == (120, 0)
    print_evaluated(result)
    assert f"--weights {folder}/weights.npz" in capsys.readouterr().out


def test_a_cascade_claims_nothing_where_it_did_not_run(workdir, project):
    result = evaluate_run(workdir, OPTIONS._replace(cascade=True))
    run = result.certificates.run_by["crown-ibp"]
    assert 0 < run.sum() < 120
    folder = workdir / "certificates" / NAME
    loaded = bj.load_certificate(folder / "crown-ibp.npz")
    np.testing.assert_array_equal((loaded.margins > -np.inf).any(axis=1), run)
    assert not loaded.verified[~run].any()
    status, printed = without_jax(project, folder, "check.py", "crown-ibp.npz")
    assert status == 0, printed


class Soft(nn.Module):
    """A network with an op that the checker does not know."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.softplus(nn.Dense(8)(x.reshape(len(x), -1))))


def test_a_network_that_cannot_be_exported_is_evaluated(evaluated, workdir, capsys):
    run = trained.load(evaluated[0])
    module = Soft()
    variables = module.init(jax.random.key(0), run.test.images[:1])
    run = run._replace(model=module, variables=variables)
    options = OPTIONS._replace(methods=("interval",), count=20)
    result = evaluate_trained(run, workdir, options)
    assert result.certificates.run_by["interval"].all()
    assert not result.checkable
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "no certificate" in row]
    assert line.startswith("no certificate files: the certificate checker does not know the op")
    assert "'softplus'" in line
    print_evaluated(result)
    assert "boundjax.check" not in capsys.readouterr().out


def test_old_evaluations_have_no_points(evaluated, workdir, capsys, project):
    """Files of versions that kept no points are read, and what is missing is said."""
    source, result = evaluated
    (workdir / "evaluations").mkdir()
    shutil.copy(result.path, workdir / "evaluations")
    capsys.readouterr()
    again = evaluate_run(workdir, OPTIONS)
    np.testing.assert_array_equal(again.certificates.correct, result.certificates.correct)
    broken = (result.certificates.correct & ~result.certificates.evaluation.resisted).sum()
    assert f"the points of {broken} of {broken} images that PGD breaks" in capsys.readouterr().out
    folder = workdir / "certificates" / NAME
    status, printed = without_jax(project, folder, "check_attack.py", "pgd.npz")
    assert status == 0, printed
    wrong = (~result.certificates.correct).sum()
    assert f"{wrong} of 120 examples have a misclassified point ({wrong} the input" in printed
    # The files of an evaluation are removed with it.
    (folder / "attack-7.npz").write_bytes(b"")
    again.path.unlink()
    evaluate_run(workdir, OPTIONS)
    assert contents(folder) == contents(source / "certificates" / NAME)


@pytest.mark.parametrize("name", ["attack-0.npz", "pgd.npz"])
def test_damaged_points_are_one_line(workdir, name):
    evaluate_run(workdir, OPTIONS)
    path = workdir / "certificates" / NAME / name
    for content in (b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=rf"{name} .*; delete it to go on") as caught:
            evaluate_run(workdir, OPTIONS)
        assert "\n" not in str(caught.value)
    np.savez(path, index=np.zeros(1, int), points=np.zeros((1, 3), np.float32))
    with pytest.raises(ExperimentError, match=f"{name} .*; delete it to go on"):
        evaluate_run(workdir, OPTIONS)


@pytest.mark.parametrize("norm", [np.inf, 2])
def test_points_are_moved_into_the_exact_set(norm):
    """Projections in float32 end outside of it by an ulp, and no checker would accept them."""
    random = np.random.default_rng(0)
    images = random.uniform(size=(200, 6, 5)).astype(np.float32)
    threat = bj.Threat(0.1 if norm == np.inf else 0.7, norm, (0.0, 1.0))
    far = images + random.normal(size=images.shape).astype(np.float32)
    points = np.asarray(jax.vmap(threat.project)(far, images))
    moved = attack_points.moved_inside(points, images, threat)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, points, atol=1e-6)
    eps = np.full((200, 30), np.float64(np.nextafter(np.float32(threat.eps), np.float32(1))))
    flat = [a.reshape(200, -1).astype(np.float64) for a in (images, moved, points)]
    # The largest float32 below or at eps would do as well: `eps` here is rounded up.
    sets = (flat[0], eps, np.zeros((200, 30)), np.ones((200, 30)))
    assert check_attack.inside(flat[1], sets, norm).all()
    exact = (flat[0], np.full((200, 30), np.float64(np.float32(threat.eps))), *sets[2:])
    assert not check_attack.inside(flat[2], exact, norm).all()
    # Points inside stay where they are.
    inside = images.copy()
    inside[:, 0] = np.clip(inside[:, 0] + np.float32(0.01), 0, 1)
    np.testing.assert_array_equal(attack_points.moved_inside(inside, images, threat), inside)


def test_all_files_of_an_evaluation_that_begins_anew_are_removed(evaluated, tmp_path):
    folder = shutil.copytree(evaluated[0] / "certificates" / NAME, tmp_path / "files")
    (folder / "attack-12.npz").write_bytes(b"")
    (folder / ".attack-3.npz.new").write_bytes(b"half")
    (folder / "notes.txt").write_text("not ours")
    checkable.discard(folder)
    assert set(contents(folder)) == {"notes.txt"}

"""Attack files: the checker confirms the points that they hold and refuses everything else."""

import re
import subprocess
import sys

import numpy as np
import pytest
from certificate_files import contents, evaluated, inputs_of, model_of, nodes_of, rewritten

import boundjax as bj
from boundjax import check_attack
from boundjax.certification import export, files

pytestmark = pytest.mark.quick

EPS = np.float32(0.2)


def run(capsys, folder, name="a.npz", weights="w.npz", data="x.npz"):
    """The exit status and the printed lines of the checker."""
    arguments = [folder / name, "--weights", folder / weights, "--data", folder / data]
    status = check_attack.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines() + printed.err.splitlines()


def attacked(model, x, labels, norm):
    """For each example a misclassified corner or other point of its set, if there is one."""
    nodes = nodes_of(export.weights_of(model, x).arrays)
    random, points = np.random.default_rng(1), {}
    for _ in range(400):
        step = random.choice([-1.0, 1.0], size=x.shape)
        if norm != np.inf:
            step = random.normal(size=x.shape)
            step /= np.linalg.norm(step.reshape(len(x), -1), norm, axis=1)[:, None, None]
        moved = np.clip(x + 0.999 * EPS * step, 0, 1).astype(np.float32)
        wrong = np.argmax(evaluated(nodes, moved), axis=1) != labels
        points |= {k: moved[k] for k in np.flatnonzero(wrong).tolist()}
    return points


@pytest.fixture(scope="module", params=[np.inf, 2, 1])
def saved(request, tmp_path_factory):
    """A folder with a correct attack file, and the labels and points in it."""
    tmp_path = tmp_path_factory.mktemp("saved")
    model, shape = model_of("mlp")
    module, variables = model
    x = inputs_of(shape, count=12)
    labels = np.array(np.argmax(module.apply(variables, x), axis=1), np.int32)
    labels[:2] = (labels[:2] + 1) % 3  # misclassified
    points = attacked(model, x, labels, request.param)
    points = {k: point for k, point in points.items() if k > 1}
    assert 0 < len(points) < 10
    bj.export_weights(model, x, tmp_path / "w.npz")
    np.savez_compressed(tmp_path / "x.npz", x=x)
    threat = bj.Threat(EPS, request.param, (0.0, 1.0))
    files.write_attack(
        tmp_path / "a.npz",
        tmp_path / "w.npz",
        x,
        labels,
        threat,
        method="corners",
        misclassified=np.arange(12) < 2,
        points=points,
    )
    return tmp_path, labels, points


def test_points_are_shown_again(saved, capsys):
    folder, _, points = saved
    status, lines = run(capsys, folder)
    assert status == 0, lines
    (line,) = lines
    count = 2 + len(points)
    assert line.startswith(
        f"{count} of 12 examples have a misclassified point (2 the input itself)"
    )
    assert f"at least {100 * count / 12:.2f} %; 0 points do not show" in line
    stored = files.read_points(folder / "a.npz")
    assert list(stored) == sorted(points)
    for example, point in points.items():
        np.testing.assert_array_equal(stored[example], point)


def test_the_size_is_what_the_page_says(saved):
    folder, _, points = saved
    arrays, _ = contents(folder / "a.npz")
    size = sum(a.nbytes for a in arrays.values() if a.ndim)
    assert size == 5 * 12 + 4 * 8 * len(points)


def test_wrong_points_show_nothing(saved, capsys):
    folder, _, points = saved
    arrays, claims = contents(folder / "a.npz")
    first = min(points)
    with np.load(folder / "x.npz") as file:
        x = file["x"]
    # Points outside the set: four times as far away, and outside the clip range.
    for far in (x[first] + 4 * (points[first] - x[first]), np.full_like(x[first], -0.001)):
        wrong = {**arrays, "points": np.concatenate([far[None], arrays["points"][1:]])}
        rewritten(folder / "wrong.npz", wrong, claims)
        status, lines = run(capsys, folder, "wrong.npz")
        assert status == 1
        assert lines[0] == f"example {first}: its point lies outside of its set"
        assert f"{1 + len(points)} of 12 examples" in lines[1]
    # A point that is not misclassified.
    wrong = {**arrays, "points": np.concatenate([x[first][None], arrays["points"][1:]])}
    rewritten(folder / "wrong.npz", wrong, claims)
    status, lines = run(capsys, folder, "wrong.npz")
    assert status == 1
    assert lines[0] == f"example {first}: its point is not misclassified"
    # An input that the model classifies correctly.
    fine = next(k for k in range(2, 12) if k not in points)
    attack = arrays["attack"].copy()
    attack[fine] = check_attack.ITSELF
    rewritten(folder / "wrong.npz", {**arrays, "attack": attack}, claims)
    status, lines = run(capsys, folder, "wrong.npz")
    assert status == 1
    assert lines[0] == f"example {fine}: its point is not misclassified"
    # A smaller radius than that of the attack.
    rewritten(folder / "wrong.npz", {**arrays, "eps": arrays["eps"] / 2}, claims)
    status, lines = run(capsys, folder, "wrong.npz")
    assert status == 1
    assert sum("outside" in line for line in lines) == len(points)


def test_an_ulp_outside_is_outside():
    """Distances are compared with the radius itself, not with one that is rounded up."""
    x, eps = np.full((2, 3), 0.25), np.full((2, 3), 0.125)
    points = x + 0.125
    points[1, 0] = np.nextafter(points[1, 0], 1)
    sets = (x, eps, np.zeros((2, 3)), np.ones((2, 3)))
    assert check_attack.inside(points, sets, np.inf).tolist() == [True, False]
    eps[:, 1] = 0.0  # a feature that cannot move
    with np.errstate(divide="ignore"):
        assert not check_attack.inside(points, sets, np.inf).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, c: a.pop("points"), "expected the entries points"),
        (lambda a, c: a.update(points=a["points"][:-1]), r"expected \d points"),
        (lambda a, c: a.update(points=a["points"][..., :-1]), "claims of other shapes"),
        (lambda a, c: a.update(points=a["points"] + np.inf), "not finite"),
        (lambda a, c: a.update(attack=a["attack"] + np.int8(1)), "attack 0, 1 or 2"),
        (lambda a, c: a.update(attack=a["attack"][:-1]), "must be .B."),
        (lambda a, c: a.update(labels=a["labels"] - 5), "must be .B."),
        (lambda a, c: a.update(labels=a["labels"] + 3), "claims of other shapes"),
        (lambda a, c: a.update(eps=-a["eps"]), "eps below 0"),
        (lambda a, c: a.pop("clip_low"), "clip needs both ends"),
        (lambda a, c: a.update(x=a["eps"]), "'x': unknown entry"),
        (lambda a, c: c.pop("norm"), "no boundjax-attack of version 1"),
        (lambda a, c: c.update(format="boundjax-certificate"), "no boundjax-attack"),
        (lambda a, c: c.update(norm=3), "unknown norm"),
        (lambda a, c: c.update(network=["weights", "0" * 64]), "another network"),
        (lambda a, c: c.update(inputs="0" * 64), "other inputs"),
    ],
)
def test_other_files_are_refused_with_one_line(saved, capsys, change, message):
    folder, *_ = saved
    arrays, claims = contents(folder / "a.npz")
    change(arrays, claims)
    rewritten(folder / "wrong.npz", arrays, claims)
    status, lines = run(capsys, folder, "wrong.npz")
    assert status == 2, lines
    (line,) = lines
    assert line.startswith("cannot check ")
    assert re.search(message, line), line


def test_what_is_no_file_of_an_attack(saved, capsys):
    folder, *_ = saved
    assert run(capsys, folder, "w.npz")[0] == 2
    assert run(capsys, folder, data="w.npz")[0] == 2
    assert run(capsys, folder, weights="x.npz")[0] == 2
    assert run(capsys, folder, "none.npz")[0] == 2


def test_points_that_do_not_fit_are_not_written(tmp_path):
    model, shape = model_of("mlp")
    x = inputs_of(shape)
    bj.export_weights(model, x, tmp_path / "w.npz")

    def write(misclassified, points):
        files.write_attack(
            tmp_path / "a.npz",
            tmp_path / "w.npz",
            x,
            np.zeros(6, int),
            bj.Threat(0.1),
            method="pgd",
            misclassified=misclassified,
            points=points,
        )

    with pytest.raises(ValueError, match="points must have the shape"):
        write(np.zeros(6, bool), {1: x[1, :1]})
    with pytest.raises(ValueError, match="not misclassified themselves"):
        write(np.arange(6) == 1, {1: x[1]})
    assert not (tmp_path / "a.npz").exists()


def test_the_program_runs_by_its_path_without_jax(saved, tmp_path, project):
    folder, *_ = saved
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("jax", "flax", "optax", "chex", "onnx", "boundjax"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden by the test')\n")
    files_ = [folder / "a.npz", "--weights", folder / "w.npz", "--data", folder / "x.npz"]
    result = subprocess.run(
        [sys.executable, *map(str, [project / "boundjax" / "check_attack.py", *files_])],
        capture_output=True,
        text=True,
        check=False,
        cwd=hidden,
        env={"PYTHONPATH": str(hidden)},
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "0 points do not show" in result.stdout

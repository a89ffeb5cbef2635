"""Evaluations of a random network by attacks: files, keys, how they go on, what they refuse."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from several import start

import boundjax as bj
from boundjax import attacks, stochastic
from experiments import evaluate, models
from experiments.benchmarks import random_networks
from experiments.evaluation import random_evaluate, random_files, trained
from experiments.evaluation.evaluate import Options, evaluate_run
from experiments.evaluation.random_evaluate import RandomOptions, evaluate_random_run
from experiments.evaluation.random_network import Attack, RandomNetwork
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError

# One worker makes the trained network, once.
pytestmark = pytest.mark.xdist_group("random")

RANDOM = {"prior_std": 0.3, "initial_std": 0.05}
# 60 images in batches of 25, the last of which is filled up.
OPTIONS = RandomOptions(radii=(0.05, 0.1), attack_draws=(1, 3), count=60, batch_size=25)
FILE = "test-last-l-inf-eot-first60.npz"
NAMES = [
    f"eot-{kind}-n{draws}-eps{eps}"
    for kind, draws in (("fgsm", 3), ("pgd", 1), ("pgd", 3))
    for eps in (0.05, 0.1)
]


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})


def _config(**random):
    return from_config_dict(
        {
            "data": {"name": "digits", "train": 640},
            "model": {"name": "test_mlp"},
            "train": {"epochs": 20, "batch_size": 64},
            "optim": {"lr": 2e-2},
            "robust": {"method": "adv-train", "eps_train": 0.05, "eps_test": 0.05},
            "adversary": {"steps": 1},
            "random": random,
            "evaluation": {
                **{"pgd_steps": 3, "draws": 4, "attack_draws": (1,), "images": 50},
                "radii": (0.1,),
            },
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its summary."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
        config = _config(**RANDOM)
        return workdir, runs.run(config, workdir, "test")


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it, without evaluations."""
    return shutil.copytree(
        finished[0], tmp_path / "run", ignore=lambda _, names: {"evaluations"} & set(names)
    )


@pytest.fixture(scope="module")
def evaluated(finished):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
        return evaluate_random_run(finished[0], OPTIONS)


def test_a_run_ends_with_attacks_and_certifies_nothing(finished, capsys):
    workdir, summary = finished
    assert (summary["bounds"], summary["test_images"]) == ([], 50)
    ((label, errors),) = summary["results"].items()
    assert label == "last epoch (20)"
    assert set(errors["attack_errors"]) == {
        f"eot-{kind}-n1-eps{eps}" for kind in ("fgsm", "pgd") for eps in (0.05, 0.1)
    }
    assert errors["verified_error"] == 1.0
    assert 0 < errors["standard_error"] < 0.5
    at_radius = [errors["attack_errors"][f"eot-{kind}-n1-eps0.05"] for kind in ("fgsm", "pgd")]
    assert errors["pgd_error"] == max(at_radius)
    assert (workdir / "evaluations" / "summary-last.npz").exists()
    assert runs.run(_config(**RANDOM), workdir, "test") == summary
    printed = capsys.readouterr().out
    assert "empirical defence: nothing is certified" in printed
    assert "EOT-PGD, n = 1" in printed


def test_the_file_holds_everything(finished, evaluated):
    path = finished[0] / "evaluations" / FILE
    assert evaluated.path == path
    with np.load(path, allow_pickle=False) as stored:
        metadata = json.loads(str(stored["metadata"]))
        arrays = {name: array for name, array in stored.items() if name != "metadata"}
    flags = {f"{name}_{what}" for name in NAMES for what in ("run", "resisted")}
    assert set(arrays) == {"labels", "correct", "clean_run", *flags}
    assert all(array.shape == (60,) for array in arrays.values())
    assert metadata["settings"]["prediction_draws"] == 4
    assert metadata["settings"]["pgd_steps"] == 3
    assert set(metadata["parts"]) == {"clean", *NAMES}
    results = random_files.read(path)
    assert results.errors() == evaluated.results.errors()
    errors = results.errors()
    assert list(errors["attack_errors"]) == NAMES
    # More steps and larger radii find more.
    for name, error in errors["attack_errors"].items():
        assert errors["standard_error"] <= error, name
    assert errors["attack_errors"]["eot-pgd-n3-eps0.1"] > errors["standard_error"] + 0.1


def test_an_evaluation_goes_on_where_it_was_stopped(workdir, evaluated, monkeypatch):
    """The same to the bit, and from another order of attacks."""
    write, writes = random_files.write, iter(range(6))

    class _Interrupted(Exception):
        pass

    def until(path, results):
        write(path, results)
        if next(writes, None) is None:
            raise _Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(random_files, "write", until)
        with pytest.raises(_Interrupted):
            evaluate_random_run(workdir, OPTIONS)
    partial = random_files.read(workdir / "evaluations" / FILE)
    assert len(partial.run_by) < len(NAMES)
    evaluate_random_run(workdir, OPTIONS._replace(attack_draws=(3,)))
    again = evaluate_random_run(workdir, OPTIONS).results
    np.testing.assert_array_equal(again.correct, evaluated.results.correct)
    for name in NAMES:
        np.testing.assert_array_equal(again.resisted_by[name], evaluated.results.resisted_by[name])


def test_another_seed_needs_another_file(finished, evaluated):
    assert evaluated.path.exists()
    with pytest.raises(ExperimentError, match=r"differs in seed; give this one another --name"):
        evaluate_random_run(finished[0], OPTIONS._replace(seed=1))


def test_attacks_and_predictions_are_the_library_s(finished):
    """With the same keys, as `boundjax` loops over draws and steps on the device."""
    run = trained.load(finished[0])
    data, threat = run.test.take(slice(20)), bj.Threat(0.1, np.inf, (0.0, 1.0))
    network = RandomNetwork(run.pure, threat, 20)

    def f(x, key):
        return run.pure.apply(run.pure.variables, x, key)

    key = jax.random.key(3)
    probabilities = network.mean_softmax(data.images, list(jax.random.split(key, 4)))
    expected = stochastic.mean_softmax(f, data.images, key, 4)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    descent = attacks.Descent(f, data.images, data.labels, threat, draws=3)
    keys = descent.draw_keys(key, 0, 2)[:2]
    points = network.attacked(data, 0.1, 0.025, [jax.random.split(k, 3) for k in keys])
    expected = attacks.pgd(
        f, data.images, data.labels, 0.1, key=key, clip=(0.0, 1.0), steps=2, draws=3,
        loss="cross_entropy",
    )  # fmt: skip
    np.testing.assert_allclose(points, expected, atol=1e-6)
    other = descent.draw_keys(jax.random.key(4), 0, 2)[:2]
    assert (network.attacked(data, 0.1, 0.025, [k[None] for k in other]) != points).any()
    one_step = Attack("eot-fgsm", 3, 0.1)
    points = network.attacked(data, 0.1, 0.1, one_step.keys(key))
    gradient = attacks.expected_gradient(
        f, data.images, data.labels, key=jax.random.split(key, 1)[0], draws=3
    )
    expected = np.clip(data.images + 0.1 * np.sign(gradient), 0, 1)
    np.testing.assert_allclose(points, expected, atol=1e-6)


@pytest.mark.slow
def test_the_number_of_draws_matters_not_without_noise(tmp_path):
    """Of a network whose draws are all alike, every attack of as many steps finds the same."""
    config = dataclasses.replace(_config(prior_std=0.1, initial_std=1e-9))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
    runs.run(config, tmp_path / "run", "test")
    results = evaluate_random_run(tmp_path / "run", OPTIONS).results
    one, three = (results.resisted_by[f"eot-pgd-n{draws}-eps0.1"] for draws in (1, 3))
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods=interval"], "--methods is not for a random network: fresh draws for every"),
        (["--cascade"], "--cascade is not for a random network"),
        (["--rounding=real"], "--rounding is not for a random network"),
        (["--pgd-restarts=2"], "--pgd-restarts is not for a random network"),
        (["--attack-draws=5,x"], "--attack-draws must be numbers like 5,20, got '5,x'"),
        (["--attack-draws=0"], "--attack-draws must be >= 1, got 0"),
        (["--draws=0"], "--draws must be >= 1, got 0"),
        (["--eps=0.1,8"], "--eps must be in [0, 0.5)"),
        (["--split=validation"], "has no validation images"),
        (["--norm=2"], "--norm=2 needs --eps"),
    ],
)
def test_mistakes_are_one_line(finished, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        evaluate.main([f"--workdir={finished[0]}", *flags])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_certificates_of_fresh_draws_are_refused(finished):
    with pytest.raises(ExperimentError, match=r"fresh draws for every query cannot be certified"):
        evaluate_run(finished[0], Options())


def test_the_command_prints_that_the_defence_is_empirical(finished, evaluated, capsys):
    evaluate.main(
        [
            *(f"--workdir={finished[0]}", "--eps=0.05,0.1", "--attack-draws=1,3"),
            *("--count=60", "--batch-size=25"),
        ]
    )
    printed = capsys.readouterr().out
    assert random_evaluate.WARNING in printed
    error = evaluated.results.errors()["attack_errors"]["eot-pgd-n3-eps0.1"]
    (line,) = (line for line in printed.splitlines() if line.startswith("EOT-PGD, n = 3"))
    assert line.split()[-2] == f"{100 * error:.2f}"


PROCESS = """
import sys
from experiments import evaluate, models
models.MODELS["test_mlp"] = {"hidden": (16,)}
evaluate.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_several_processes_find_the_same(workdir, evaluated):
    flags = ["--eps=0.05,0.1", "--attack-draws=1,3", "--count=60", "--batch-size=25"]
    ended = start([["-c", PROCESS, f"--workdir={workdir}", *flags]] * 2)
    assert [process.status for process in ended] == [0, 0], ended
    results = random_files.read(workdir / "evaluations" / FILE)
    np.testing.assert_array_equal(results.correct, evaluated.results.correct)
    for name in NAMES:
        np.testing.assert_array_equal(
            results.resisted_by[name], evaluated.results.resisted_by[name]
        )


# ------------------------------------------------------------------------------ damaged files


def _changed(path, target, **arrays):
    with np.load(path, allow_pickle=False) as stored:
        np.savez(target, **({**stored} | arrays))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eot-pgd-n1-eps0.05_resisted", np.ones(60, bool), "is True of an example that is miscla"),
        ("correct", np.ones(59, bool), r"correct must be bool \[60\], got bool \[59\]"),
        ("labels", np.zeros(60), r"labels must be int \[60\], got float64 \[60\]"),
        ("pgd_run", np.ones(60, bool), "expected an attack like eot-pgd-n20-eps0.3, got 'pgd'"),
        ("more", np.ones(60, bool), "array 'more' is unknown"),
        ("metadata", np.array("{}"), "format is missing"),
    ],
)
def test_damaged_files_are_refused(evaluated, tmp_path, name, value, message):
    _changed(evaluated.path, tmp_path / "file.npz", **{name: value})
    with pytest.raises(ExperimentError, match=message) as caught:
        random_files.read(tmp_path / "file.npz")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ measures


@pytest.mark.slow
def test_measures_of_a_run_are_printed(finished, capsys):
    random_networks.main(
        [*[str(finished[0])] * 2, "--eps=0.1", "--count=30", "--draws=6", "--transfer=3"]
    )
    printed = capsys.readouterr().out
    assert printed.count("rho ") == 2
    assert "(1.00 of the first)" in printed
    run = trained.load(finished[0])
    network = RandomNetwork(run.pure, bj.Threat(0.1, np.inf, (0.0, 1.0)), 20)
    data = run.test.take(slice(30))
    measured = random_networks.measure(network, data, 0.1, jax.random.key(0), 6, 3)
    keys = list(jax.random.split(jax.random.split(jax.random.key(0))[0], 6))
    # Recomputed from the gradients of each image, in NumPy.
    gradients = np.concatenate(
        [network.gradients(data.take(s), keys) for s in (slice(20), slice(20, 30))], axis=1
    ).reshape(6, 30, -1)
    lengths = np.linalg.norm(gradients, axis=-1, keepdims=True)
    kept = (lengths > 1e-12).all(axis=(0, 2))
    assert measured.images == kept.sum() > 20
    units = gradients[:, kept] / lengths[:, kept]
    rho = np.linalg.norm(units.mean(axis=0), axis=-1)
    assert measured.rho == pytest.approx(rho.mean(), rel=1e-4)
    assert measured.mean == pytest.approx(((6 * rho**2 - 1) / 5).mean(), abs=1e-4)
    assert measured.transfer.shape == (3, 3)
    assert np.diag(measured.transfer).mean() <= measured.off_diagonal.mean()
    assert f"{measured.rho:.4f}" in printed


def test_only_random_runs_have_measures(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        random_networks.main([str(tmp_path)])
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        random_networks.main([str(finished[0]), "--draws=1"])
    assert "--draws must be >= 2, got 1" in capsys.readouterr().err

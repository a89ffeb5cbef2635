"""Whole runs, as small as they get: what they write, how they resume, how they fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import boundjax as bj
from experiments import models
from experiments.data import Images
from experiments.evaluation import certificates, measure, trained
from experiments.evaluation.certificates import Evaluation, check_consistency
from experiments.evaluation.evaluate import parameters_sha256
from experiments.evaluation.network import Problem
from experiments.records.printing import Report, table_rows
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError
from experiments.train import prepare
from experiments.train.feed import batch_indices

NETWORKS = {
    "test_mlp": {"hidden": (16,)},
    "test_bn": {"convolutions": (models.Convolution(4, 4, 2, 1),), "batch_norm": True},
}


# The finished run is made once.
one_worker = pytest.mark.xdist_group("finished")


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    for name, fields in NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, fields)


def _config(model="test_mlp", method="ibp", validation=144, seed=0, **groups):
    settings = {
        "seed": seed,
        "data": {"name": "digits", "validation": validation},
        "model": {"name": model},
        "train": {"epochs": 4, "batch_size": 128},
        "optim": {"lr": 5e-3, "milestones": (3.0,), "clip_norm": 10.0},
        "robust": {
            "method": method,
            "eps_train": 0.03,
            "eps_test": 0.02,
            "warmup_epochs": 1.0,
            "ramp_epochs": 2.0,
            "kappa": (1.0, 0.5),
        },
        "evaluation": {"pgd_steps": 3, "batch_size": 200, "every": 2},
        "checkpoint": {"every": 7},
    }
    for group, values in groups.items():
        settings[group] = settings.get(group, {}) | values
    return from_config_dict(settings)


def _records(workdir):
    """The records without what is different in every run."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record.pop("seconds") > 0
    return records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """With batch normalisation, all phases of CROWN-IBP: (config, workdir, summary)."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    config = _config("test_bn", "crown-ibp")
    with pytest.MonkeyPatch.context() as patch:
        for name, fields in NETWORKS.items():
            patch.setitem(models.MODELS, name, fields)
        return config, workdir, runs.run(config, workdir, "test")


@one_worker
def test_the_network_of_a_run_can_be_read_again(finished):
    config, workdir, summary = finished
    result = trained.load(workdir)
    assert parameters_sha256(result.variables) == summary["parameters_sha256"]
    assert result.config == config
    logits = result.model.apply(result.variables, result.test.images)
    wrong = float(np.mean(np.argmax(logits, axis=-1) != result.test.labels))
    (last,) = (v for k, v in summary["results"].items() if k.startswith("last"))
    np.testing.assert_allclose(wrong, last["standard_error"], atol=1e-6)


@one_worker
def test_a_folder_without_a_run_is_refused(tmp_path, finished):
    with pytest.raises(ExperimentError, match="holds no run"):
        trained.load(tmp_path)
    shutil.copy(finished[1] / "config.json", tmp_path)
    with pytest.raises(ExperimentError, match="has no checkpoint yet"):
        trained.load(tmp_path)


@one_worker
def test_a_run_leaves_its_results(finished):
    config, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()
    assert 5_000 < (workdir / "curves.png").stat().st_size < 200_000
    records = _records(workdir)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["step"] for record in records] == [10, 20, 30, 40]
    assert ["validation_verified_error" in record for record in records] == [False, True] * 2
    assert [record["beta"] for record in records][::3] == [1.0, 0.0]
    assert records[0]["eps"] == 0.0
    assert records[-1]["loss"] < records[0]["loss"]
    for key in ("eps_test", "clip", "bounds", "attack", "device", "versions", "train_seconds"):
        assert summary[key]
    assert summary["train_images"] == 1293


@one_worker
def test_errors_are_ordered(finished):
    _, _, summary = finished
    assert [name.split(" ")[0] for name in summary["results"]] == ["selected", "last"]
    for errors in summary["results"].values():
        assert 0 < errors["standard_error"] < 0.5
        assert errors["standard_error"] <= errors["pgd_error"] <= errors["verified_error"] <= 1
        assert errors["verified_error"] <= min(errors["verified_error_by"].values())


@one_worker
def test_selection_is_by_validation(finished):
    _, workdir, summary = finished
    scores = {
        record["epoch"]: (record["validation_verified_error"], record["validation_standard_error"])
        for record in _records(workdir)
        if "validation_verified_error" in record
    }
    selected = next(name for name in summary["results"] if name.startswith("selected"))
    epoch = int(selected.split("(")[1].rstrip(")"))
    assert scores[epoch] == min(scores.values())


@one_worker
def test_a_finished_run_repeats_its_summary(finished, capsys):
    config, workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert runs.run(config, workdir, "test") == summary
    printed = capsys.readouterr().out
    assert "holds a finished run" in printed
    assert "verified" in printed
    assert "360 test images of UCI digits, l-inf eps 0.02, clipped" in printed
    assert f"run folder: {workdir}" in printed
    assert (workdir / "metrics.jsonl").read_bytes() == before


@one_worker
def test_another_config_is_refused(finished, tmp_path):
    _, workdir, _ = finished
    other = _config("test_bn", "crown-ibp", seed=1, optim={"lr": 1e-4})
    with pytest.raises(ExperimentError, match=r"another config, which differs in optim\.lr, seed;"):
        runs.run(other, workdir, "test")
    # Even when only the checkpoints are left.
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ExperimentError, match=r"another config, which differs in optim\.lr, seed;"):
        runs.run(other, tmp_path, "test")


@one_worker
def test_data_may_move(finished):
    config, workdir, summary = finished
    moved = _config("test_bn", "crown-ibp", data=config.to_dict()["data"] | {"dir": "elsewhere"})
    assert runs.run(moved, workdir, "test") == summary


def test_without_validation_all_images_are_trained_on(tmp_path):
    config = _config(
        validation=0, method="natural", evaluation={"methods": ("interval",)}, train={"epochs": 4}
    )
    summary = runs.run(config, tmp_path / "run", "test")
    assert summary["train_images"] == 1437
    assert summary["selection"].startswith("none")
    assert list(summary["results"]) == ["last epoch (4)"]


class _Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run through all phases of IBP: (config, workdir, summary)."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    config = _config(evaluation={"methods": ("interval",)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", NETWORKS["test_mlp"])
        return config, workdir, runs.run(config, workdir, "test")


def _run_until(config, workdir, monkeypatch, stop):
    update = Report.update

    def interrupt(self, step):
        if step == stop:
            raise _Interrupted
        update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "update", interrupt)
        with pytest.raises(_Interrupted):
            runs.run(config, workdir, "test")


def test_an_interrupted_run_ends_bit_identically(uninterrupted, tmp_path, monkeypatch):
    config, whole_workdir, whole = uninterrupted
    # Before the first checkpoint, in the middle of an epoch, right after a checkpoint and an epoch.
    for stop in (4, 16, 35):
        _run_until(config, tmp_path, monkeypatch, stop)
    # A kill in the middle of a write leaves half a line.
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3')
    parts = runs.run(config, tmp_path, "test")
    assert parts["parameters_sha256"] == whole["parameters_sha256"]
    assert parts["results"] == whole["results"]
    assert _records(tmp_path) == _records(whole_workdir)


def test_damaged_checkpoints_are_one_line_errors(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    for file in (tmp_path / "checkpoints" / "40" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(
        ExperimentError, match=r"40 cannot be restored .* delete that folder"
    ) as caught:
        runs.run(config, tmp_path, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"train": {"epochs": 4, "batch_size": 5000}},
            r"at most the 1293 training images, got 5000",
        ),
        ({"train": {"epochs": 4, "batch_size": 33}}, r"multiple of the 2 devices, got 33"),
        ({"evaluation": {"methods": ("ibp",)}}, r"unknown method 'ibp': use interval, crown-ibp"),
        ({"model": "resnet"}, r"unknown model 'resnet'"),
        (
            {"method": "mixup"},
            r"unknown robust\.method 'mixup': use one of adv-bnn, adv-train, bcp, cap, ",
        ),
        ({"data": {"name": "cifar"}}, r"unknown data\.name 'cifar'"),
    ],
)
def test_impossible_runs_fail_before_they_leave_anything(tmp_path, groups, message):
    with pytest.raises(ExperimentError, match=message):
        runs.run(_config(**groups), tmp_path / "run", "test")
    assert not (tmp_path / "run").exists()


def test_divergence_stops_at_its_step_and_keeps_what_was_before(tmp_path):
    diverging = _config(optim={"lr": 1e37, "clip_norm": 0.0})
    message = (
        r"diverged at step \d \(epoch 1, loss .*, norm of the network (inf|nan)\); .* keeps a "
        r"checkpoint from before; lower config\.optim\.lr"
    )
    with pytest.raises(ExperimentError, match=message):
        runs.run(diverging, tmp_path, "test")
    result = trained.load(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.variables))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4, 40])  # the first, one on the way, the last
def test_a_finite_loss_does_not_hide_what_became_of_the_network(at, tmp_path, monkeypatch):
    def sabotaged(config, steps_per_epoch):
        return optax.chain(
            optimizer(config, steps_per_epoch),
            _nan_at(at),
        )

    optimizer = prepare.create_optimizer
    monkeypatch.setattr(prepare, "create_optimizer", sabotaged)
    monkeypatch.setattr(trained, "create_optimizer", sabotaged)
    config = _config(optim={"lr": 1e-3}, checkpoint={"every": 3})
    before = "it was the first step" if at == 1 else r"the step before had .*loss \d.*, norm \d"
    message = rf"diverged at step {at} .*loss \d.*, norm of the network nan\); {before}"
    for again in (message, rf"diverged at step {at} "):  # what is written is from before
        with pytest.raises(ExperimentError, match=again):
            runs.run(config, tmp_path, "test")
    result = trained.load(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.variables))
    assert result.label == f"step {(at - 1) // 3 * 3} of 40"
    assert not (tmp_path / "summary.json").exists()


def _nan_at(step):
    def update(updates, count, params=None):
        bad = jnp.where(count + 1 == step, jnp.nan, 0.0)
        return jax.tree.map(lambda u: u + bad, updates), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def test_an_unusable_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match=r"cannot create it"):
        runs.run(_config(), tmp_path / "file" / "run", "test")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExperimentError, match=r"config\.json cannot be read"):
        runs.run(_config(), tmp_path, "test")


def test_batches_cover_an_epoch_and_depend_on_the_step_alone():
    batches = [batch_indices(0, step, 103, 10) for step in range(20)]
    first, second = np.concatenate(batches[:10]), np.concatenate(batches[10:])
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 100
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(batch_indices(0, 13, 103, 10), batches[13])
    assert batch_indices(1, 13, 103, 10).tolist() != batches[13].tolist()


def test_the_hash_sees_every_bit():
    tree = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}
    one = parameters_sha256(tree)
    assert one == parameters_sha256({"b": tree["b"].copy(), "a": tree["a"].copy()})
    assert one != parameters_sha256(tree | {"a": np.array([0, -0.0, 0], np.float32)})
    assert one != parameters_sha256(tree | {"b": np.ones(4, np.float32)})


def test_inconsistent_evaluations_are_errors():
    yes, no = np.array([True, True]), np.array([True, False])
    check_consistency(Evaluation(correct=yes, resisted=no, verified_by={"interval": no}))
    with pytest.raises(RuntimeError, match=r"example 1 \(1 in all\) is verified by crown but PGD"):
        check_consistency(Evaluation(yes, no, {"interval": no, "crown": yes}))
    with pytest.raises(RuntimeError, match=r"example 1 .* verified by interval but misclassified"):
        check_consistency(Evaluation(no, no, {"interval": yes}))
    with pytest.raises(RuntimeError, match=r"example 1 .* resists PGD but is misclassified"):
        check_consistency(Evaluation(no, yes, {"interval": no}))


def _measured(problem, config):
    result = certificates.empty(problem.data.labels, (config.pgd_loss,), settings={})
    measure.complete(result, problem, config)
    return result.evaluation


def test_nan_weights_verify_nothing():
    model = models.create("test_mlp")
    images = Images(np.zeros((3, 8, 8, 1), np.float32), np.arange(3, dtype=np.int32))
    variables = model.init(jax.random.key(0), images.images)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables)
    config = _config().evaluation
    problem = Problem(bj.PureModel.of((model, broken)), images, bj.Threat(0.1))
    errors = _measured(problem, config).errors()
    assert errors["standard_error"] == errors["pgd_error"] == errors["verified_error"] == 1.0
    with pytest.raises(ExperimentError, match=r"there are no images to evaluate on"):
        _measured(problem._replace(data=images.take(slice(0))), config)


@one_worker
def test_errors_are_measured_in_the_norm_of_the_run(finished):
    result = trained.load(finished[1])
    config = _config(evaluation={"methods": ("crown-ibp",), "pgd_steps": 10}).evaluation
    images = result.test.take(slice(100))
    of = {
        norm: _measured(Problem(result.pure, images, bj.Threat(0.15, norm, (0.0, 1.0))), config)
        for norm in (2.0, np.inf)
    }
    # The l2 ball lies inside the box of the same radius.
    assert of[2.0].verified.sum() > of[np.inf].verified.sum()
    assert np.all(of[2.0].verified | ~of[np.inf].verified)
    assert of[2.0].resisted.sum() > of[np.inf].resisted.sum()


@one_worker
def test_a_run_that_is_older_than_a_key_goes_on(finished, tmp_path):
    config, workdir, summary = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    old = config.to_dict()
    del old["robust"]["norm"], old["augment"], old["model"]["init"], old["relaxation"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert runs.run(config, tmp_path, "test") == summary
    assert trained.load(tmp_path).config == config
    other = _config("test_bn", "crown-ibp", robust=config.to_dict()["robust"] | {"norm": "2"})
    with pytest.raises(ExperimentError, match=r"another config, which differs in robust\.norm;"):
        runs.run(other, tmp_path, "test")


def test_the_union_of_the_bounds_is_reported():
    flags = {"interval": np.array([True, False, False]), "crown": np.array([False, True, False])}
    errors = Evaluation(np.ones(3, bool), np.ones(3, bool), flags).errors()
    assert errors["verified_error"] == pytest.approx(1 / 3)
    header, rows = table_rows({"last epoch": errors})
    assert list(header) == ["model", "standard", "PGD", "verified", "by interval", "by crown"]
    assert rows == [["last epoch", "0.00 %", "0.00 %", "33.33 %", "66.67 %", "66.67 %"]]


def test_images_are_random_access():
    images = Images(
        np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1), np.arange(6, dtype=np.int32)
    )
    assert images.take(np.array([4, 2])).labels.tolist() == [4, 2]
    assert len(images.take(slice(1, 3))) == 2


# --------------------------------------------------------------------------- the command line


def _command(project, workdir, *settings, config="digits_crown.py"):
    arguments = [sys.executable, "-m", "experiments.main"]
    arguments += [f"--config=experiments/configs/{config}", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*arguments, *(f"--config.{setting}" for setting in settings)],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_kill_minus_nine_and_the_same_command_again(project, tmp_path):
    settings = (
        "robust.method=ibp",
        "model.name=mlp_2x100",
        "train.epochs=6",
        "robust.ramp_epochs=3",
        "optim.milestones=(5,)",
        "checkpoint.every=2",
        "evaluation.pgd_steps=2",
        "evaluation.methods=('interval',)",
        "evaluation.every=3",
    )
    whole = _command(project, tmp_path / "whole", *settings)
    killed = _command(project, tmp_path / "killed", *settings)
    while killed.poll() is None and not list((tmp_path / "killed").glob("checkpoints/[0-9]*[0-9]")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = _command(project, tmp_path / "killed", *settings)
    for process in (whole, resumed):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "resumed after step" in output
    one, other = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")
    )
    assert one["parameters_sha256"] == other["parameters_sha256"]
    assert one["results"] == other["results"]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("digits_crown.py", ["optim.lrr=1"], "unknown config key 'lrr': did you mean 'lr'?"),
        ("digits_crown.py", ["optm.lr=1"], "unknown config key 'optm': did you mean 'optim'?"),
        ("digits_crown.py", ["optim.lr=fast"], "could not convert string to float: 'fast'"),
        (
            "digits_crown.py",
            ["robust.eps_test=-1"],
            "config.robust.eps_test must be >= 0, got -1.0",
        ),
        ("digits_crown.py:gpu", [], "unknown argument 'gpu': this config has cpu"),
        ("absent.py", [], "absent.py: no such file"),
        ("mnist_ibp.py:cpu", ["data.dir=absent"], "--config.data.dir=absent: no such folder"),
    ],
)
def test_command_line_mistakes_are_one_line(project, tmp_path, config, settings, message):
    process = _command(project, tmp_path / "run", *settings, config=config)
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "run").exists()

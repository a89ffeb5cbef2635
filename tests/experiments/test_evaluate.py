"""Evaluations of a trained network: what the file says, how they go on, what they refuse."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import boundjax as bj
from experiments import models
from experiments.evaluate import main
from experiments.evaluation import certificates, measure, trained
from experiments.evaluation.evaluate import (
    LOSSES,
    Options,
    evaluate_run,
    parameters_sha256,
    print_evaluated,
)
from experiments.evaluation.network import Problem
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ContradictionError, ExperimentError

# One worker makes the trained network, once.
pytestmark = pytest.mark.xdist_group("evaluated")

# 130 images in batches of 50 (the last one is filled up), and certified in three calls of 44.
OPTIONS = Options(methods=("crown-ibp", "interval"), count=130, pgd_steps=3, batch_size=50)
FILE = "test-last-l-inf-eps0.03-first130.npz"


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    config = from_config_dict(
        {
            "data": {"name": "digits", "validation": 144},
            "model": {"name": "test_mlp"},
            "train": {"epochs": 3, "batch_size": 128},
            "optim": {"lr": 5e-3},
            "robust": {"method": "ibp", "eps_train": 0.03, "eps_test": 0.03},
            "evaluation": {"methods": ("interval",), "pgd_steps": 3, "every": 2},
            "checkpoint": {"every": 30},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
        runs.run(config, workdir, "test")
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it, without evaluations."""
    return shutil.copytree(
        finished, tmp_path / "run", ignore=lambda _, names: {"evaluations"} & set(names)
    )


@pytest.fixture(scope="module")
def evaluated(finished):
    """Its evaluation by two methods."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
        return evaluate_run(finished, OPTIONS)


class _Interrupted(Exception):
    pass


def _interrupt(monkeypatch, workdir, options, writes):
    """Evaluates until so many batches have been written."""
    write = certificates.write
    count = iter(range(writes))

    def until(path, record):
        write(path, record)
        if next(count, None) is None:
            raise _Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "write", until)
        with pytest.raises(_Interrupted):
            evaluate_run(workdir, options)


def _calls(monkeypatch):
    """Which method is called on how many examples, as a list that grows."""
    calls = []
    certify = bj.certify

    def recorded(model, x, eps, **options):
        calls.append((options["method"], len(x)))
        return certify(model, x, eps, **options)

    monkeypatch.setattr(bj, "certify", recorded)
    return calls


def _assert_same(one, other):
    flat = [jax.tree_util.tree_leaves_with_path(e._replace(metadata={})) for e in (one, other)]
    assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
    for (_, left), (_, right) in zip(*flat, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_file_holds_everything(finished, evaluated):
    path = finished / "evaluations" / FILE
    assert evaluated.path == path
    with np.load(path, allow_pickle=False) as stored:
        assert {name: (str(array.dtype), array.shape) for name, array in stored.items()} == {
            "metadata": (str(stored["metadata"].dtype), ()),
            "index": ("int64", (130,)),
            "labels": ("int32", (130,)),
            "attacked": ("bool", (130,)),
            "correct": ("bool", (130,)),
            "resisted_cross_entropy": ("bool", (130,)),
            "resisted_margin": ("bool", (130,)),
            **{
                f"{method}_{what}": value
                for method in ("interval", "crown-ibp")
                for what, value in {
                    "run": ("bool", (130,)),
                    "verified": ("bool", (130,)),
                    "margins": ("float32", (130, 10)),
                }.items()
            },
        }
        metadata = json.loads(str(stored["metadata"]))
    settings = metadata["settings"]
    run = trained.load(finished)
    assert settings["parameters_sha256"] == parameters_sha256(run.variables)
    assert (settings["eps"], settings["norm"], settings["clip"]) == (0.03, "inf", [0.0, 1.0])
    assert settings["attack"]["losses"] == list(LOSSES)
    assert (settings["attack"]["steps"], settings["attack"]["restarts"]) == (3, 2)
    assert settings["which"] == "last epoch (3)"
    assert set(metadata["parts"]) == {"attack", "interval", "crown-ibp"}
    assert metadata["parts"]["interval"]["arithmetic"] == "real"
    assert metadata["parts"]["attack"]["versions"]["jax"] == jax.__version__
    np.testing.assert_array_equal(evaluated.certificates.labels, run.test.labels[:130])


def test_errors_are_recomputed_from_the_file(finished, evaluated):
    record = certificates.read(evaluated.path)
    _assert_same(record, evaluated.certificates)
    errors = record.errors()
    assert errors == evaluated.certificates.errors()
    certificates.check_consistency(record.evaluation)
    run = trained.load(finished)
    images, labels = run.test.take(slice(130))
    wrong = np.argmax(run.model.apply(run.variables, images), axis=-1) != labels
    assert errors["standard_error"] == pytest.approx(np.mean(wrong))
    margins = np.where(
        np.arange(10)[None] == labels[:, None], np.inf, record.margins_by["crown-ibp"]
    )
    by = errors["verified_error_by"]
    assert list(by) == ["interval", "crown-ibp"]  # the cheapest first
    assert by["crown-ibp"] == pytest.approx(np.mean(margins.min(axis=-1) <= 0))
    assert errors["verified_error"] <= min(by.values())
    assert 0 < errors["standard_error"] < errors["pgd_error"] <= errors["verified_error"] < 1
    both = record.resisted_by["margin"] & record.resisted_by["cross_entropy"]
    assert errors["pgd_error"] == pytest.approx(np.mean(~both))


def test_the_parts_alone_find_the_same(finished, evaluated):
    run = trained.load(finished)
    config = dataclasses.replace(
        run.config.evaluation, methods=OPTIONS.methods, batch_size=50, pgd_loss="cross_entropy"
    )
    problem = Problem(run.pure, run.test.take(slice(130)), bj.Threat(0.03, np.inf, (0.0, 1.0)))
    record = certificates.empty(problem.data.labels, ("cross_entropy",), settings={})
    measure.complete(record, problem, config)
    np.testing.assert_array_equal(record.correct, evaluated.certificates.correct)
    np.testing.assert_array_equal(
        record.resisted_by["cross_entropy"], evaluated.certificates.resisted_by["cross_entropy"]
    )
    assert set(record.verified_by) == set(OPTIONS.methods)
    for name, flags in record.verified_by.items():
        np.testing.assert_array_equal(flags, evaluated.certificates.verified_by[name])


def test_an_interrupted_evaluation_goes_on(workdir, evaluated, monkeypatch):
    path = workdir / "evaluations" / FILE
    correct = evaluated.certificates.correct.sum()
    batches = -(-correct // 50)  # what is misclassified is not attacked
    assert batches > 1
    _interrupt(monkeypatch, workdir, OPTIONS, writes=0)  # one attacked batch
    attacked = 130 - correct + 50
    with pytest.raises(ExperimentError, match=rf"only {attacked} of 130 images are evaluated"):
        certificates.read(path).errors()
    _interrupt(monkeypatch, workdir, OPTIONS, writes=batches)  # two of three batches by intervals
    calls = _calls(monkeypatch)
    record = evaluate_run(workdir, OPTIONS).certificates
    assert calls == [("interval", 42)] + [("crown-ibp", 44)] * 3
    _assert_same(record, evaluated.certificates)
    assert [file.name for file in path.parent.iterdir()] == [FILE]
    calls.clear()
    evaluate_run(workdir, OPTIONS)
    assert calls == []


def test_what_other_packages_began_is_done_again(workdir, evaluated, monkeypatch):
    batches = -(-evaluated.certificates.correct.sum() // 50)
    _interrupt(monkeypatch, workdir, OPTIONS, writes=batches + 1)
    path = workdir / "evaluations" / FILE
    record = certificates.read(path)
    assert record.run_by["interval"].sum() == 88
    for part in record.parts.values():
        part["versions"]["jax"] = "0.0.1"
    certificates.write(path, record)
    calls = _calls(monkeypatch)
    record = evaluate_run(workdir, OPTIONS).certificates
    assert calls == [("interval", 44)] * 3 + [("crown-ibp", 44)] * 3
    assert record.parts["attack"]["versions"]["jax"] == "0.0.1"  # was done
    assert record.parts["interval"]["versions"]["jax"] == jax.__version__
    _assert_same(record, evaluated.certificates)


def test_a_further_method_is_the_only_one_run(workdir, evaluated, monkeypatch, capsys):
    path = workdir / "evaluations" / FILE
    path.parent.mkdir()
    shutil.copy(evaluated.path, path)
    calls = _calls(monkeypatch)
    record = evaluate_run(workdir, OPTIONS._replace(methods=("one-step",)))
    assert {name for name, _ in calls} == {"one-step"}
    print_evaluated(record)
    printed = capsys.readouterr().out
    errors = record.certificates.errors()
    assert list(errors["verified_error_by"]) == ["interval", "crown-ibp", "one-step"]
    assert "by one-step" in printed
    assert f"{100 * errors['verified_error']:.2f} %" in printed
    assert "certificates hold for real arithmetic, computed in float32" in printed
    assert f"file: {path}" in printed


def test_a_cascade_runs_on_what_is_open(workdir, evaluated, monkeypatch):
    calls = _calls(monkeypatch)
    record = evaluate_run(workdir, OPTIONS._replace(cascade=True)).certificates
    whole = evaluated.certificates
    resisted = whole.evaluation.resisted
    open_ = resisted & ~whole.verified_by["interval"]
    assert 0 < open_.sum() <= 50
    np.testing.assert_array_equal(record.run_by["crown-ibp"], open_)
    assert np.isnan(record.margins_by["crown-ibp"][~open_]).all()
    assert calls == [("interval", 44)] * 3 + [("crown-ibp", open_.sum())]
    np.testing.assert_array_equal(record.evaluation.verified, whole.evaluation.verified)
    by = record.errors()["verified_error_by"]
    assert by == {"crown-ibp": None, "interval": whole.errors()["verified_error_by"]["interval"]}
    # Without the cascade, the rest follows.
    _assert_same(evaluate_run(workdir, OPTIONS).certificates, whole)


def test_other_weights_and_settings_are_refused(workdir, evaluated):
    path = workdir / "evaluations" / FILE
    path.parent.mkdir()
    shutil.copy(evaluated.path, path)
    record = certificates.read(path)
    record.metadata["settings"]["parameters_sha256"] = "0" * 64
    certificates.write(path, record)
    for options, keys in (
        (OPTIONS, "parameters_sha256"),
        (OPTIONS._replace(pgd_steps=4), r"attack\.steps, parameters_sha256"),
    ):
        with pytest.raises(ExperimentError, match=f"which differs in {keys}; give") as caught:
            evaluate_run(workdir, options)
        assert "\n" not in str(caught.value)
    named = evaluate_run(workdir, OPTIONS._replace(name="again", methods=("interval",)))
    assert named.path.name == "again.npz"


def test_other_settings_never_pass_as_the_same(workdir, evaluated):
    """Every setting that is right by itself, but not the one that is asked for, is named."""
    path = workdir / "evaluations" / FILE
    path.parent.mkdir()
    for key, value in {
        "images_sha256": "0" * 64,
        "data": "UCI digits ",
        "split": "validation",
        "which": "last epoch (4)",
        "eps": 0.030000000000000002,
        "norm": "2",
        "clip": None,
        "attack.name": "PGD",
        "attack.step_size": "eps / 5",
        "attack.restarts": 1,
        "attack.batch_size": 51,
        "attack.seed": 1,
    }.items():
        record = certificates.read(evaluated.path)
        group = record.metadata["settings"]
        (group["attack"] if "." in key else group)[key.rpartition(".")[2]] = value
        certificates.write(path, record)
        with pytest.raises(ExperimentError, match=f"which differs in {key}; give"):
            evaluate_run(workdir, OPTIONS)


def test_arrays_of_another_network_never_pass_as_the_same(workdir, evaluated):
    """Files that agree with themselves, with the settings that are asked for."""
    path = workdir / "evaluations" / FILE
    path.parent.mkdir()
    other = certificates.read(evaluated.path)
    for name, margins in other.margins_by.items():
        other.margins_by[name] = np.concatenate(
            [margins, np.full_like(margins[:, :1], 9.0)], axis=1
        )
    certificates.write(path, other)
    certificates.read(path)
    with pytest.raises(ExperimentError, match="which differs in the number of classes; give"):
        evaluate_run(workdir, OPTIONS)

    other = certificates.read(evaluated.path)._replace(run_by={}, verified_by={}, margins_by={})
    other.metadata["parts"] = {"attack": other.parts["attack"]}
    other.labels[3] += 1
    certificates.write(path, other)
    certificates.read(path)
    with pytest.raises(ExperimentError, match="which differs in labels; give") as caught:
        evaluate_run(workdir, OPTIONS)
    assert str(caught.value).startswith(str(path))
    _assert_same(
        evaluate_run(workdir, OPTIONS._replace(replace=True)).certificates, evaluated.certificates
    )


def test_an_evaluation_begun_by_the_first_version_goes_on(workdir, evaluated):
    """It did the clean pass batch by batch: what it has not seen yet seems misclassified."""
    path = workdir / "evaluations" / FILE
    settings = evaluated.certificates.metadata["settings"]
    begun = certificates.empty(evaluated.certificates.labels, LOSSES, settings)
    begun.parts["attack"] = dict(evaluated.certificates.parts["attack"])
    begun.attacked[:50] = True
    begun.correct[:50] = evaluated.certificates.correct[:50]
    certificates.write(path, begun)
    record = evaluate_run(workdir, OPTIONS).certificates
    _assert_same(record, evaluated.certificates)
    assert record.errors() == evaluated.certificates.errors()


def test_what_other_packages_attacked_is_forgotten(workdir, evaluated, monkeypatch):
    """An image that they found correct and resisting may be misclassified now."""
    _interrupt(monkeypatch, workdir, OPTIONS, writes=0)
    path = workdir / "evaluations" / FILE
    record = certificates.read(path)
    wrong = int(np.argmin(evaluated.certificates.correct))
    record.parts["attack"]["versions"]["jax"] = "0.0.1"
    record.correct[wrong] = True
    for resisted in record.resisted_by.values():
        resisted[wrong] = True
    certificates.write(path, record)
    _assert_same(evaluate_run(workdir, OPTIONS).certificates, evaluated.certificates)


def test_damaged_files_are_refused(evaluated, tmp_path):
    path = tmp_path / "half.npz"
    path.write_bytes(evaluated.path.read_bytes()[:3000])
    with pytest.raises(
        ExperimentError, match=r"half\.npz is not an evaluation file: the archive is"
    ):
        certificates.read(path)
    record = certificates.read(evaluated.path)
    first = int(np.argmin(record.verified_by["interval"]))
    record.verified_by["interval"][first] = True
    certificates.write(path, record)
    with pytest.raises(
        ExperimentError, match=rf"interval of example {first} \(1 in all\) contradicts"
    ):
        certificates.read(path)


def test_damaged_files_end_the_command_with_one_line(workdir, evaluated, capsys):
    path = workdir / "evaluations" / FILE
    path.parent.mkdir()
    shutil.copy(evaluated.path, path)
    record = certificates.read(path)
    certificates.write(path, record._replace(attacked=record.attacked[:-1]))
    command = [f"--workdir={workdir}", "--methods=interval", "--count=130", "--pgd-steps=3"]
    with pytest.raises(SystemExit):
        main([*command, "--batch-size=50"])
    errors = capsys.readouterr().err
    assert errors.startswith(
        f"error: {path} is not an evaluation file: attacked must be bool [130]"
    )
    assert errors.count("\n") == 1


def test_a_wrong_certificate_is_found(workdir, monkeypatch, capsys):
    certify = bj.certify

    def wrong(model, x, eps, **options):
        record = certify(model, x, eps, **options)
        return dataclasses.replace(record, verified=np.ones_like(record.verified))

    monkeypatch.setattr(bj, "certify", wrong)
    with pytest.raises(ContradictionError, match=r"example \d+ .* is verified by interval but"):
        evaluate_run(workdir, OPTIONS)
    with pytest.raises(SystemExit):
        main([f"--workdir={workdir}", "--methods=interval", "--count=130", "--name=again"])
    assert "a bound or the attack is wrong, please report it" in capsys.readouterr().err


def test_the_selected_epoch_and_other_balls(finished, workdir):
    options = OPTIONS._replace(methods=("crown-ibp",), which="selected", split="validation")
    small = evaluate_run(workdir, options._replace(eps=0.1, norm="2", clip=False))
    assert small.path.name == "validation-selected-l2-eps0.1-unclipped-first130.npz"
    assert small.certificates.metadata["settings"]["which"].startswith("selected epoch (")
    assert small.certificates.metadata["settings"]["clip"] is None
    assert "130 validation images of UCI digits, l2 eps 0.1, not clipped" in small.title
    run = trained.load(finished)
    np.testing.assert_array_equal(small.certificates.labels, run.validation.labels[:130])
    large = evaluate_run(workdir, options._replace(eps=0.1))
    assert np.all(small.certificates.evaluation.verified | ~large.certificates.evaluation.verified)
    assert (
        small.certificates.evaluation.verified.sum() > large.certificates.evaluation.verified.sum()
    )


def test_batches_are_divided_between_devices(workdir, monkeypatch):
    seen = []
    put = jax.device_put

    def recorded(array, sharding):
        placed = put(array, sharding)
        if isinstance(array, tuple) and hasattr(array[0], "shape"):  # a batch, not weights
            seen.append((len(placed[0].sharding.device_set), placed[0].shape[0]))
        return placed

    monkeypatch.setattr(measure.jax, "device_put", recorded)
    evaluate_run(workdir, OPTIONS._replace(methods=("interval",), batch_size=65))
    assert seen
    assert set(seen) == {(2, 66)}  # filled up to a multiple of the devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps=8/0"], "--eps must be a number like 0.1 or 8/255, got '8/0'"),
        (
            ["--eps=8"],
            "--eps must be in [0, 0.5), below half the l-inf diameter of images of UCI digits with "
            "pixels in [0, 1], got 8; in units of 1/255 write 8/255",
        ),
        (["--eps=36", "--norm=2"], "below half the l2 diameter of images of UCI digits"),
        (["--eps=-0.1"], "got -0.1"),
        (["--norm=2"], "--norm=2 needs --eps"),
        (["--norm=3", "--eps=0.1"], "--norm must be inf or 2, got '3'"),
        (["--methods=interval,ibp"], "unknown method 'ibp': use interval, crown-ibp"),
        (["--which=best"], "--which must be last or selected, got 'best'"),
        (["--split=train"], "--split must be test or validation, got 'train'"),
        (["--count=0"], "--count must be >= 1, got 0"),
        (["--pgd-restarts=0"], "--pgd-restarts must be >= 1, got 0"),
        (["--batch-size=0"], "--batch-size must be >= 1, got 0"),
        (["--name=../x"], "--name must be a file name without folders"),
        (["--workdir=nowhere"], "nowhere holds no run"),
    ],
)
def test_mistakes_are_one_line(finished, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main([f"--workdir={finished}", *arguments])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_the_command(workdir, capsys):
    main(
        [
            f"--workdir={workdir}",
            "--methods=interval",
            "--eps=4/255",
            "--count=50",
            "--pgd-steps=3",
            "--batch-size=50",
        ]
    )
    printed = capsys.readouterr().out
    assert "run: error on 50 test images of UCI digits, l-inf eps 0.0156863, clipped" in printed
    assert "last epoch (3)" in printed
    assert (workdir / "evaluations" / "test-last-l-inf-eps0.0156863-first50.npz").exists()


def test_an_unfinished_run_says_so(workdir):
    assert trained.load(workdir, "selected").label.startswith("selected epoch (")
    shutil.rmtree(workdir / "checkpoints" / "30")
    assert trained.load(workdir).label == "step 0 of 30"
    with pytest.raises(ExperimentError, match=r"has selected no epoch \(config\.data\.validation"):
        trained.load(workdir, "selected")

"""Evaluations by several processes: shares, parts of a file, and what is killed half way."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from several import free_port, start

import boundjax as bj
from experiments import models
from experiments.cluster import distributed
from experiments.evaluation import certificates, measure, shards
from experiments.evaluation.evaluate import Options, evaluate_run
from experiments.records.files import temporary_name
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ContradictionError, ExperimentError

# One worker makes the trained network, once.
pytestmark = pytest.mark.xdist_group("evaluate_processes")

MODEL = {"hidden": (8,)}
# Four blocks of correct images and a few that are misclassified.
OPTIONS = Options(methods=("crown-ibp", "interval"), count=150, pgd_steps=2, batch_size=40)
FILE = "test-last-l-inf-eps0.03-first150.npz"
FLAGS = ("--methods=crown-ibp,interval", "--count=150", "--pgd-steps=2", "--batch-size=40")
# Ends itself, as `kill -9` would, when it writes its part for the so many-th time.
PROCESS = """
import os, signal, sys
from experiments import evaluate, models
from experiments.evaluation import certificates
models.MODELS["test_mlp"] = {"hidden": (8,)}
write, left = certificates.write, int(sys.argv.pop(1))

def writes(path, evaluation):
    global left
    write(path, evaluation)
    left -= "part" in path.name
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

certificates.write = writes
evaluate.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "test_mlp", MODEL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, without evaluations."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    config = from_config_dict(
        {
            "data": {"name": "digits", "validation": 0},
            "model": {"name": "test_mlp"},
            "train": {"epochs": 8, "batch_size": 128},
            "optim": {"lr": 3e-2},
            "robust": {"method": "natural", "eps_train": 0.03, "eps_test": 0.03},
            "evaluation": {"methods": ("interval",), "pgd_steps": 0},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", MODEL)
        runs.run(config, workdir, "test")
    shutil.rmtree(workdir / "evaluations")
    return workdir


@pytest.fixture(scope="module")
def reference(finished):
    """What one process finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", MODEL)
        result = evaluate_run(finished, OPTIONS).certificates
    shutil.rmtree(finished / "evaluations")
    return result


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def assert_same(evaluation, reference):
    """Flags are the same, margins up to the rounding of other batches."""
    flags = ("index", "labels", "attacked", "correct", "resisted_by", "run_by", "verified_by")
    for name in flags:
        jax.tree.map(
            np.testing.assert_array_equal, getattr(evaluation, name), getattr(reference, name)
        )
    for name, margins in reference.margins_by.items():
        np.testing.assert_allclose(evaluation.margins_by[name], margins, rtol=1e-4, atol=1e-5)
    assert list(evaluation.run_by) == list(reference.run_by)
    assert evaluation.errors() == reference.errors()


def assert_same_files(files, finished):
    """The points and everything else but margins, which differ by rounding, are the same."""
    expected = finished / "certificates" / files.name
    assert {file.name for file in files.iterdir()} == {file.name for file in expected.iterdir()}
    for name in ("pgd.npz", "weights.npz", "inputs.npz"):
        assert (files / name).read_bytes() == (expected / name).read_bytes(), name


# --- who does what --------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_image_is_one_process_s(processes):
    correct = np.random.default_rng(0).uniform(size=101) < 0.8
    blocks = measure.attack_blocks(correct, 10)
    images, attacked = [], {}
    for process in range(processes):
        mine, own = shards.share(correct, 10, process, processes)
        assert (np.diff(mine) > 0).all()
        images.extend(mine)
        attacked |= {block.number: mine[block.rows] for block in own}
        assert [block.number % processes for block in own] == [process] * len(own)
    assert sorted(images) == list(range(101))
    # The blocks are those of one process, whose numbers their random starts derive from.
    assert sorted(attacked) == list(range(len(blocks)))
    for block in blocks:
        np.testing.assert_array_equal(attacked[block.number], block.rows)


def simulated(workdir, processes, options=OPTIONS, stopped=()):
    """What several processes do, one after the other; those `stopped` after their first batch."""

    class Stopped(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "processes", lambda: processes)
        patch.setattr(distributed, "agree", lambda values: None)
        patch.setattr(distributed, "require_shared", lambda folder: None)
        patch.setattr(distributed, "from_main", lambda value: value())

        def complete(evaluation, problem, config, plan, path, saving):
            measure.begin(evaluation, problem, config, plan)
            network = measure.Network(problem, config)
            if not evaluation.attacked.any():
                evaluation.record_clean_pass(network.correct(problem.data))
            certificates.write(path, evaluation)
            for process in range(processes):
                own = shards.part_path(path, process, processes)

                def save(part, own=own, process=process):
                    certificates.write(own, part)
                    if process in stopped:
                        raise Stopped

                try:
                    shards.complete_share(
                        evaluation, problem, config, plan, network, process, processes, save
                    )
                except Stopped:
                    continue
            return evaluation if stopped else shards.gather(path)

        patch.setattr(shards, "complete", complete)
        return evaluate_run(workdir, options).certificates


def test_shares_together_are_what_one_process_finds(workdir, reference, monkeypatch):
    calls = _attacks(monkeypatch)
    result = simulated(workdir, 3)
    assert_same(result, reference)
    assert sum(calls) == reference.correct.sum()  # each once
    assert [file.name for file in (workdir / "evaluations").iterdir()] == [FILE]
    assert_same(certificates.read(workdir / "evaluations" / FILE), reference)
    assert result.parts["interval"]["arithmetic"] == "real"
    cascade = OPTIONS._replace(cascade=True, name="cascade")
    one = evaluate_run(workdir, cascade._replace(name="one")).certificates
    assert not one.run_by["crown-ibp"].all()
    assert_same(simulated(workdir, 2, cascade), one)


def _attacks(monkeypatch):
    """On how many images each batch of the attack is, as a list that grows."""
    calls = []
    resisted = measure.Network.resisted

    def recorded(network, batch, losses, key):
        calls.append(len(batch))
        return resisted(network, batch, losses, key)

    monkeypatch.setattr(measure.Network, "resisted", recorded)
    return calls


def test_what_was_killed_goes_on_with_another_number(workdir, finished, reference, monkeypatch):
    """Three processes, two of which are killed; then two; then one: nothing is done twice."""
    calls = _attacks(monkeypatch)
    folder = workdir / "evaluations"
    simulated(workdir, 3, stopped=(0, 1))
    names = {file.name for file in folder.iterdir()}
    parts = {shards.part_path(folder / FILE, process, 3).name for process in range(3)}
    assert names == {FILE, *parts}
    with pytest.raises(ExperimentError, match="of 150 images are evaluated"):
        certificates.read(folder / FILE).errors()
    # Half of a file that was being written belongs to nobody.
    (folder / temporary_name(min(parts))).write_bytes(b"half")
    simulated(workdir, 2, stopped=(0, 1))
    # Nor are there certificate files before the evaluation is complete.
    files = workdir / "certificates" / Path(FILE).stem
    assert {file.name.partition("-")[0] for file in files.iterdir()} == {"attack"}
    result = evaluate_run(workdir, OPTIONS).certificates
    assert_same(result, reference)
    assert sum(calls) == reference.correct.sum()
    assert [file.name for file in folder.iterdir()] == [FILE]
    assert_same_files(files, finished)


def test_a_part_counts_once(workdir, reference):
    """A kill after parts were put in and before they were removed; and the time they took."""
    simulated(workdir, 2, stopped=(0, 1))
    path = workdir / "evaluations" / FILE
    parts = [
        certificates.read(shards.part_path(path, process, 2), part=True) for process in range(2)
    ]
    for part, seconds in zip(parts, (3.0, 5.0), strict=True):
        part.parts["attack"]["seconds"] = seconds
    result = certificates.read(path)
    before, done = result.parts["attack"]["seconds"], result.attacked.sum()
    shards.merge(result, parts)
    # Side by side: the longest counts.
    assert result.parts["attack"]["seconds"] == before + 5.0
    assert result.attacked.sum() == done + sum(
        (part.attacked & part.correct).sum() for part in parts
    )
    attacked = result.attacked.copy()
    shards.merge(result, parts)
    assert result.parts["attack"]["seconds"] == before + 5.0
    np.testing.assert_array_equal(result.attacked, attacked)


def test_parts_of_another_evaluation_do_not_count(workdir, reference):
    path = workdir / "evaluations" / FILE
    simulated(workdir, 2, stopped=(0, 1))
    left = shards.part_path(path, 0, 2)
    part = certificates.read(left, part=True)
    part.metadata["settings"]["attack"]["seed"] = 7
    certificates.write(left, part)
    with pytest.raises(
        ExperimentError, match=r"part-0-of-2.npz is not a part .* in attack\.seed; de"
    ):
        evaluate_run(workdir, OPTIONS)
    # Whoever deletes the file wants it anew, parts as well.
    path.unlink()
    assert_same(evaluate_run(workdir, OPTIONS).certificates, reference)
    assert not left.exists()


@pytest.mark.parametrize("what", ["labels", "correct", "the number of classes"])
def test_parts_of_other_arrays_do_not_count(workdir, what):
    """Of the same settings, and each of them agrees with itself."""
    path = workdir / "evaluations" / FILE
    simulated(workdir, 2, stopped=(0, 1))
    left = shards.part_path(path, 1, 2)
    part = certificates.read(left, part=True)
    assert not part.run_by
    if what == "labels":
        part.labels[0] += 1
    elif what == "correct":
        first = int(np.argmax(part.correct))
        part.correct[first], part.attacked[first] = False, True
        for resisted in part.resisted_by.values():
            resisted[first] = False
    else:
        certificates.write(path, _with_interval(certificates.read(path), classes=10))
        part = _with_interval(part, classes=11)
    certificates.write(left, part)
    with pytest.raises(
        ExperimentError, match=f"part-1-of-2.npz is not a part .* in {what}; delete"
    ):
        evaluate_run(workdir, OPTIONS)
    assert left.exists()


def _with_interval(evaluation, classes):
    """The same, with a method that was run on nothing."""
    evaluation.add_method("interval", classes)
    return evaluation


def test_a_part_that_contradicts_the_whole_is_not_put_in(workdir):
    path = workdir / "evaluations" / FILE
    simulated(workdir, 2, stopped=(0, 1))
    whole, left = certificates.read(path), shards.part_path(path, 0, 2)
    part = certificates.read(left, part=True)
    row = int(np.argmax(part.evaluation.resisted & part.attacked))
    part.add_method("interval", classes=10)
    part.run_by["interval"][row] = part.verified_by["interval"][row] = True
    part.margins_by["interval"][row] = 1.0
    part.margins_by["interval"][row, part.labels[row]] = 0.0
    part.parts["interval"] = part.parts["attack"] | {"arithmetic": "exact-real", "dtype": "float32"}
    certificates.write(left, part)
    whole.attacked[part.index[row]] = True  # and broken
    certificates.write(path, whole)
    before = path.read_bytes()
    with pytest.raises(ContradictionError, match=rf"example {part.index[row]} .* PGD breaks it"):
        evaluate_run(workdir, OPTIONS)
    assert path.read_bytes() == before
    assert left.exists()


def test_a_damaged_part_is_named(workdir):
    path = workdir / "evaluations" / FILE
    simulated(workdir, 2, stopped=(0, 1))
    left = shards.part_path(path, 1, 2)
    left.write_bytes(left.read_bytes()[:-100])
    with pytest.raises(ExperimentError, match=r"part-1-of-2\.npz is not an evaluation file"):
        evaluate_run(workdir, OPTIONS)
    left.unlink()
    left.mkdir()
    with pytest.raises(ExperimentError, match=r"part-1-of-2\.npz .* expected a file"):
        evaluate_run(workdir, OPTIONS)
    path.unlink()
    with pytest.raises(ExperimentError, match=r"part-1-of-2\.npz cannot be removed"):
        evaluate_run(workdir, OPTIONS)


def test_a_wrong_certificate_in_a_part_is_named_as_in_the_whole():
    part = shards.select(certificates.empty(np.zeros(9, int), ("margin",), {}), [7, 8])
    part.add_method("interval", classes=3)
    part.verified_by["interval"][1] = True
    with pytest.raises(RuntimeError, match=r"example 8 .* by interval but misclassified"):
        certificates.check_consistency(part.evaluation, part.index)


def test_other_packages_begin_anew_on_all_processes(workdir, reference, monkeypatch):
    """Where its share of a method was done as well; another number of devices is no reason."""
    path = workdir / "evaluations" / FILE
    simulated(workdir, 2, OPTIONS._replace(methods=("interval",)))
    result = certificates.read(path)
    assert result.run_by["interval"].all()
    result.run_by["interval"][3] = result.verified_by["interval"][3] = False
    result.margins_by["interval"][3] = np.nan
    result.parts["interval"]["versions"]["jax"] = "0.0.1"
    result.parts["attack"]["device"] = (
        "64 x cpu" + result.parts["attack"]["device"][len("2 x cpu") :]
    )
    certificates.write(path, result)
    attacks, bounded = _attacks(monkeypatch), []
    certify = bj.certify

    def recorded(model, x, eps, **options):
        bounded.extend([options["method"]] * len(x))
        return certify(model, x, eps, **options)

    monkeypatch.setattr(bj, "certify", recorded)
    result = simulated(workdir, 2)
    assert attacks == []
    assert bounded.count("interval") >= 150
    assert result.parts["interval"]["versions"]["jax"] == jax.__version__
    assert_same(result, reference)


def test_what_a_process_does_not_see_is_named(workdir, monkeypatch):
    monkeypatch.setattr(shards, "_TIMEOUT", 0.0)
    with pytest.raises(ExperimentError, match=r"evaluations/x.npz is not shared"):
        shards._wait_for(workdir / "evaluations" / "x.npz", {})


# --- real processes -------------------------------------------------------------------------------


def evaluated_by_two(workdir, writes):
    """Two processes of two devices, each killed when it has written its part so often."""
    joining = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2")
    arguments = [
        ["-c", PROCESS, str(count), f"--workdir={workdir}", *FLAGS, *joining, f"--process={i}"]
        for i, count in enumerate(writes)
    ]
    return start(arguments, devices=2)


@pytest.mark.slow
def test_two_processes_killed_half_way(workdir, finished, reference, tmp_path):
    killed = evaluated_by_two(workdir, writes=(3, 1))
    assert [process.status for process in killed] == [-9, -9], killed
    folder = workdir / "evaluations"
    parts = [shards.part_path(folder / FILE, process, 2) for process in range(2)]
    assert sorted(folder.iterdir()) == sorted([folder / FILE, *parts])
    first, second = (certificates.read(part, part=True) for part in parts)
    # One is at its first method, one has attacked a batch; neither has half of the images.
    assert first.attacked.all()
    assert list(first.run_by) == ["interval"]
    assert 0 < first.run_by["interval"].sum() < len(first.labels) < 100
    assert second.progress == {"attack": 40}
    alone = shutil.copytree(workdir, tmp_path / "alone")

    ended = evaluated_by_two(workdir, writes=(1000, 1000))
    assert [process.status for process in ended] == [0, 0], ended
    assert_same(certificates.read(folder / FILE), reference)
    assert [file.name for file in folder.iterdir()] == [FILE]
    assert_same_files(workdir / "certificates" / Path(FILE).stem, finished)
    # Process 0 prints, once; the other one does not.
    assert ended[0].output.count("run: error on 150 test images of UCI digits") == 1
    assert ended[1].output == ""

    result = evaluate_run(alone, OPTIONS)
    assert_same(result.certificates, reference)
    # Who worked on it, one after the other.
    assert re.match(
        r"4 x cpu .* in 2 processes, then 2 x cpu", result.certificates.parts["interval"]["device"]
    )

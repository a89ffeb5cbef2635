"""Evaluations by the method `complete`: what they record, how they go on, what files may say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_files import refusal, settings, store, stored
from flax import linen as nn

import boundjax as bj
from experiments.data import Images
from experiments.evaluate import main
from experiments.evaluation import certificates, checkable, measure, shards
from experiments.evaluation.evaluate import Evaluated, Options, print_evaluated
from experiments.evaluation.measure import Plan, Problem
from experiments.settings.checks import from_config_dict
from experiments.settings.config import Config, EvaluationConfig
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.xdist_group("evaluated complete")
COUNT, EPS = 14, 0.03
LOSSES = ("cross_entropy", "margin")
CONFIG = EvaluationConfig(
    methods=("interval", "complete"), batch_size=COUNT, pgd_steps=1, pgd_restarts=1, timeout=30.0
)
CASCADE = Plan(cascade=True, made_with={"versions": {"python": "3"}, "device": "2 x cpu"})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12)(x.reshape(len(x), -1)))
        return nn.Dense(4)(nn.relu(nn.Dense(12)(x)))


@pytest.fixture(scope="module")
def problem():
    x = np.random.default_rng(1).uniform(size=(COUNT, 5, 6, 1)).astype(np.float32)
    variables = jax.jit(Net().init)(jax.random.key(1), x)
    labels = np.array(Net().apply(variables, x).argmax(axis=1), np.int32)
    labels[-1] = (labels[-1] + 1) % 4  # misclassified
    pure = bj.PureModel.of((Net(), variables))
    return Problem(pure, Images(x, labels), bj.Threat(EPS, clip=(0.0, 1.0)))


def begun(problem):
    stated = settings() | {"count": COUNT, "eps": EPS}
    return certificates.empty(problem.data.labels, LOSSES, stated)


@pytest.fixture(scope="module")
def finished(problem):
    results = begun(problem)
    measure.complete(results, problem, CONFIG, CASCADE)
    return results


def copy(results):
    return shards.select(results, np.arange(COUNT))


def test_a_cascade_searches_what_others_leave_open(problem, finished):
    others = finished.verified_by["interval"]
    run, verified, falsified = (
        by["complete"] for by in (finished.run_by, finished.verified_by, finished.falsified_by)
    )
    np.testing.assert_array_equal(run, finished.evaluation.resisted & ~others)
    assert list(finished.falsified_by) == ["complete"]
    np.testing.assert_array_equal(run, verified | falsified)  # a second suffices for each
    assert verified.any()
    assert falsified.any()  # one step of PGD did not come to it
    direct = bj.certify(
        problem.model,
        problem.data.images,
        EPS,
        labels=problem.data.labels,
        clip=(0.0, 1.0),
        method="complete",
    )
    np.testing.assert_array_equal(verified | others, direct.verified)
    np.testing.assert_array_equal(falsified, direct.falsified & run)
    errors = finished.errors()
    assert errors["verified_error"] == pytest.approx(1 - direct.verified.mean())
    assert errors["verified_error_by"]["complete"] is None
    record = finished.parts["complete"]
    assert record["timeout"] == 30.0
    assert record["arithmetic"] == "real"


def test_results_are_printed(finished, tmp_path, capsys):
    print_evaluated(Evaluated(tmp_path / "x.npz", finished, "title"))
    printed = capsys.readouterr().out
    run, verified, falsified = (
        int(by["complete"].sum())
        for by in (finished.run_by, finished.verified_by, finished.falsified_by)
    )
    assert (
        f"complete: of {run} images {verified} verified, "
        f"{falsified} with a counterexample, 0 undecided after 30 s each"
    ) in printed


class _Interrupted(Exception):
    pass


def test_a_killed_evaluation_goes_on_after_the_last_image(problem, finished, monkeypatch):
    results, searched = begun(problem), []
    certify = bj.certify

    def counted(model, x, eps, **options):
        if options["method"] == "complete":
            searched.append(len(x))
            assert options["timeout"] == 30.0
            if len(searched) == 3:
                raise _Interrupted
        else:
            assert options["timeout"] is None
        return certify(model, x, eps, **options)

    monkeypatch.setattr(bj, "certify", counted)
    with pytest.raises(_Interrupted):
        measure.complete(results, problem, CONFIG, CASCADE)
    assert searched == [1, 1, 1]
    assert results.run_by["complete"].sum() == 2
    measure.complete(results, problem, CONFIG, CASCADE)
    assert len(searched) == finished.run_by["complete"].sum() + 1
    for name in ("run_by", "verified_by", "falsified_by", "margins_by"):
        np.testing.assert_array_equal(
            getattr(results, name)["complete"], getattr(finished, name)["complete"]
        )


def test_a_longer_time_searches_the_undecided_again(problem, finished, monkeypatch):
    results = copy(finished)
    undecided = np.flatnonzero(results.verified_by["complete"])[:2]
    results.reset("complete", undecided)
    results.run_by["complete"][undecided] = True
    results.margins_by["complete"][undecided] = np.where(
        np.arange(4)[None] == problem.data.labels[undecided, None], 0.0, -1.0
    )
    calls = []
    certify = bj.certify

    def recorded(*arguments, **options):
        calls.append(options["timeout"])
        return certify(*arguments, **options)

    monkeypatch.setattr(bj, "certify", recorded)
    for timeout in (20.0, 30.0):
        measure.complete(results, problem, dataclasses.replace(CONFIG, timeout=timeout), CASCADE)
        assert not calls
        assert results.parts["complete"]["timeout"] == 30.0
    measure.complete(results, problem, dataclasses.replace(CONFIG, timeout=40.0), CASCADE)
    assert calls == [40.0, 40.0]
    assert results.parts["complete"]["timeout"] == 40.0
    np.testing.assert_array_equal(results.verified_by["complete"], finished.verified_by["complete"])
    # Of images that are still to come, a shorter time is what is recorded.
    results.reset("complete", np.arange(COUNT) == undecided[0])
    measure.complete(results, problem, dataclasses.replace(CONFIG, timeout=25.0), CASCADE)
    assert calls[2:] == [25.0]
    assert results.parts["complete"]["timeout"] == 25.0


def test_files_and_parts_of_them(finished, tmp_path):
    path = tmp_path / "whole.npz"
    certificates.write(path, finished)
    read = certificates.read(path)
    np.testing.assert_array_equal(read.falsified_by["complete"], finished.falsified_by["complete"])
    whole = copy(finished)
    whole.reset("complete", np.ones(COUNT, bool))
    parts = [shards.select(finished, np.arange(COUNT)[k::2]) for k in (0, 1)]
    shards.merge(whole, parts)
    for name in ("run_by", "verified_by", "falsified_by"):
        np.testing.assert_array_equal(
            getattr(whole, name)["complete"], getattr(finished, name)["complete"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: a.pop("complete_falsified"), "array 'complete_falsified' is missing"),
        (
            lambda a, m: a.update(interval_falsified=a["complete_run"]),
            "unknown array",
        ),
        (
            lambda a, m: a.update(complete_falsified=~a["complete_run"]),
            "of example .* was not run, but has a counterexample",
        ),
        (
            lambda a, m: a.update(complete_falsified=a["complete_verified"]),
            "of example .* is verified, but has a counterexample",
        ),
        (lambda a, m: m["parts"]["complete"].pop("timeout"), "timeout"),
        (lambda a, m: m["parts"]["complete"].update(timeout=-1.0), r"parts\.complete\.timeout"),
        (lambda a, m: m["parts"]["interval"].update(timeout=1.0), "timeout"),
    ],
)
def test_files_that_are_not_consistent(finished, tmp_path, change, message):
    path = tmp_path / "changed.npz"
    certificates.write(path, finished)
    arrays, metadata = stored(path)
    change(arrays, metadata)
    store(path, arrays, metadata)
    refusal(path, message)


def test_the_checker_gets_no_file_of_a_search(problem, finished, tmp_path, capsys):
    assert checkable.write(tmp_path, finished, problem)
    assert (tmp_path / "interval.npz").exists()
    assert not (tmp_path / "complete.npz").exists()
    assert "complete: no certificate file, because the checker has no rule for splits" in (
        capsys.readouterr().out
    )
    (tmp_path / "complete.npz").write_text("of another version")
    checkable.discard(tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_time_limit_is_a_setting(tmp_path, capsys):
    assert Options(timeout=5.0).applied(Config()).evaluation.timeout == 5.0
    assert Options().applied(Config()).evaluation.timeout == 60.0
    with pytest.raises(ExperimentError, match=r"evaluation\.timeout must be positive, in seconds"):
        from_config_dict({"evaluation": {"timeout": 0.0}})
    with pytest.raises(SystemExit):
        main(["--workdir", str(tmp_path), "--timeout=soon"])
    assert "--timeout: invalid float value" in capsys.readouterr().err


def test_other_norms_are_refused_in_one_line(problem):
    l2 = problem._replace(threat=bj.Threat(EPS, 2.0, (0.0, 1.0)))
    with pytest.raises(ExperimentError, match=r"'complete' cannot bound this .*needs the norm inf"):
        measure.complete(begun(l2), l2, dataclasses.replace(CONFIG, methods=("complete",)))


def test_complete_is_run_last():
    assert measure.cheapest_first(("complete", "alpha-crown", "best", "interval"))[-1] == "complete"
    assert jnp.isfinite(CONFIG.timeout)

"""Rows: that they can be run, what is recorded of one, and how mistakes end."""

import json
import re

import pytest

from experiments import models, reproduce, rows
from experiments.errors import ExperimentError
from experiments.reproduce import SECTION, Reproduction, Seed, configuration, main, record
from experiments.rows import ROWS, Numbers, Row

# One worker trains the tiny row, once.
one_worker = pytest.mark.xdist_group("reproduced")

TINY = Row(
    name="digits-tiny",
    config="experiments/configs/digits_crown.py",
    published=Numbers(50.0, None, 90.0),
    source="nowhere",
    tolerance=5.0,
    note="a test",
    methods=("interval", "crown-ibp"),
    seeds=2,
    overrides={
        "model.name": "test_mlp",
        "train.epochs": 2,
        "train.batch_size": 128,
        "optim.lr": 5e-3,
        "optim.milestones": (1.5,),
        "robust.method": "ibp",
        "robust.eps_train": 0.02,
        "robust.eps_test": 0.02,
        "robust.warmup_epochs": 0.0,
        "robust.ramp_epochs": 1.0,
        "evaluation.methods": ("interval",),
        "evaluation.pgd_steps": 2,
        "evaluation.every": 1,
    },
)


@pytest.fixture(autouse=True)
def _tiny_row(monkeypatch):
    monkeypatch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
    monkeypatch.setitem(rows.ROWS, TINY.name, TINY)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The tiny row, run once by the command: (folder of the runs, results file)."""
    folder = tmp_path_factory.mktemp("rows")
    results = folder / "results.md"
    results.write_text("# Measured\n\nText.\n\n## Later\n\nMore.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
        patch.setitem(rows.ROWS, TINY.name, TINY)
        main(_arguments(folder, results))
    return folder, results


def _arguments(folder, results):
    return [TINY.name, f"--workdir={folder / 'runs'}", f"--results={results}"]


@one_worker
def test_a_row_is_trained_evaluated_and_recorded(reproduced):
    folder, results = reproduced
    text = results.read_text()
    assert text.startswith(
        "# Measured\n\nText.\n\n## Later\n\nMore.\n\n## Reproduced rows\n\n| row |"
    )
    header, rule, line = text[text.index(SECTION) :].splitlines()[2:]
    assert header.count(" | ") == line.count(" | ") == rule.count("|") - 2
    cells = dict(zip(header.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert cells["row"] == "digits-tiny"
    assert cells["published: standard / PGD / verified"] == "50.00 / - / 90.00, nowhere"
    assert cells["seeds"] == "2"
    assert cells["bounds"] == "interval or crown-ibp"
    assert "l-inf eps 0.02, clipped to [0, 1], PGD-100 with 2 starts" in cells["ball"]
    assert cells["data"] == "UCI digits"
    assert cells["command"] == "`python -m experiments.reproduce digits-tiny --seeds=2`"
    number = r"\d+\.\d\d ± \d+\.\d\d"
    three = f"{number} / {number} / {number}"
    assert re.fullmatch(rf"{three} \(selected\); {three} \(last\)", cells["obtained (%)"])
    summaries = [
        json.loads((folder / "runs" / f"seed-{seed}" / "summary.json").read_text())
        for seed in (0, 1)
    ]
    assert [summary["seed"] for summary in summaries] == [0, 1]
    assert len(set(cells["weights (SHA-256)"].split())) == 2


@one_worker
def test_the_same_row_again_replaces_its_line(reproduced, tmp_path, capsys):
    folder, results = reproduced
    before = results.read_text().splitlines()
    again = tmp_path / "results.md"
    # What came after it stays there.
    again.write_text("\n".join([*before[:-1], before[-1].replace("yes (5)", "old"), "", "## End"]))
    main(_arguments(folder, again))
    after = again.read_text().splitlines()
    assert after == [*before, "", "## End"]
    printed = capsys.readouterr().out
    assert printed.count("holds a finished run") == 2
    assert "seed 1, selected epoch" in printed
    assert "of the published 50.00 / - / 90.00: a test" in printed
    assert "UCI digits" in printed


def _found(verified, weights="ab", standard=1.0, row=TINY):
    summary = {
        "data": "UCI digits",
        "device": "2 x cpu",
        "versions": {"python": "3", "jax": "1", "flax": "1", "numpy": "2"},
    }
    settings = {"clip": None, "eps": 0.1, "norm": "2", "attack": {"steps": 100, "restarts": 2}}
    seeds = [
        Seed({"last": Numbers(standard, 2.0, value)}, weights * 32, 3700.0, summary, settings)
        for value in verified
    ]
    return Reproduction(row, tuple(seeds))


def test_means_over_seeds_are_compared_with_the_anchor():
    assert _found([94.0, 95.9]).within
    assert not _found([94.0, 96.1]).within
    assert not _found([10.0], standard=55.1).within
    assert _found([94.0, 96.0]).obtained() == "1.00 ± 0.00 / 2.00 ± 0.00 / 95.00 ± 1.41 (last)"
    assert _found([94.0]).obtained() == "1.00 / 2.00 / 94.00 (last)"
    # The prototype, where there is one.
    anchored = TINY._replace(prototype=Numbers(None, None, 20.0))
    assert _found([25.0], row=anchored).within
    assert not _found([25.1], row=anchored).within


def test_other_weights_are_another_line(tmp_path):
    results = tmp_path / "results.md"
    record(results, _found([94.0]))
    record(results, _found([93.0], weights="cd"))
    record(results, _found([92.0]))
    record(results, _found([91.0], row=TINY._replace(name="other")))
    lines = results.read_text().splitlines()
    assert lines[0] == SECTION
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "row",
        "---|" * 12 + "---",
        "digits-tiny",
        "digits-tiny",
        "other",
    ]
    assert ["92.00" in lines[4], "93.00" in lines[5], "91.00" in lines[6]] == [True] * 3
    assert "1 h 1 min" in lines[4]
    assert "l2 eps 0.1, not clipped" in lines[4]


@pytest.mark.parametrize("name", [name for name in ROWS if name != TINY.name])
def test_every_row_has_a_configuration(name):
    row = ROWS[name]
    config = configuration(row, data_dir="somewhere")
    assert (config.seed, config.seeds, config.data.dir) == (0, 1, "somewhere")
    assert set(row.methods) >= set(config.evaluation.methods)
    assert row.note
    assert row.source
    assert 0 < row.tolerance < 10
    assert row.anchor.verified > (row.anchor.standard or 0)
    # The name says at which radius, in pixels or 255ths.
    radius = re.search(r"-(0\.\d|8|2)$", name)
    if radius:
        value = float(radius[1])
        assert config.robust.eps_test == pytest.approx(value if value < 1 else value / 255)


def test_numbers_of_accuracies():
    assert Numbers.of_accuracies(86.48, None, 40.55) == Numbers(13.52, None, 59.45)
    assert str(Numbers(13.52, None, 59.4)) == "13.52 / - / 59.40"


def test_rows_without_a_file_or_with_a_wrong_key_are_refused():
    assert configuration(TINY).robust.method == "ibp"
    missing = TINY._replace(config="experiments/configs/none.py:cpu")
    with pytest.raises(ExperimentError, match=r"there is no experiments/configs/none\.py"):
        configuration(missing)
    unknown = TINY._replace(overrides={"optim.lrr": 1.0})
    with pytest.raises(ExperimentError, match=r"unknown config key optim\.lrr"):
        configuration(unknown)


def test_the_list_shows_what_a_budget_allows(capsys):
    main(["--list"])
    everything = capsys.readouterr().out
    main(["--list", "--budget=cpu"])
    cheap = capsys.readouterr().out
    for row in ROWS.values():
        assert row.name in everything
        assert (f"{row.name} " in cheap) == (row.budget == "cpu")
    assert "13.52 / 46.44 / 59.45" in cheap


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    main([TINY.name, f"--workdir={tmp_path / 'runs'}", "--seeds=2", "--dry-run"])
    printed = capsys.readouterr().out
    assert "ibp training of test_mlp on digits, 2 epochs, l-inf eps 0.02" in printed
    assert f"{tmp_path / 'runs' / 'seed-1'} is new" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which row? --list shows all"),
        (["digits-tny"], "unknown row 'digits-tny': did you mean digits-tiny? --list shows all"),
        ([TINY.name, "--seeds=0"], "--seeds must be >= 1, got 0"),
        ([TINY.name, "--results=nowhere/results.md"], "--results=nowhere/results.md: must be"),
        (["for-gpu"], "row for-gpu is for an accelerator and JAX finds none here; --budget=gpu"),
        (["for-gpu", "--budget=cpu"], "is for an accelerator, but --budget=cpu was given"),
        (["for-gpu", "--budget=gpu"], "--results=nowhere"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setitem(rows.ROWS, "for-gpu", TINY._replace(name="for-gpu", budget="gpu"))
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    monkeypatch.chdir(tmp_path)
    if arguments == ["for-gpu", "--budget=gpu"]:
        arguments = [*arguments, "--results=nowhere/x"]  # it got past the budget
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert reproduce.ROWS is rows.ROWS

"""Rows: that they can be run, what is recorded of one, and how mistakes end."""

import collections
import json
import pathlib
import re

import pytest

from boundjax.certification.presets import METHODS as CERTIFICATES
from experiments import configs, methods, models
from experiments.evaluation.random_evaluate import RandomOptions, attacks_of
from experiments.published import reproduction, rows, tables
from experiments.published.reproduction import SECTION, Reproduction, Seed, configuration, record
from experiments.published.rows import ROWS, Numbers, Row
from experiments.reproduce import main
from experiments.settings.errors import ExperimentError

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
    assert row.name == name
    config = configuration(row, data_dir="somewhere")
    assert (config.seed, config.seeds, config.data.dir) == (0, 1, "somewhere")
    # Nothing certifies a random network.
    assert bool(row.methods) == bool(not config.random.draws) == bool(not row.attacks)
    assert not row.methods or set(row.methods) >= set(config.evaluation.methods)
    assert set(row.methods) <= set(CERTIFICATES)
    assert row.note
    assert row.source
    assert 0 < row.tolerance < 10
    # A constant model has no more verified than standard errors.
    worst = row.anchor.pgd if row.anchor.verified is None else row.anchor.verified
    assert worst >= (row.anchor.standard or 0)
    # The name says at which radius, in pixels or 255ths, and how many epochs.
    radius = re.search(r"-(0\.\d+|2|4|6|8|16)(-[24]00)?$", name)
    if radius and "slopes" not in name:
        value = float(radius[1])
        assert config.robust.eps_test == pytest.approx(value if value < 1 else value / 255)
    epochs = re.search(r"-(70|1[046]0|[24]00)$", name)
    assert not epochs or config.train.epochs == int(epochs[1])
    # What `prepare` refuses without data.
    model = models.from_config(config.model, config.random)
    assert models.network_of(model).num_classes == (
        200 if config.data.name == "tiny_imagenet" else 10
    )
    methods.create(model, config)


# Numbers as the papers print them (errors, BCP and CTBench accuracies), and what is run for them.
PUBLISHED = {
    "mnist-ibp-large-0.4": ((3.50, 7.30, 17.96), "mnist_ibp:eps=0.4"),
    "mnist-cap-large-0.3": ((19.19, 35.84, 47.85), "mnist_cap:eps=0.3"),
    "cifar10-ibp-16-400": ((67.10, 75.12, 78.26), "cifar10_ibp:eps=16"),
    "cifar10-crown-ibp-8-400": ((61.37, 70.66, 75.37), "cifar10_crown:eps=8"),
    "cifar10-crown-ibp-beta0-4-400": ((45.92, 57.58, 62.07), "cifar10_crown:eps=4,beta=0"),
    "cifar10-one-step-6-400": ((50.19, 61.88, 66.90), "cifar10_one_step:eps=6"),
    "cifar10-one-step-more-2-400": (
        *((33.04, 43.70, 48.60), "cifar10_one_step:eps=2,kappa=0,eps_train=1.1x"),
    ),
    "cifar10-one-step-8-200": ((57.14, 66.88, 71.45), "cifar10_one_step:eps=8,epochs=200,kappa=0"),
    "cifar10-one-step-8": ((56.01, 66.17, 69.70), "cifar10_one_step:eps=8,epochs=100"),
    "cifar10-slopes-0-0.25-200": ((64.50, 72.67, 74.47), "cifar10_slopes:slopes=0-0.25"),
    "cifar10-slopes-cap-ibp-200": ((60.36, 69.46, 74.29), "cifar10_slopes:slopes=cap-ibp"),
    "cifar10-slopes-0-1-stability-10-200": (
        *((60.90, 70.85, 76.00), "cifar10_slopes:stability=10,slopes=0-1"),
    ),
    "cifar10-cap-ibp-2": ((28.80, 38.95, 48.50), "cifar10_slopes:eps=2,epochs=100,kappa=1"),
    "mnist-crown-ibp-large-beta0-0.3": ((2.37, 3.63, 7.22), "mnist_crown:eps=0.3,beta=0,kappa=0"),
    "svhn-one-step-0.01": ((16.41, 30.43, 39.44), "svhn_one_step"),
    "mnist-relu-stability-0.3": ((2.67, None, 19.32), "mnist_relu_stability:eps=0.3"),
    "mnist-cap-4c3f": ((11.61, 37.75, 56.05), "mnist_l2:method=cap"),
    "cifar10-ibp-6c2f": ((67.04, 68.92, 76.58), "cifar10_l2:method=ibp,net=6c2f"),
    "cifar10-lmt-wrn": ((38.67, 43.61, 66.65), "cifar10_lmt:net=wrn"),
    "cifar10-bcp-linf": ((63.50, 72.18, 75.80), "cifar10_bcp:net=4c3f,linf"),
    "tiny-imagenet-bcp-8c2f": ((71.24, 73.36, 79.92), "tiny_imagenet_bcp"),
    "tiny-imagenet-ibp-8c2f": ((99.5, 99.5, 99.5), "tiny_imagenet_l2"),
    "mnist-small-cap-50-tight-0.3": (
        *((14.29, 24.0, 41.36), "mnist_tightness:eps=0.3,net=small,projections=50"),
    ),
    "mnist-xlarge-crown-ibp-r-0.3": ((1.76, None, 6.64), "mnist_tightness:eps=0.3,net=xlarge"),
    "cifar10-large-cap-8": ((59.73, 68.8, 74.04), "cifar10_tightness:eps=8,net=large,baseline"),
    "mnist-family-j-crown-ibp-100": ((None, None, 9.21), "mnist_families:net=j,method=crown-ibp"),
    "mnist-family-c-crown-ibp": (
        *((None, None, 13.78), "mnist_families:net=c,method=crown-ibp,epochs=140"),
    ),
    "mnist-short-warmup-resnext-crown-ibp-0.4": (
        *((4.22, None, 15.24), "mnist_short_warmup:net=resnext,method=crown-ibp"),
    ),
    "cifar10-short-warmup-ibp-70": (
        *((58.72, None, 69.88), "cifar10_short_warmup:epochs=70,method=ibp"),
    ),
    "cifar10-short-warmup-init-relu-160": (
        *((53.29, None, 66.46), "cifar10_short_warmup:parts=init+relu"),
    ),
    "tiny-imagenet-short-warmup-wide-resnet": (
        *((74.59, None, 82.75), "tiny_imagenet_short_warmup:net=wide_resnet"),
    ),
    "mnist-ctbench-taps-0.3": ((1.44, None, 6.05), "mnist_ctbench:eps=0.3,method=taps"),
    "cifar10-ctbench-staps-8": ((48.51, None, 64.89), "cifar10_ctbench:eps=8,method=staps"),
    "tiny-imagenet-ctbench-crown-ibp": (
        *((71.56, None, 77.86), "tiny_imagenet_ctbench:method=crown-ibp"),
    ),
    "cifar10-expressive-mtl-ibp-8": (
        *((46.65, None, 64.56), "cifar10_expressive:eps=8,method=mtl-ibp"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    numbers, config = PUBLISHED[name]
    row = ROWS[name]
    assert row.published == numbers
    stem, _, arguments = config.partition(":")
    file, _, result = row.config.partition(".py")
    assert file == f"experiments/configs/{stem}"
    assert set(result.removeprefix(":").split(",")) == set(arguments.split(","))


def test_every_line_of_the_tables_has_a_row():
    counts = {
        "LANDSCAPE": 74,
        "STABILITY": 4,
        "LIPSCHITZ": 19,
        "TIGHTNESS": 24,
        "SHORT_WARMUP": 34,
        "CTBENCH": 30,
        "EXPRESSIVE": 4,
    }
    rows_of = collections.Counter(row.published for row in ROWS.values())
    cells = collections.Counter()
    for name, lines in counts.items():
        table = getattr(tables, name)
        result = [t[-1] for t in table] if name == "LANDSCAPE" else [table]
        numbers = [errors for part in result for errors in part.values()]
        assert len(numbers) == lines, name
        cells.update(numbers)
    for first, again, with_r, standard_r in tables.FAMILIES.values():
        cells.update(Numbers(*line) for line in ((None, None, first), (None, None, again)))
        cells.update([Numbers(standard_r, None, with_r)])
    assert cells <= rows_of


def test_random_networks_are_compared_with_every_cell_of_their_tables():
    """Accuracies as the thesis prints them; the configurations have these attacks."""
    attacked = {name: row for name, row in ROWS.items() if row.attacks}
    assert len(attacked) == 10
    for name, attack, accuracy in (
        ("mnist-adv-bnn", "eot-pgd-n20-eps0.36", 25.82),
        ("mnist-adv-bnn-graddiv", "eot-pgd-n20-eps0.36", 63.34),
        ("mnist-adv-bnn-graddiv", "eot-fgsm-n20-eps0.4", 92.32),
        ("mnist-rse", "eot-pgd-n10-eps0.32", 0.51),
        ("cifar10-adv-bnn", "eot-pgd-n5-eps0.07", 9.18),
        ("cifar10-adv-bnn-graddiv", "eot-pgd-n20-eps0.07", 8.6),
        ("cifar10-rse", "eot-pgd-n1-eps0.04", 14.06),
        ("cifar10-rse-graddiv", "eot-pgd-n20-eps0.05", 5.2),
        ("stl10-adv-bnn-graddiv", "eot-pgd-n20-eps0.03", 38.94),
        ("stl10-rse", "eot-fgsm-n20-eps0.01", 47.86),
    ):
        assert attacked[name].attacks[attack] == pytest.approx(100 - accuracy)
    for row in attacked.values():
        attacks = attacks_of(configuration(row), RandomOptions())
        assert set(row.attacks) <= {attack.name for attack in attacks}
        # The number that counts is among them.
        eps = configuration(row).robust.eps_test
        assert row.published.pgd == row.attacks[f"eot-pgd-n20-eps{eps:g}"]
    assert ROWS["cifar10-adv-train"].published == (21.17, 60.51, None)
    assert ROWS["stl10-undefended"].published == (24.31, 99.89, None)


def test_without_verified_errors_pgd_errors_are_compared():
    row = TINY._replace(published=Numbers(50.0, 1.0, None))
    assert not _found([0.0], row=row._replace(tolerance=0.5)).within
    assert _found([0.0], row=row._replace(tolerance=1.5)).within


def test_every_configuration_of_a_paper_is_a_row():
    folder = pathlib.Path(configs.__file__).parent
    files = {path.stem for path in folder.glob("*_*.py") if path.stem != "__init__"}
    files.remove("mnist_landscape")  # of figures, on another data set than the paper's
    used = {re.match(r"experiments/configs/(\w+)", row.config)[1] for row in ROWS.values()}
    assert used == files


def test_the_cheap_rows_are_those_of_two_cores():
    cheap = {name: row for name, row in ROWS.items() if row.budget == "cpu" and row is not TINY}
    for name, arguments, seeds in (
        ("mnist-ibp-0.1", "cpu60", 3),
        ("mnist-ibp-0.2", "cpu60,eps=0.2", 3),
        ("mnist-ibp-0.3", "cpu60,eps=0.3", 3),
        ("mnist-short-warmup-small-0.3", "cpu,eps=0.3", 3),
        ("mnist-short-warmup-small-ibp", "cpu,method=ibp", 3),
        ("mnist-family-a-fast", "net=a,method=fast", 3),
        ("mnist-family-b-ibp", "net=b,method=ibp", 3),
        ("mnist-family-b-one-step", "net=b,method=one-step,cpu", 3),
        ("mnist-family-a-crown-ibp-fused", "net=a,fused,epochs=140", 3),
        ("mnist-mlp-cap-50-tight", "cpu,projections=50", 3),
        ("mnist-bcp-small", "cpu", 3),
    ):
        assert cheap[name].config.partition(".py:")[2] == arguments
        assert cheap[name].seeds == seeds
    assert ROWS["mnist-ibp-0.3"].anchor == (5.93, None, 15.68)
    # By intervals alone, which is what bounds can be compared with.
    assert ROWS["cifar10-ctbench-sabr-2"].anchor == (22.14, None, 87.88)
    assert ROWS["cifar10-ctbench-sabr-2"].published == (22.14, None, 36.39)
    assert {row.config.split("/")[-1].split("_")[0] for row in cheap.values()} == {"mnist"}


def test_tables():
    text = """
             one          other
        a    1/2/3        10/20
        b    1/-/3        -
    """
    result = tables.table(text)
    assert result == {
        ("a", "one"): (1, 2, 3),
        ("a", "other"): (10, None, 20),
        ("b", "one"): (1, None, 3),
    }
    assert tables.table(text, accuracies=True)["a", "other"] == (90, None, 80)
    with pytest.raises(ValueError, match="zip"):
        tables.table("one other\na 1/2")


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
    main(["--list", "family-a", "--budget=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert all("mnist-family-a" in line for line in lines[2:])


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
        (["--list", "nothing"], "no row for --budget=gpu has 'nothing' in its name"),
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
    assert reproduction.ROWS is rows.ROWS

"""The files of a run folder: what is damaged is refused with one line that names the file."""

import copy
import json

import pytest
from summaries import ONE, SEVERAL

from experiments.evaluation import trained
from experiments.records.folder import Records, read_config
from experiments.run.summary import print_seeds, print_summary
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.quick

RECORD = {"step": 10, "epoch": 1, "seconds": 0.5, "eps": 0.01, "lr": 1e-3, "loss": 2.5}


@pytest.fixture
def folder(tmp_path):
    """Of a run of one seed."""
    return Records(tmp_path, from_config_dict({}))


@pytest.fixture
def folder_of_seeds(tmp_path):
    return Records(tmp_path, from_config_dict({"seeds": 2}))


def refusal(read, path, match):
    with pytest.raises(ExperimentError, match=match) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))


def changed(content, key, *value):
    """A copy with a dotted key changed, or removed where no value is left."""
    content = copy.deepcopy(content)
    *groups, last = key.split(".")
    group = content
    for name in groups:
        group = group[name]
    group.pop(last)
    if value:
        group[last] = value[0]
    return content


TEXTS = {
    "empty": (b"", "expected JSON, got something else"),
    "cut": (b'{"norm": "in', "expected JSON, got something else"),
    "a list": (b"[]", r"expected a JSON object, got \[\]"),
    "a number": (b"5", "expected a JSON object, got 5"),
    "NaN": (b'{"eps_test": NaN}', "expected JSON, got the number NaN"),
    "a key twice": (b'{"norm": "2", "norm": "inf"}', "expected every key once, got 'norm' twice"),
    "no text": (b"\xff\xfe\x00", "can't decode byte"),
    "deep": (b"[" * 100_000, "expected JSON, got something else"),
    "huge": (b'{"seed": ' + b"1" * 5000 + b"}", "integers of 64 bits, got one of 5000 digits"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_json_that_is_damaged_is_refused(folder, what):
    text, match = TEXTS[what]
    summary, config = folder.path / "summary.json", folder.path / "config.json"
    summary.write_bytes(text)
    refusal(folder.summary, summary, match)
    config.write_bytes(text)
    refusal(lambda: read_config(folder.path), config, match)
    refusal(lambda: Records(folder.path, folder.config), config, match)


def test_folders_in_place_of_files_are_refused(folder):
    for name, read in (
        ("summary.json", folder.summary),
        ("metrics.jsonl", folder.metrics),
        ("config.json", lambda: read_config(folder.path)),
    ):
        (folder.path / name).mkdir()
        refusal(read, folder.path / name, r"cannot be read \(Is a directory\)")


def test_summaries_are_read(folder, folder_of_seeds, capsys):
    path = folder.path / "summary.json"
    assert folder.summary() is None
    without_data = changed(ONE, "data")
    for summary in (ONE, without_data, ONE | {"clip": None, "norm": "2", "since": "0.3"}):
        path.write_text(json.dumps(summary))
        assert folder.summary() == summary
        print_summary(folder.summary(), folder.path)
    path.write_text(json.dumps(SEVERAL))
    assert folder_of_seeds.summary() == SEVERAL
    print_seeds(folder_of_seeds.summary(), folder.path)
    assert "62.50 %" in capsys.readouterr().out


LABEL = "results.last epoch (3)"
WRONG = {
    "experiment": (None, 1, "", "a\nb"),
    "test_images": (0, 1.5, "360"),
    "norm": ("1", 2, None),
    "eps_test": (-0.1, "0.02", True, None),
    "clip": ([0.0], "0, 1", [0.0, "1"], True),
    "bounds": (None, "interval", [1]),
    "attack": (None, []),
    "versions": ({}, [], "0.11.2", {"jax": "0.11.2"}),
    "train_seconds": (-1, "1.5", None, [1.5]),
    "finished": (None, 20261128),
}
WRONG_ONE = WRONG | {
    "results": ({}, [], None, "none"),
    "seed": (None, "0", 0.5),
    "parameters_sha256": (None, 0, ["0" * 64]),
    "evaluation_seconds": ("2.5", None),
    LABEL: ([], None, 0.5),
    f"{LABEL}.pgd_error": (None, -0.1, 1.1, "0.5", [0.5]),
    f"{LABEL}.verified_error_by": ({}, [], None, {"interval": 0.625}, {"interval": "0.6"}),
}
WRONG_SEVERAL = WRONG | {
    "data": (None, 1),
    "seeds": ([], "0", 2, [0, "1"], [0, 1, 2]),
    "errors": ([], None, {}),
    "errors.pgd_error": (0.375, [0.375], [0.375, None], [0.375, 2.0]),
    "mean": ([0.25], 0.25, {}),
    "mean.standard_error": (None, [0.25], -1),
    "std.verified_error": (None, "0", -1.0),
}


def wrong(values):
    return [
        pytest.param(key, value, id=f"{key}={value!r}")
        for key, choices in values.items()
        for value in choices
    ]


@pytest.mark.parametrize(("key", "value"), wrong(WRONG_ONE))
def test_a_summary_that_is_damaged_is_refused(folder, key, value):
    path = folder.path / "summary.json"
    name = key.split(".")[-1].removeprefix("last ").split(" (")[0]
    path.write_text(json.dumps(changed(ONE, key, value)))
    refusal(folder.summary, path, rf"({name}|results) .*; delete it to evaluate the run again$")
    if key != LABEL:
        path.write_text(json.dumps(changed(ONE, key)))
        refusal(folder.summary, path, rf"{name} is missing, expected")


@pytest.mark.parametrize(("key", "value"), wrong(WRONG_SEVERAL))
def test_a_summary_of_seeds_that_is_damaged_is_refused(folder_of_seeds, key, value):
    path = folder_of_seeds.path / "summary.json"
    name = key.split(".")[-1]
    path.write_text(json.dumps(changed(SEVERAL, key, value)))
    expected = rf"({name}|errors)\S* .*; delete it to evaluate the run again$"
    refusal(folder_of_seeds.summary, path, expected)
    path.write_text(json.dumps(changed(SEVERAL, key)))
    refusal(folder_of_seeds.summary, path, rf"{name} is missing, expected")


def test_summaries_of_one_and_of_several_seeds_are_not_taken_for_each_other(tmp_path):
    path = tmp_path / "summary.json"
    for seeds, summary, match in ((1, SEVERAL, "results is missing"), (2, ONE, "seeds is missing")):
        path.write_text(json.dumps(summary))
        refusal(Records(tmp_path, from_config_dict({"seeds": seeds})).summary, path, match)


def test_a_line_that_a_kill_cut_short_is_left_out(folder):
    path, line = folder.path / "metrics.jsonl", json.dumps(RECORD)
    assert folder.metrics() == []
    for end in ("", "\n", '\n{"step": 2', "\n{", "\n\0\0\0"):
        path.write_text(f"{line}\n{line}{end}")
        assert folder.metrics() == [RECORD, RECORD]
    path.write_text("")
    assert folder.metrics() == []
    path.write_text(f'{line}\n{{"step": 2')
    folder.drop_metrics_after(20)
    assert path.read_text() == f"{line}\n"


@pytest.mark.parametrize(
    ("damaged", "match"),
    [
        (b"", "expected JSON"),
        (b"5", "expected a JSON object, got 5"),
        (b"[]", "expected a JSON object"),
        (b"\xff", "can't decode byte"),
        (b'{"step": 20, "ep', "expected JSON"),
        (b"{}", "step is missing"),
        (b'{"step": 20, "eps": 0.1}', "epoch is missing"),
        (b'{"step": 20, "epoch": 2}', "eps is missing"),
        (b'{"step": "20", "epoch": 2, "eps": 0.1}', "step must be an integer >= 0, got '20'"),
        (b'{"step": -1, "epoch": 2, "eps": 0.1}', "step must be an integer >= 0, got -1"),
        (b'{"step": 20, "epoch": null, "eps": 0.1}', "epoch must be an integer >= 0, got None"),
        (b'{"step": 20, "epoch": 2, "eps": "0"}', "eps must be a finite number, got '0'"),
        (b'{"step": 20, "epoch": 2, "eps": 0.1, "loss": [1]}', "loss must be a finite number"),
        (b'{"step": 20, "epoch": 2, "eps": 0.1, "loss": NaN}', "got the number NaN"),
        (b'{"step": 20, "epoch": 2, "eps": 0.1, "loss": 1e999}', "loss must be a finite number"),
    ],
)
def test_records_that_are_damaged_are_refused(folder, damaged, match):
    """Those behind a damaged line would be lost without a word, and the run's curves with them."""
    path, line = folder.path / "metrics.jsonl", json.dumps(RECORD).encode()
    for content in (line + b"\n" + damaged + b"\n" + line + b"\n", line + b"\n" + damaged + b"\n"):
        path.write_bytes(content)
        refusal(folder.metrics, path, rf"metrics\.jsonl, line 2: .*{match}.*; delete that line$")
        refusal(lambda: folder.drop_metrics_after(20), path, "line 2")
        assert path.read_bytes() == content


def test_a_configuration_that_is_damaged_names_its_file(tmp_path):
    path = tmp_path / "config.json"
    for content, match in (
        ({"train": {"epochs": "20"}}, "config.train.epochs: expected int, got '20'"),
        ({"train": 20}, "config.train: expected a group of settings, got 20"),
        ({"optim": {"learning_rate": 0.1}}, "unknown config key optim.learning_rate"),
        ({"robust": {"eps_test": -1.0}}, "config.robust.eps_test must be >= 0, got -1.0"),
    ):
        path.write_text(json.dumps(content))
        refusal(lambda: trained.load(tmp_path), path, match)

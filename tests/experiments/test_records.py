"""What every command writes and says in the same way: whole files, errors of one line."""

import ast

import jax.numpy as jnp
import pytest
from summaries import ONE

from experiments.cluster import distributed
from experiments.records import files
from experiments.records.folder import Records
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError, fail, one_line

pytestmark = pytest.mark.quick

LINES = [
    {"step": 10, "epoch": 1, "eps": 0.1, "loss": 2.0},
    {"step": 20, "epoch": 2, "eps": 0.1, "loss": 1.0},
]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.md"
    files.replace_text(path, "one ± 1\n")
    assert path.read_text(encoding="utf-8") == "one ± 1\n"

    def killed(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, killed)
    assert path.read_text(encoding="utf-8") == "one ± 1\n"
    left = tmp_path / files.temporary_name(path.name)
    assert left.read_bytes() == b"half"
    files.replace(path, lambda stream: stream.write(b"two"))  # takes the place of what was left
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]


def test_a_folder_that_is_not_there_is_no_place_for_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.replace_text(tmp_path / "none" / "file", "text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ExperimentError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
        ("text", "text"),
    ],
)
def test_an_error_is_said_in_one_line_and_ends_the_command(error, text, capsys):
    assert one_line(error) == text
    with pytest.raises(SystemExit) as ended:
        fail(error)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {text}\n")


def test_records_of_a_run_are_what_was_written(tmp_path):
    records = Records(tmp_path / "run", Config())
    assert not records.path.exists()
    records.create()
    for line in LINES:
        records.append_metrics(line)
    with (records.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "lo')  # as a kill leaves it
    assert records.metrics() == LINES
    records.drop_metrics_after(10)
    assert Records(records.path, Config()).metrics() == LINES[:1]
    drawn = []
    records.draw_curves(lambda metrics, path: drawn.append((metrics, path.name)))
    assert drawn == [(LINES[:1], "curves.png")]
    assert records.summary() is None
    records.write_summary(ONE)
    assert records.summary() == ONE
    assert not records.has_checkpoints
    records.close()  # nothing was opened: nothing is left behind
    assert not records.has_checkpoints


def test_a_run_goes_on_from_its_latest_checkpoint(tmp_path):
    first, selected = {"weights": jnp.zeros(3)}, {"epoch": jnp.zeros(())}
    with Records(tmp_path, Config()) as records:
        records.create()
        records.append_metrics(LINES[0])  # of a run whose checkpoints were deleted
        assert records.resume(first, selected) == (first, selected, 0.0)
        assert records.metrics() == []
        for line in LINES:
            records.append_metrics(line)
        records.save(10, {"weights": jnp.ones(3)}, selected, 2.5)
    with Records(tmp_path, Config()) as records:
        state, _, seconds = records.resume(first, selected)
        assert (state["weights"].tolist(), seconds) == ([1.0, 1.0, 1.0], 2.5)
        assert records.metrics() == LINES[:1]


def test_another_process_writes_no_file(tmp_path, monkeypatch):
    written = Records(tmp_path, Config())
    written.create()
    written.append_metrics(LINES[0])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    other = Records(tmp_path, Config())
    other.create()
    other.append_metrics(LINES[1])
    other.drop_metrics_after(0)
    other.draw_curves(lambda metrics, path: path.write_bytes(b"figure"))
    other.write_summary({"finished": "now"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert other.metrics() == LINES[:1]


def test_only_the_records_ask_which_process_writes(project):
    asking = {
        path.relative_to(project).as_posix()
        for path in (project / "experiments").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if getattr(node, "attr", getattr(node, "id", None)) == "is_main"
    }
    assert asking == {"experiments/cluster/distributed.py", "experiments/records/folder.py"}

"""The documents' code runs, and the README shows what its example prints."""

import contextlib
import io
import re

import pytest

import boundjax
from boundjax.ir import table
from experiments import data, methods, models
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """An op that a document registers must not stay for the other tests."""
    monkeypatch.setattr(table, "_TABLE", {k: list(v) for k, v in table._TABLE.items()})


def test_the_readme_example_prints_what_the_readme_shows(project):
    (code,) = blocks(project / "README.md", "python")
    (expected,) = blocks(project / "README.md", "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_the_readme_has_two_set_up_commands_of_one_line(project):
    commands = blocks(project / "README.md", "sh")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")


def test_the_code_in_contributing_runs(project, monkeypatch, tmp_path):
    code = blocks(project / "CONTRIBUTING.md", "python")
    assert len(code) == 6
    for block in code:
        namespace = {}
        exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
        if "get_config" in namespace:
            assert namespace["get_config"]("cpu").train.epochs == 2
        if "HINGE" in namespace:
            monkeypatch.setitem(methods.METHODS, "hinge", namespace["HINGE"])
            config = from_config_dict({"robust": {"method": "hinge"}})
            assert len(methods.create(models.create("tiny"), config).objectives) == 3
        if "KMNIST" in namespace:
            monkeypatch.setitem(data.DATASETS, "kmnist", namespace["KMNIST"])
            config = from_config_dict({"data": {"name": "kmnist", "dir": str(tmp_path)}}).data
            with pytest.raises(ExperimentError, match="Kuzushiji-MNIST is read from"):
                data.load(config)
        if "certificate" in namespace:
            assert namespace["certificate"].verified.all()


def test_the_table_of_ops_is_what_supported_ops_prints(project):
    (table,) = blocks(project / "docs" / "ops.md", "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        boundjax.supported_ops()
    assert printed.getvalue() == table, (
        "write the output of boundjax.supported_ops() to docs/ops.md"
    )

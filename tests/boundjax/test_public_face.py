"""`import boundjax`: its public names, lazy loading, and what static tools see."""

import ast
import inspect
import json
import pydoc
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import boundjax

pytestmark = pytest.mark.quick

NAMES = [name for name in dir(boundjax) if not name.startswith("_")]


def _python(*arguments):
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_names_and_help_are_the_public_ones():
    assert {"certify", "linear", "interval", "Threat", "LpBall", "Certificate"} <= set(NAMES)
    assert not {"sets", "transforms", "certification", "jax"} & set(NAMES)
    text = pydoc.plain(pydoc.render_doc(boundjax))
    for name in NAMES:
        assert name in text, name
    assert "Certifies that a classifier's decision cannot change within a radius." in text


@pytest.mark.parametrize("name", NAMES)
def test_static_tools_see_every_name(name):
    stub = ast.parse(Path(boundjax.__file__).with_suffix(".pyi").read_text())
    listed = {a.asname for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert name in listed


def test_every_class_that_a_public_function_returns_is_public():
    public = {getattr(boundjax, name) for name in NAMES}
    functions = [f for f in map(boundjax.__getattr__, NAMES) if inspect.isfunction(f)]
    returned = set()
    for function in functions:
        result = typing.get_type_hints(function)["return"]
        parts = [result, typing.get_origin(result), *typing.get_args(result)]
        classes = [part for part in parts if inspect.isclass(part)]
        returned |= {part for part in classes if part.__module__.startswith("boundjax")}
    assert returned
    assert returned <= public


def test_certify_is_the_function_and_no_module():
    program = "import boundjax.certify"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "No module named 'boundjax.certify'" in result.stderr


def test_the_table_of_ops_is_complete_whichever_name_comes_first(capsys):
    # JAX is loaded once; boundjax is imported anew for each name.
    program = f"""
import contextlib, io, json, sys
tables = {{}}
for name in {NAMES!r}:
    for module in [m for m in sys.modules if m.partition(".")[0] == "boundjax"]:
        del sys.modules[module]
    import boundjax
    getattr(boundjax, name)
    with contextlib.redirect_stdout(io.StringIO()) as table:
        boundjax.supported_ops()
    tables[name] = table.getvalue()
print(json.dumps(tables))
"""
    tables = json.loads(_python("-W", "ignore", "-c", program))
    assert set(tables) == set(NAMES)
    boundjax.supported_ops()
    assert set(tables.values()) == {capsys.readouterr().out}


@pytest.mark.parametrize(
    "program",
    [
        "import boundjax; dir(boundjax)",
        "from boundjax import vnnlib; vnnlib.parse",
        "from boundjax.verify.__main__ import _parser; _parser().format_help()",
    ],
)
def test_what_needs_no_jax_starts_without_it(program):
    loaded = _python("-c", f"{program}; import sys; print('jax' in sys.modules)")
    assert loaded.strip() == "False"


def test_the_verifier_answers_help():
    assert "--instances" in _python("-m", "boundjax.verify", "--help")

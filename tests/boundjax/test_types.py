"""The types that checkers and editors infer for the bounds that transforms return."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import boundjax as bj
from boundjax.transforms.linear import LinearOptions, RelaxOptions

PROJECT = Path(__file__).resolve().parents[2]

# Each line of `REVEALED` is an expression and its type.
PREAMBLE = """
import jax
import jax.numpy as jnp
from jax import Array

import boundjax as bj

x = jnp.ones(3)
box = bj.Box(x, x)
ball = bj.LpBall(x, 0.1)
rows = jnp.eye(3)
key = jax.random.key(0)


def layer(x: Array) -> Array:
    return jax.nn.relu(x)


def pair(x: Array) -> tuple[Array, Array]:
    return x, jax.nn.relu(x)


def without_annotations(x):
    return jax.nn.relu(x)


def rows_or_none() -> Array | None: ...
def flag() -> bool: ...
"""
REVEALED = """
bj.linear(layer)(box).lower -> Array
bj.linear(layer)(ball, rows) -> Interval
bj.linear(layer)(ball, rows_or_none()) -> Interval
bj.linear(lambda x: jnp.tanh(x))(ball) -> Interval
bj.linear(lambda x: jax.nn.relu(x @ rows))(ball) -> Interval
bj.linear(jax.nn.relu)(ball) -> Interval
bj.linear(without_annotations)(ball) -> Interval
bj.linear(pair)(ball) -> Any
bj.linear(pair)(ball, rows) -> Interval
bj.linear(layer, slopes="parallel", intermediate="forward", sides="lower")(ball) -> Interval
bj.linear(layer, slopes=bj.optimized(steps=3), max_rows=2)(ball) -> Interval
bj.linear(layer, has_aux=True)(ball) -> tuple[Interval, Auxiliary]
bj.linear(layer, has_aux=True)(ball, rows)[1].pre_activations -> dict[str, Interval]
bj.linear(layer, has_aux=flag())(ball) -> Interval | tuple[Interval, Auxiliary]
jax.vmap(bj.linear(layer))(ball) -> Interval
bj.relax(layer)(ball).bounds() -> Interval
bj.relax(layer, known=None)(ball).bounds(rows) -> Interval
bj.relax(pair)(ball).bounds() -> Any
bj.relax(pair)(ball).bounds(rows, has_aux=True) -> tuple[Interval, Auxiliary]
bj.interval(layer)(box) -> Interval
bj.interval(pair)(box) -> Any
bj.interval(layer, has_aux=True)(box)[1] -> dict[str, Interval]
bj.forward_linear(layer)(box, rows) -> Interval
bj.forward_linear(layer, slopes="zero", has_aux=True)(box) -> tuple[Interval, LinearBounds]
bj.lipschitz(layer)(ball) -> BallBox
bj.lipschitz(layer)(ball, rows) -> Interval
bj.lipschitz(layer, box=False, has_aux=True)(ball)[1] -> LipschitzAuxiliary
bj.estimate(layer, key)(ball) -> Estimate
bj.estimate(layer, key, sides="lower", has_aux=True)(ball, rows)[1] -> EstimateAuxiliary
bj.margin_specification(jnp.int32(0), 3) -> Array
"""
# Each line is an error.
REFUSED = """
bj.linear(layer, slopes="adaptve")
bj.linear(layer, intermediate="intervals")
bj.linear(layer, sides="left")
bj.linear(layer, slope="zero")
bj.relax(layer, has_aux=True)
bj.estimate(layer, key, sides="upper")
bj.margin_specification(jnp.int32(0), 3, rows="some")
bj.estimate(layer, key)(ball).lower
"""


@pytest.fixture(scope="module")
def diagnostics(tmp_path_factory):
    """What pyright says about the lines above: expression -> its messages."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install -e '.[dev]'")
    revealed = [line.rsplit(" -> ", 1)[0] for line in REVEALED.strip().splitlines()]
    refused = REFUSED.strip().splitlines()
    lines = [*PREAMBLE.splitlines(), *(f"reveal_type({line})" for line in revealed), *refused]
    snippet = tmp_path_factory.mktemp("types") / "snippet.py"
    snippet.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, str(snippet)], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    start = done.stdout.find("{")
    if start < 0:
        pytest.skip(f"pyright does not start: {(done.stderr or done.stdout).strip()[-200:]}")
    messages = {}
    for entry in json.loads(done.stdout[start:])["generalDiagnostics"]:
        line = lines[entry["range"]["start"]["line"]]
        messages.setdefault(line, []).append((entry["severity"], entry["message"]))
    return messages


def test_bounds_have_the_types_of_what_is_bounded(diagnostics):
    for line in REVEALED.strip().splitlines():
        expression, expected = line.rsplit(" -> ", 1)
        ((severity, message),) = diagnostics[f"reveal_type({expression})"]
        assert severity == "information", message
        assert re.search('is "(.*)"$', message)[1] == expected, line


def test_options_that_do_not_exist_are_errors(diagnostics):
    for line in REFUSED.strip().splitlines():
        assert any(severity == "error" for severity, _ in diagnostics.get(line, ())), line


def test_nothing_else_is_an_error(diagnostics):
    errors = {
        line: result
        for line, result in diagnostics.items()
        if any(severity == "error" for severity, _ in result)
    }
    assert set(errors) == set(REFUSED.strip().splitlines())


@pytest.mark.parametrize(
    ("function", "options", "further"),
    [(bj.linear, LinearOptions, {"has_aux"}), (bj.relax, RelaxOptions, set())],
)
def test_typed_options_are_those_of_the_function(function, options, further):
    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert set(keywords) == set(options.__annotations__) | further
    for name, annotation in options.__annotations__.items():
        assert annotation.__forward_arg__ == keywords[name]

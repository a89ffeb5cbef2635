"""The scripts of the competition, and the harness that kills and scores them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import harness

TINY = """(declare-const X_0 Real)
(declare-const Y_0 Real)
(assert (>= X_0 0))
(assert (<= X_0 1))
(assert (>= Y_0 {least}))
"""


def tool(folder, run, prepare="exit 0"):
    """A folder with scripts that do this."""
    folder.mkdir()
    for name, body in (("prepare_instance.sh", prepare), ("run_instance.sh", run)):
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return folder


def benchmark(folder, known):
    """A list of instances whose files are not read."""
    folder.mkdir()
    rows = "".join(f"n.onnx,{k}.vnnlib,1,{result}\n" for k, result in enumerate(known))
    path = folder / "instances.csv"
    path.write_text("onnx,vnnlib,timeout,known_result\n" + rows)
    return path


@pytest.mark.parametrize(
    ("run", "summary"),
    [
        ('echo unsat >"$5"', "bench: -130 of 40 points; 4 unsat, 1 wrong"),
        ('echo unknown >"$5"', "bench: 0 of 40 points; 4 unknown"),
        ("exit 3", "bench: 0 of 40 points; 4 no answer"),
        ('case $4 in *1.vnnlib) echo sat ;; *) echo unsat ;; esac >"$5"', "bench: 30 of 40"),
    ],
)
def test_answers_are_scored(run, summary, tmp_path, capsys):
    scripts = tool(tmp_path / "tool", run)
    path = benchmark(tmp_path / "bench", ["unsat", "sat", "unsat", "unknown"])
    results = tmp_path / "rows.csv"
    harness.main([str(path), f"--scripts={scripts}", f"--results={results}"])
    assert capsys.readouterr().out.startswith(summary)
    with results.open() as file:
        assert len(list(csv.reader(file))) == 5


def test_what_runs_past_its_limit_is_killed_with_its_children(tmp_path, capsys):
    mark = tmp_path / "mark"
    scripts = tool(tmp_path / "tool", f'(sleep 3; touch {mark}) & echo timeout >"$5"; sleep 60')
    path = benchmark(tmp_path / "bench", ["unsat"])
    harness.main([str(path), f"--scripts={scripts}"])
    assert capsys.readouterr().out == "bench: 0 of 10 points; 1 timeout\n"
    process = subprocess.run(["sleep", "4"], check=True)
    assert process.returncode == 0
    assert not mark.exists()


def test_the_scripts_decide(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    opset = [helper.make_opsetid("", 13)]
    folder = tmp_path / "tiny"
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "n.onnx")
    for name, least in (("low", 0.5), ("high", 1.5)):
        (folder / f"{name}.vnnlib").write_text(TINY.format(least=least))
    path = folder / "instances.csv"
    path.write_text("n.onnx,low.vnnlib,120\nn.onnx,high.vnnlib,120\n")
    harness.main([str(path)])
    assert capsys.readouterr().out == "tiny: 0 of 20 points; 1 sat, 1 unsat\n"


def test_an_error_is_a_result(tmp_path):
    result = tmp_path / "result.txt"
    done = subprocess.run(
        [harness.SCRIPTS / "run_instance.sh", "v1", "c", "no.onnx", "no.vnnlib", result, "5"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "no.onnx" in done.stderr
    assert result.read_text() == "error\n"


@pytest.mark.parametrize(
    ("script", "arguments", "output"),
    [
        ("install_tool.sh", ["--dry-run", "v1"], "-m pip install"),
        ("prepare_instance.sh", ["--dry-run", "v1", "c", "n", "p"], ""),
        ("run_instance.sh", ["--dry-run", "v1", "c", "n", "p", "r", "10"], "--timeout 9.5"),
        ("run_instance.sh", ["--dry-run", "v1", "c", "n", "p", "r", "0.6"], "--timeout 0.3"),
    ],
)
def test_dry_runs(script, arguments, output):
    done = subprocess.run(
        [harness.SCRIPTS / script, *arguments], capture_output=True, text=True, check=True
    )
    assert output in done.stdout
    wrong = subprocess.run(
        [harness.SCRIPTS / script, "v9"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: expected ")

"""A batch run of the command, and the results file that it leaves however it ends."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import boundjax.verify.__main__ as command
from boundjax import verify
from boundjax.verify import batch, benchmark

pytestmark = pytest.mark.quick

PROPERTY = (
    "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (<= 0 X_0) (<= X_0 1)))"
    "(assert (<= Y_0 0))"
)
# The command with a network that finds a counterexample, then refutes, then never answers.
PROGRAM = """
import sys, time
import numpy as np
import boundjax.verify.__main__ as command
from boundjax import verify
from boundjax.verify import benchmark

class Network:
    def __init__(self, path, rounding="float32"):
        self.path = path

    def verify(self, property, method, timeout):
        if self.path.name == "stuck.onnx":
            time.sleep(600)
        if self.path.name == "sat.onnx":
            found = verify.Counterexample(np.float32([0.5]), np.float32([-1.0]))
            return verify.Result("sat", found, 0.0, "the attack failed")
        return verify.Result("unsat", None, 0.0)

benchmark.Network = Network
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "p.vnnlib").write_text(PROPERTY)
    path = tmp_path / "instances.csv"
    path.write_text(
        "onnx,vnnlib,timeout,known_result\nsat.onnx,p.vnnlib,1,sat\nunsat.onnx,p.vnnlib,1,unsat\n"
        "stuck.onnx,p.vnnlib,1,sat\nunsat.onnx,p.vnnlib,1,unsat\n"
    )
    return path


def until(condition, process):
    """Waits until the condition holds; the process must not end before."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_done_stays_whatever_ends_a_run(number, listed, tmp_path, project):
    results = tmp_path / "results.csv"
    arguments = ["--instances", str(listed), "--results", str(results)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=project,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    with process:
        # Both rows are in the file while the third instance is still running.
        until(lambda: results.exists() and results.read_text().count("\n") == 3, process)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    rows = [line.rpartition(",")[0] for line in results.read_text().splitlines()]
    assert rows == [
        "onnx,vnnlib,verdict",
        "sat.onnx,p.vnnlib,sat",
        "unsat.onnx,p.vnnlib,unsat",
    ]
    (counterexample,) = (tmp_path / "results_counterexamples").iterdir()
    assert counterexample.name == "0_sat_p.counterexample"
    assert counterexample.read_text() == "sat\n((X_0 0.5)\n(Y_0 -1.0))\n"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    lines = printed.splitlines()
    assert lines[0].startswith("0 sat.onnx p.vnnlib sat 0.0 the attack failed")
    assert lines[-1] == f"interrupted by {number.name} at row 2 of 4"
    summary = dict(line.split() for line in lines[3:-1])
    assert summary["instances"] == "2"
    assert summary["agreed"] == "2"


class Solving:
    def __init__(self, path, rounding="float32"):
        self.path = path

    def verify(self, property, method, timeout):
        return verify.Result("unsat", None, 0.0)


def test_results_of_another_run_are_not_overwritten(listed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "Network", Solving)
    results = tmp_path / "results.csv"
    arguments = ["--instances", str(listed), "--results", str(results)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert command.main(arguments) == 1  # two known ones are sat
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    before = results.read_text()
    assert before.count("\n") == 5
    capsys.readouterr()
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert "expected a new file" in error
    assert error.count("\n") == 1
    assert results.read_text() == before


def test_a_list_that_cannot_be_read_begins_no_results(tmp_path, capsys):
    (tmp_path / "instances.csv").write_text("onnx,vnnlib,timeout\na.onnx\n")
    results = tmp_path / "results.csv"
    arguments = ["--instances", str(tmp_path / "instances.csv"), "--results", str(results)]
    assert command.main(arguments) == 2
    assert not results.exists()
    capsys.readouterr()


def test_an_answer_names_what_the_search_did_without(monkeypatch):
    noted = verify.Result("unsat", None, 0.0, "no gradient")

    class Noting(Solving):
        def verify(self, property, method, timeout):
            return noted

    monkeypatch.setattr(benchmark.vnnlib, "load", lambda path: None)
    instance = benchmark.Instance("a.onnx", "p.vnnlib", 1.0)
    (answer,) = benchmark.run_instances([instance], "crown", Noting)
    assert answer.message == "no gradient"
    assert answer.result is noted
    assert np.isfinite(answer.seconds)


def test_an_interruption_inside_of_the_run_loses_nothing(listed, tmp_path, monkeypatch, capsys):
    class Interrupting(Solving):
        def verify(self, property, method, timeout):
            if self.path.name == "stuck.onnx":
                raise KeyboardInterrupt
            return super().verify(property, method, timeout)

    monkeypatch.setattr(benchmark, "Network", Interrupting)
    results = tmp_path / "results.csv"
    status = command.main(["--instances", str(listed), "--results", str(results)])
    assert status == 128 + signal.SIGINT
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted by SIGINT at row 2 of 4"
    assert results.read_text().count("\n") == 3


def test_names_with_commas_and_long_names(tmp_path):
    results = batch.Results(tmp_path / "r.csv")
    files = tmp_path / "a,b.onnx", tmp_path / f"{'p' * 240}.vnnlib.gz"
    results.add_counterexample(7, *files, "sat\n")
    results.add(7, *files, "sat", 1.0)
    results.close()
    with (tmp_path / "r.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["a,b.onnx", files[1].name, "sat", "1.000"]
    (written,) = (tmp_path / "r_counterexamples").iterdir()
    assert written.name == f"7_a,b_{'p' * 80}.counterexample"


def test_handlers_of_signals_are_given_back_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(OSError, match="full"), batch.interruptible(lambda number: None):
        raise OSError("full")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1

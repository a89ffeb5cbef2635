"""A batch run of the command: time limits, crashes, signals, and the files that it leaves."""

import csv
import os
import signal
import subprocess
import sys
import time

import fake_worker
import pytest

import boundjax
from boundjax.verify import __main__ as command
from boundjax.verify import batch, instances, messages, supervisor
from boundjax.verify.errors import VerifyError

pytestmark = pytest.mark.quick

# The command with a worker that needs no JAX, in a process of its own.
PROGRAM = f"""
import sys
from boundjax.verify import __main__ as command
status = command.main(sys.argv[1:], worker={fake_worker.COMMAND!r})
assert "jax" not in sys.modules
sys.exit(status)
"""


@pytest.fixture
def listed(tmp_path):
    """Lists instances, by the names of the networks of `fake_worker`; returns flags."""

    def write(*names, timeout=60.0, known=""):
        (tmp_path / "p.vnnlib").write_text(fake_worker.PROPERTY)
        rows = [f"{name}.onnx,p.vnnlib,{timeout},{known}\n" for name in names]
        (tmp_path / "instances.csv").write_text(
            "onnx,vnnlib,timeout,known_result\n" + "".join(rows)
        )
        return [
            *("--instances", str(tmp_path / "instances.csv")),
            *("--results", str(tmp_path / "results.csv")),
        ]

    return write


def run(arguments):
    return command.main(arguments, worker=fake_worker.COMMAND)


def rows_of(path):
    """Network and verdict of each row."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["onnx", "vnnlib", "verdict", "seconds"]
    return [(row[0].removesuffix(".onnx"), row[2]) for row in rows]


def until(condition, process):
    """Waits until the condition holds; the process must not end before."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid):
    """Whether a process still runs; one that ended may wait for its parent to notice."""
    result = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()[:1] not in ("", "Z")


def ends(pid):
    """Waits until a process has ended."""
    end = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < end, pid
        time.sleep(0.02)
    return True


# --- limits and crashes ------------------------------------------------------------------------


def test_a_limit_holds_and_costs_one_row(listed, tmp_path, capsys):
    names = ("unsat", "sleeps", "never_yields", "heavy", "unsat")
    arguments = listed(*names, timeout=0.5)
    began = time.monotonic()
    assert run(arguments) == 0
    assert time.monotonic() - began < 60  # every sleep is ten minutes
    verdicts = ("unsat", "timeout", "timeout", "timeout", "unsat")
    assert rows_of(tmp_path / "results.csv") == list(zip(names, verdicts, strict=True))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.partition("stopped while ")[2] for line in lines[:5]] == [
        "", "searching", "searching", "reading", "",
    ]  # fmt: skip
    with (tmp_path / "results.csv").open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert all(s >= 0.5 for s in seconds[1:4])
    assert all(ends((tmp_path / f"{name}.pid").read_text()) for name in names[1:4])
    # Other output of a worker must not be read as a message.
    assert "printed while starting" in err
    assert "printed" not in out


def test_compilation_may_be_excluded_from_the_limit(listed, tmp_path, monkeypatch, capsys):
    arguments = listed("compiles", timeout=0.2)
    assert run(arguments) == 0
    assert rows_of(tmp_path / "results.csv") == [("compiles", "timeout")]
    (tmp_path / "results.csv").unlink()
    assert run([*arguments, "--exclude-compilation"]) == 0
    assert rows_of(tmp_path / "results.csv") == [("compiles", "unsat")]
    one = "--onnx", str(tmp_path / "compiles.onnx"), "--vnnlib", str(tmp_path / "p.vnnlib")
    capsys.readouterr()
    assert run([*one, "--timeout", "5", "--exclude-compilation"]) == 0
    assert capsys.readouterr().out == "unsat\n"
    # No worker compiles for ever.
    monkeypatch.setattr(supervisor, "COMPILATION_LIMIT", 0.1)
    (tmp_path / "results.csv").unlink()
    assert run([*listed("sleeps", timeout=0.2), "--exclude-compilation"]) == 0
    assert rows_of(tmp_path / "results.csv") == [("sleeps", "timeout")]


@pytest.mark.parametrize(
    ("name", "cause"), [("crashes", "SIGKILL, perhaps because memory ran out"), ("exits", "3")]
)
def test_a_crash_costs_one_row(name, cause, listed, tmp_path, capsys):
    assert run(listed("unsat", name, "sat")) == 0
    verdicts = [("unsat", "unsat"), (name, "error"), ("sat", "sat")]
    assert rows_of(tmp_path / "results.csv") == verdicts
    line = capsys.readouterr().out.splitlines()[1]
    assert "the worker crashed while searching: " in line
    assert line.endswith(cause)


def test_an_exception_is_the_rows_verdict_and_the_worker_goes_on(listed, tmp_path, capsys):
    assert run(listed("raises", "unsat")) == 0
    assert rows_of(tmp_path / "results.csv") == [("raises", "error"), ("unsat", "unsat")]
    assert "op 'f' is not supported: use another" in capsys.readouterr().out
    pids = {path.read_text() for path in tmp_path.glob("*.pid")}
    assert len(pids) == 1


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("raise SystemExit(5)", "exit status 5"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
)
def test_a_worker_that_cannot_start_ends_the_run(program, cause, listed, tmp_path, capsys):
    worker = [sys.executable, "-c", program]
    assert command.main(listed("sat"), worker=worker) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: the worker could not start: {cause}\n"
    assert rows_of(tmp_path / "results.csv") == []


def test_a_worker_that_never_starts_ends_the_run(listed, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "START_LIMIT", 0.2)
    worker = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert command.main(listed("sat"), worker=worker) == 2
    assert "error: the worker did not start within 0.2 s" in capsys.readouterr().err


class Slow(supervisor.Supervisor):
    """A supervisor that is held up until the answer is there, and then told that time is over."""

    def __init__(self, before):
        super().__init__(fake_worker.COMMAND)
        self.before, self.held_up = before, False

    def _next(self, deadline, stage):
        if stage == "searching":
            while self._events.empty():
                time.sleep(0.02)
            self.held_up, deadline = True, time.monotonic()
            if not self.before:
                raise TimeoutError
        return super()._next(deadline, stage)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_answer_that_was_written_is_not_lost(before, listed, tmp_path):
    """Whether it came before the last look or between that and the end of the worker."""
    listed("sat")
    files = str(tmp_path / "sat.onnx"), str(tmp_path / "p.vnnlib")
    with Slow(before) as asked:
        assert asked.start()
        deadline = time.monotonic() + 60.0
        answer = asked.ask(messages.Request(*files, "crown", "float32", 0.0), deadline)
    assert asked.held_up
    assert answer == messages.Answer("sat", "the attack failed", "sat\n((X_0 0.5)\n(Y_0 -1.0))\n")


# --- one property ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "out", "err"),
    [
        ("sat", 0, "sat\n((X_0 0.5)\n(Y_0 -1.0))\n", "note: the attack failed"),
        ("unsat", 0, "unsat\n", "printed by a library"),
        ("sleeps", 0, "timeout\n", "note: stopped while searching"),
        ("raises", 2, "", "error: op 'f' is not supported: use another"),
        ("exits", 2, "", "error: the worker crashed while searching: exit status 3"),
    ],
)
def test_one_property(name, status, out, err, tmp_path, capfd):
    network, property = tmp_path / f"{name}.onnx", tmp_path / "p.vnnlib"
    network.touch()
    property.write_text(fake_worker.PROPERTY)
    results = tmp_path / "result.txt"
    limit = "1.5" if name == "sleeps" else "60"
    flags = ["--onnx", str(network), "--vnnlib", str(property), "--timeout", limit]
    assert run([*flags, "--results", str(results)]) == status
    printed = capfd.readouterr()
    assert printed.out == out
    assert err in printed.err
    assert (results.read_text() if results.exists() else "") == out


def test_the_start_of_the_worker_counts_for_one_property(tmp_path, capsys):
    network, property = tmp_path / "sat.onnx", tmp_path / "p.vnnlib"
    network.touch()
    property.touch()
    flags = ["--onnx", str(network), "--vnnlib", str(property), "--timeout", "0.2"]
    worker = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert command.main(flags, worker=worker) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("timeout\n", "note: stopped while starting\n")


# --- signals, and no orphans -------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stuck", ["sleeps", "never_yields"])
def test_what_is_done_stays_whatever_ends_a_run(number, stuck, listed, tmp_path, project):
    if stuck == "never_yields" and number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux kills a process with its parent")
    results, pid = tmp_path / "results.csv", tmp_path / f"{stuck}.pid"
    arguments = listed("sat", "unsat", stuck, "unsat", known="sat")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=project,
    )
    with process:
        # Both rows are in the file while the third instance is still running.
        until(lambda: pid.exists() and pid.read_text(), process)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert rows_of(results) == [("sat", "sat"), ("unsat", "unsat")]
    (counterexample,) = (tmp_path / "results_counterexamples").iterdir()
    assert counterexample.name == "0_sat_p.counterexample"
    assert counterexample.read_text() == "((X_0 0.5)\n(Y_0 -1.0))\n"
    assert ends(pid.read_text())
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    lines = printed.splitlines()
    assert lines[0].startswith("0 sat.onnx p.vnnlib sat 0.")
    assert lines[0].endswith(" the attack failed")
    assert lines[-1] == f"interrupted by {number.name} at row 2 of 4"
    summary = dict(line.split() for line in lines[3:-1] if "WRONG: " not in line)
    assert summary["instances"] == "2"
    assert summary["agreed"] == "1"


def test_ctrl_c_in_a_terminal_is_for_the_supervisor(listed, tmp_path, project):
    """A terminal sends the signal to the whole process group."""
    pid = tmp_path / "sleeps.pid"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *listed("unsat", "sleeps")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=project,
        start_new_session=True,
    ) as process:
        until(lambda: pid.exists() and pid.read_text(), process)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(int(pid.read_text()), number)
        time.sleep(0.2)
        assert is_running(pid.read_text())
        os.killpg(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error       0" in printed
    assert "Traceback" not in errors
    assert rows_of(tmp_path / "results.csv") == [("unsat", "unsat")]
    assert ends(pid.read_text())


def test_a_worker_ends_with_its_input():
    """Where the kernel does not end it with its parent, the closed pipe does."""
    with subprocess.Popen(
        fake_worker.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert any(b"ready" in line for line in process.stdout)
        process.stdin.close()
        assert process.wait(60) == 0


def test_the_handlers_of_signals_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail():
        with supervisor.Supervisor(fake_worker.COMMAND):
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- results, and how they are continued -------------------------------------------------------


def test_results_of_another_run_are_not_overwritten(listed, tmp_path, capsys):
    arguments = listed("unsat", "sat", known="sat")
    results = tmp_path / "results.csv"
    assert run(arguments) == 1  # a known one is sat
    before = results.read_text()
    capsys.readouterr()
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "expected a new file" in error
    assert "continue that one with --resume" in error
    assert error.count("\n") == 1
    assert results.read_text() == before


def test_a_list_that_cannot_be_read_begins_no_results(tmp_path, capsys):
    (tmp_path / "instances.csv").write_text("onnx,vnnlib,timeout\na.onnx\n")
    results = tmp_path / "results.csv"
    arguments = ["--instances", str(tmp_path / "instances.csv"), "--results", str(results)]
    assert run(arguments) == 2
    assert not results.exists()
    assert "expected onnx,vnnlib,timeout" in capsys.readouterr().err


@pytest.mark.parametrize("cut", ["sat.onnx,p.vnnl", "sat.onnx,p.vnnlib,sat,0.1", ""])
def test_a_run_is_continued(cut, listed, tmp_path, capsys):
    """Rows that are there are kept, one that was cut short is computed again."""
    results = tmp_path / "results.csv"
    results.write_text(
        f"{batch.HEADER}unsat.onnx,p.vnnlib,unsat,7.000\nsleeps.onnx,p.vnnlib,timeout,9.000\n{cut}"
    )
    arguments = [*listed("unsat", "sleeps", "sat", "unsat", known="unsat"), "--resume"]
    assert run(arguments) == 1  # the computed sat is wrong
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resumed: 2 of 4 rows are done"
    assert lines[1].startswith("2 sat.onnx p.vnnlib sat")
    summary = dict(line.split() for line in lines[4:-1])
    assert summary["instances"] == "4"
    assert summary["solved"] == "3"
    assert summary["timeout"] == "1"
    assert lines[-1] == "WRONG: row 2 sat.onnx p.vnnlib: sat, known unsat"
    text = results.read_text().splitlines()
    assert text[1:3] == ["unsat.onnx,p.vnnlib,unsat,7.000", "sleeps.onnx,p.vnnlib,timeout,9.000"]
    verdicts = [("unsat", "unsat"), ("sleeps", "timeout"), ("sat", "sat"), ("unsat", "unsat")]
    assert rows_of(results) == verdicts
    (counterexample,) = (tmp_path / "results_counterexamples").iterdir()
    assert counterexample.name == "2_sat_p.counterexample"

    # A run that is complete needs no worker.
    before = results.read_text()
    assert command.main(arguments, worker=["no-such-program"]) == 1
    assert results.read_text() == before
    assert "instances   4" in capsys.readouterr().out


@pytest.mark.parametrize("written", [None, "", "onnx,vnn"])
def test_a_run_that_left_nothing_begins_anew(written, listed, tmp_path, capsys):
    results = tmp_path / "results.csv"
    if written is not None:
        results.write_text(written)
    assert run([*listed("unsat"), "--resume"]) == 0
    assert rows_of(results) == [("unsat", "unsat")]
    assert "resumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("a,b\n", "results.csv:1: expected onnx,vnnlib,verdict,seconds, got a,b"),
        ("{}other.onnx,p.vnnlib,sat,1\n", ":2: expected sat.onnx,p.vnnlib, got other.onnx,p.vnn"),
        ("{}sat.onnx,p.vnnlib,maybe,1\n", ":2: expected a verdict and seconds, got maybe,1"),
        ("{}sat.onnx,p.vnnlib,sat,soon\n", "got sat,soon; remove this row and those below it"),
        ("{}sat.onnx,p.vnnlib,sat,-1\n", "got sat,-1"),
        ("{}sat.onnx,p.vnnlib,sat\n", "expected a verdict and seconds, got sat;"),
        ("{}\n", ":2: expected sat.onnx,p.vnnlib, got ;"),
        ("{0}sat.onnx,p.vnnlib,sat,1\nsat.onnx,p.vnnlib,sat,1\n", "expected at most 1 rows, got 2"),
        ("\x00\xff\n", "got"),
    ],
)
def test_other_results_are_not_continued(text, piece, listed, tmp_path, capsys):
    results = tmp_path / "results.csv"
    results.write_bytes(text.format(batch.HEADER).encode("latin-1"))
    before = results.read_bytes()
    assert run([*listed("sat"), "--resume"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: --resume: ")
    assert piece in error
    assert error.count("\n") == 1
    assert results.read_bytes() == before


def test_resuming_needs_results(listed, capsys):
    arguments = listed("sat")
    assert run([*arguments[:2], "--resume"]) == 2
    assert "--resume: expected --instances and --results with it" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "r.csv"
    first = batch.Results(path)
    with pytest.raises(VerifyError, match="another run is writing"):
        batch.Results(path, resume=True)
    first.close()
    batch.Results(path, resume=True).close()


def test_names_with_commas_and_long_names(tmp_path):
    results = batch.Results(tmp_path / "r.csv")
    files = tmp_path / "a,b.onnx", tmp_path / f"{'p' * 240}.vnnlib.gz"
    results.add_counterexample(7, *files, "sat\n")
    results.add(*files, batch.Row("sat", 1.0))
    results.close()
    with (tmp_path / "r.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["a,b.onnx", files[1].name, "sat", "1.000"]
    (written,) = (tmp_path / "r_counterexamples").iterdir()
    assert written.name == f"7_a,b_{'p' * 80}.counterexample"
    resumed = batch.Results(tmp_path / "r.csv", [instances.Instance(*files, 1.0)], resume=True)
    assert resumed.kept == [batch.Row("sat", 1.0)]
    resumed.close()


# --- what the command says ---------------------------------------------------------------------


class Terminal:
    """A stderr that claims to be a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_shows_progress_and_nothing_else_does(listed, monkeypatch, capsys):
    arguments = listed("unsat", "sat")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert run([*arguments[:2]]) == 0
    shown = terminal.text.split("\r")
    assert any("row 1 of 2, 1 solved: sat.onnx p.vnnlib, searching" in line for line in shown)
    assert shown[-1] == "\x1b[K"  # removed at the end
    assert "\r" not in capsys.readouterr().out
    assert run([*arguments[:2]]) == 0
    assert "\r" not in capsys.readouterr().err


def test_the_version_and_the_statuses(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"boundjax {boundjax.__version__}\n"
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for status in (0, 1, 2, 130, 143):
        assert f"\n  {status} " in text

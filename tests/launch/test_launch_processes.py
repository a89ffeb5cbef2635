"""Launchers that start processes: prefixes, exit statuses, signals, and nothing that survives.

The children are a few lines of Python without JAX. No test waits for a time: children say that they
are ready, and then for ever wait for a signal.
"""

import os
import signal
import subprocess
import sys

import pytest
from launched import HANGS, ROOT, launched, runs

from launch import local_multiprocess
from launch.children import UNFINISHED, exit_status

LOCAL = [sys.executable, "launch/local_multiprocess.py"]
# Says that it is ready; saves when it gets SIGTERM.
WAITS = """
import os, signal, sys
def save(number, frame):
    print("saved after", number, flush=True)
    sys.exit({status})
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", os.getpid(), flush=True)
while True:
    signal.pause()
"""
# Nothing but SIGKILL ends it, nor what it starts.
DEAF = r"""
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
os.write(1, b"ready %d\n" % os.getpid())  # whole: two processes write
while True:
    signal.pause()
"""


def _local(*arguments, **settings):
    return subprocess.run(
        [*LOCAL, *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )


def _python(code):
    return ["--", "python", "-c", code]


def _read_until_ready(process, count, start="ready"):
    """The numbers of `count` children, once all have said that they are ready."""
    numbers = []
    while len(numbers) < count:
        line = process.stdout.readline()
        assert line, "ended before its children were ready"
        words = line.split()
        if start in words:
            numbers.append(int(words[-1]))
    return numbers


# ---------------------------------------------------------------------------- local_multiprocess


def test_every_process_knows_its_place():
    names = [
        *("BOUNDJAX_COORDINATOR", "BOUNDJAX_PROCESSES", "BOUNDJAX_PROCESS"),
        *("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"),
    ]
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    flags = ["--processes", "3", "--devices", "2", "--port", "4567"]
    done = _local(*flags, *_python(code))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        f"[{index}] 127.0.0.1:4567 3 {index} cpu 2" for index in range(3)
    ]


def test_every_line_has_its_prefix_and_its_stream():
    code = "import sys; print('a\\nb'); sys.stdout.write('c'); print('d', file=sys.stderr)"
    done = _local("--processes", "2", *_python(code))
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {text}" for i in (0, 1) for text in "abc"]
    assert done.stdout.endswith("c\n")
    assert sorted(done.stderr.splitlines()) == ["[0] d", "[1] d"]


def test_a_free_port_is_found():
    code = "import os; print(os.environ['BOUNDJAX_COORDINATOR'])"
    done = _local("--processes", "2", *_python(code))
    result = {line.rpartition(" ")[2] for line in done.stdout.splitlines()}
    assert len(result) == 1
    assert 1024 <= int(result.pop().removeprefix("127.0.0.1:")) < 65536


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; sys.exit(0)", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_the_exit_status_is_that_of_the_processes(code, status):
    assert _local("--processes", "2", *_python(code)).returncode == status


def test_one_failure_ends_the_others_and_its_status_counts():
    code = "import os, sys\nif os.environ['BOUNDJAX_PROCESS'] == '1': sys.exit(5)\n"
    done = _local("--processes", "3", "--grace", "0.1", *_python(code + WAITS.format(status=0)))
    assert done.returncode == 5
    # SIGTERM may come before a process can handle it.
    assert all(line[4:].split()[0] in ("ready", "saved") for line in done.stdout.splitlines())


def test_one_failure_kills_those_that_do_not_listen_and_their_children(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # The failing process waits until the other is ready.
    code = f"""
import os, sys
if os.environ["BOUNDJAX_PROCESS"] == "1":
    open({str(gate)!r}).read()
    sys.exit(5)
{DEAF}"""
    command = [*LOCAL, "--processes", "2", "--grace", "0.1", *_python(code)]
    with launched(command) as process:
        numbers = _read_until_ready(process, 2)
        gate.write_text("")
        assert process.wait() == 5
    assert not any(runs(number) for number in numbers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("status", [0, 4])
def test_signals_reach_all_processes_once(number, status):
    command = [*LOCAL, "--processes", "2", *_python(WAITS.format(status=status))]
    with launched(command) as process:
        children = _read_until_ready(process, 2)
        # As Ctrl-C does it: to the whole group of the launcher.
        os.killpg(process.pid, number)
        output = process.stdout.read()
        assert process.wait() == status
    saved = [f"[{index}] saved after {int(number)}" for index in (0, 1)]
    assert sorted(output.splitlines()) == saved
    assert not any(runs(child) for child in children)


def test_what_the_processes_left_running_is_ended():
    code = f"""
import os
ready, told = os.pipe()
if os.fork():
    os.read(ready, 1)
    os._exit(0)
{DEAF.replace("while", "os.write(told, b'x')" + chr(10) + "while").replace("os.fork()", "")}"""
    # Left alone it would hold the output open, and the launcher would wait for it for ever.
    done = _local("--processes", "1", *_python(code))
    assert done.returncode == 0
    [line] = done.stdout.splitlines()
    assert not runs(int(line.split()[-1]))


def test_a_dry_run_of_local_processes(capsys):
    arguments = ["--devices", "4", "--port", "9", "--dry-run", "--", "python", "-m", "a", "--x=b c"]
    assert local_multiprocess.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"BOUNDJAX_COORDINATOR=127.0.0.1:9 BOUNDJAX_PROCESSES=2 BOUNDJAX_PROCESS={index} "
        "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python -m a '--x=b c'"
        for index in (0, 1)
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "a command is missing: ... -- python -m experiments.main --config=FILE.py"),
        (["--processes", "0", "--", "x"], 2, "argument --processes: must be at least 1, got 0"),
        (["--proc", "2", "--", "x"], 2, "unrecognized arguments: --proc"),
        (["--", "no-such-program"], 127, "cannot start 'no-such-program' (No such file or dire"),
    ],
)
def test_mistakes_of_local_processes(arguments, status, message):
    done = _local(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert f"error: {message}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_statuses_are_those_of_a_shell():
    assert [exit_status(code) for code in (0, 3, -9, -15)] == [0, 3, 137, 143]


# ------------------------------------------------------------------------------------ until_done


def _until_done(done, *flags, code="pass"):
    command = ["bash", "launch/until_done.sh", "--done", str(done), *flags, "--"]
    return [*command, sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "status", "runs"),
    [
        ("open(done, 'w')", 0, 1),
        ("pass", UNFINISHED, 3),
        ("sys.exit(2)", 2, 1),
        ("sys.exit(7)", 7, 3),
        ("os.kill(os.getpid(), 15)", UNFINISHED, 3),
        ("os.kill(os.getpid(), 9)", 137, 3),
        ("len(open(log).read()) > 1 and open(done, 'w')", 0, 2),
        ("len(open(log).read()) > 1 and open(done, 'w'); sys.exit(1)", 0, 2),
    ],
)
def test_until_done(tmp_path, code, status, runs):
    done, log = tmp_path / "summary.json", tmp_path / "log"
    names = f"import os, sys; done, log = {str(done)!r}, {str(log)!r}"
    code = f"{names}\nwith open(log, 'a') as stream: stream.write('x')\n{code}"
    flags = ["--attempts", "3", "--delay", "0"]
    result = subprocess.run(
        _until_done(done, *flags, code=code), cwd=ROOT, capture_output=True, check=False
    )
    assert (result.returncode, log.read_text()) == (status, "x" * runs)


def test_a_signal_between_attempts_is_an_interruption(tmp_path):
    command = _until_done(tmp_path / "x", "--attempts", "2", code="import sys; sys.exit(3)")
    with launched(command, stream="stderr") as process:
        assert process.stderr.readline().endswith("again in 30 s\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == UNFINISHED


def test_what_is_done_is_not_run_again(tmp_path):
    result = subprocess.run(
        _until_done(tmp_path, code="print('runs')"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, f"until_done: finished, {tmp_path} exists\n")


@pytest.mark.parametrize(("status", "expected"), [(0, UNFINISHED), (4, 4)])
def test_a_signal_ends_the_attempts(tmp_path, status, expected):
    command = _until_done(tmp_path / "x", "--attempts", "9", code=WAITS.format(status=status))
    with launched(command) as process:
        [child] = _read_until_ready(process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved after 15\n"
        assert process.wait() == expected
    assert not runs(child)

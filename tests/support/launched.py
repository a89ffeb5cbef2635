"""Launchers under test: started, and certain to end."""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
# No test waits for it: it makes a failure of a launcher that hangs.
HANGS = 60


@contextlib.contextmanager
def launched(command: Sequence[str], stream: str = "stdout") -> Iterator[subprocess.Popen[str]]:
    """Runs a command from the root of the checkout in a process group of its own."""
    pipe = {stream: subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipe) as process:
        watchdog = threading.Timer(HANGS, _kill, [process])
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends the launcher and the processes that name it as their parent."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    numbers = children.read_text().split() if children.exists() else []
    for number in [*map(int, numbers), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)


def runs(number: int) -> bool:
    """Whether there is a process, other than one that nobody has waited for yet."""
    status = pathlib.Path(f"/proc/{number}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

"""Child processes of the launchers: every signal reaches them, and none survives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from types import FrameType

# A run that was interrupted and saved: the same command goes on with it (EX_TEMPFAIL).
UNFINISHED = 75

_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def exit_status(returncode: int) -> int:
    """What a shell calls it: 128 + s for a process that signal s ended."""
    return 128 - returncode if returncode < 0 else returncode


class Children:
    """Processes that get the SIGINT and SIGTERM sent to this one, each of them once.

    Attributes:
      processes: in the order of their starts.
      signals: that came so far.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []

    def start(
        self, command: list[str], environment: dict[str, str] | None = None, pipes: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a process; with `pipes`, its output comes as `.stdout` and `.stderr`.

        Raises:
          OSError: if the command cannot be started.
        """
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else None,
            stderr=subprocess.PIPE if pipes else None,
            # A group of its own: a terminal's Ctrl-C comes through `forwarding` alone, and
            # whatever the process starts can be ended with it.
            start_new_session=True,
        )
        self.processes.append(process)
        for number in self.signals:  # they came before this process could be told
            process.send_signal(number)
        return process

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Forwards signals while the block runs; at its end kills what is left of the processes."""

        def forward(number: int, _: FrameType | None) -> None:
            self.signals.append(number)
            self.send(number)

        before = {number: signal.signal(number, forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for process in self.processes:
                if process.poll() is None:  # the number of another may be in use again
                    kill_group(process)
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def send(self, number: int) -> None:
        """Sends a signal to every process that still runs."""
        for process in self.processes:
            process.send_signal(number)  # nothing happens to one that has ended


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, if it still runs, and everything that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a zombie's group
        os.killpg(process.pid, signal.SIGKILL)

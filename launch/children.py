"""Child processes of the launchers, which get every signal and never outlive them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from types import FrameType

# Exit status of a run that was interrupted and saved, so that it can resume (EX_TEMPFAIL).
UNFINISHED = 75

_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def exit_status(returncode: int) -> int:
    """Converts to the status of a shell: 128 + s for a process that signal s ended."""
    return 128 - returncode if returncode < 0 else returncode


class Children:
    """Child processes that each get every SIGINT and SIGTERM of this process once.

    Attributes:
      processes: the child processes in the order of their starts.
      signals: numbers of the signals so far.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []

    def start(
        self, command: list[str], environment: dict[str, str] | None = None, pipes: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a process; `pipes` makes its output readable from `.stdout` and `.stderr`.

        Raises:
          OSError: if the command cannot be started.
        """
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else None,
            stderr=subprocess.PIPE if pipes else None,
            # In a group of its own, the process gets a terminal's Ctrl-C through `forwarding`
            # alone, and everything that it starts can be ended with it.
            start_new_session=True,
        )
        self.processes.append(process)
        for number in self.signals:  # they arrived before this process was in the list
            process.send_signal(number)
        return process

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Forwards signals while the block runs, and kills remaining processes at its end."""

        def forward(number: int, _: FrameType | None) -> None:
            self.signals.append(number)
            self.send(number)

        before = {number: signal.signal(number, forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for process in self.processes:
                if process.poll() is None:  # the number of an ended process may be reused
                    kill_group(process)
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def send(self, number: int) -> None:
        """Sends a signal to every process that is still running."""
        for process in self.processes:
            process.send_signal(number)  # does nothing if the process has ended


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, if it is still running, and everything that it started."""
    # macOS raises PermissionError for the group of a zombie.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

"""The process that keeps time: starts a worker, asks it, and ends it at the limit.

A call of XLA cannot be interrupted from inside, and a crash in it takes its process along. So what
decides properties is a process of its own; this one needs no JAX, and holds the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from boundjax.verify.errors import VerifyError
from boundjax.verify.messages import Answer, Message, Request, Stage, decode, encode

WORKER = (sys.executable, "-m", "boundjax.verify.worker")
GRACE = 0.25  # seconds after the limit in which an answer is still taken
COMPILATION_LIMIT = 900.0  # seconds for one request where compilation does not count
START_LIMIT = 300.0  # seconds that Python and JAX may take to start
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TICK = 1.0  # seconds between two calls of `tick`
_EXIT_LIMIT = 5.0  # seconds that a process may take to end after it closed its output


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


class _Worker:
    """A worker process; its messages arrive in a queue as `(worker, message)`, None at its end."""

    def __init__(self, command: Sequence[str], events: queue.SimpleQueue[Any]):
        # The process inherits the blocked signals: Ctrl-C in a terminal is for the supervisor.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.ready = False
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def _read(self, events: queue.SimpleQueue[Any]) -> None:
        for line in self._answers:
            if not line.endswith(b"\n"):  # the process was killed in the middle of it
                break
            try:
                events.put((self, decode(line)))
            except (ValueError, TypeError, KeyError):  # something else printed it
                sys.stderr.write(line.decode(errors="replace"))
        events.put((self, None))

    def send(self, request: Request) -> None:
        with contextlib.suppress(BrokenPipeError):  # the end of the process is an event
            self._requests.write(encode(request))
            self._requests.flush()

    def end(self) -> str:
        """Kills the process unless it has ended; then all of its messages are in the queue.

        Returns:
          How it ended.
        """
        if self._reader.is_alive():
            self._process.kill()
        try:
            status = self._process.wait(_EXIT_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join(_EXIT_LIMIT)
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        if not self._reader.is_alive():  # else a process that it left behind holds the pipe
            self._answers.close()
        if status >= 0:
            return f"exit status {status}"
        if -status == signal.SIGKILL:
            return "SIGKILL, perhaps because memory ran out"
        return signal.Signals(-status).name


class Supervisor:
    """Asks one worker after another, each until it crashes or has to be killed.

    A context manager. Inside, SIGINT and SIGTERM raise `Interrupted` from the methods that wait; at
    the end no worker is left.
    """

    def __init__(
        self, command: Sequence[str] = WORKER, tick: Callable[[str], None] = lambda stage: None
    ):
        """Starts workers with `command`.

        Args:
          command: of a process that calls `worker.serve`.
          tick: called about once a second while the supervisor waits, with what the worker does.
        """
        self._command, self._tick = command, tick
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker: _Worker | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._signal: signal.Signals | None = None

    def __enter__(self) -> Supervisor:
        # Only the main thread receives signals.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        self._end_worker()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: object) -> None:
        # Raising here could cut the writing of a result in two.
        self._signal = signal.Signals(number)
        self._events.put((None, None))  # wakes `_next`

    def start(self, deadline: float | None = None) -> bool:
        """Starts a worker unless there is one, and waits until it is ready.

        Args:
          deadline: in seconds of `time.monotonic`; `START_LIMIT` from now by default.

        Returns:
          Whether it is ready; False at the deadline.

        Raises:
          VerifyError: if it ends instead, or is not ready within `START_LIMIT`.
        """
        worker = self._worker = self._worker or _Worker(self._command, self._events)
        end = time.monotonic() + START_LIMIT if deadline is None else deadline
        while not worker.ready:
            try:
                message = self._next(end, "starting")
            except TimeoutError:
                self._end_worker()
                if deadline is not None:
                    return False
                raise VerifyError(f"the worker did not start within {START_LIMIT:g} s") from None
            if message is None:
                raise VerifyError(f"the worker could not start: {self._end_worker()}")
            worker.ready = True
        return True

    def ask(self, request: Request, deadline: float) -> Answer:
        """Sends a request, with what is left until the deadline, to the worker that was started.

        Returns:
          Its answer; `timeout` if there is none `GRACE` after the deadline, or `error` if the
          worker crashes. After both there is no worker until the next `start`. Where compilation
          does not count the worker keeps the time, and this process waits for
          `COMPILATION_LIMIT` longer.
        """
        worker, stage = self._worker, "starting"
        assert worker is not None
        assert worker.ready
        left = max(0.0, deadline - time.monotonic())
        worker.send(dataclasses.replace(request, seconds=left))
        end = deadline + GRACE + (0.0 if request.count_compilation else COMPILATION_LIMIT)
        while True:
            try:
                message = self._next(end, stage)
            except TimeoutError:
                self._end_worker()
                late = self._answer_of(worker)
                return late or Answer("timeout", f"stopped while {stage}", "timeout\n")
            if message is None:
                return Answer("error", f"the worker crashed while {stage}: {self._end_worker()}")
            if isinstance(message, Answer):
                return message
            assert isinstance(message, Stage)
            stage = message.text

    def _next(self, deadline: float, stage: str) -> Message | None:
        """The next message of the worker, None at its end.

        Raises:
          TimeoutError: at the deadline.
          Interrupted: after a signal.
        """
        while True:
            self._tick(stage)
            left = deadline - time.monotonic()
            with contextlib.suppress(queue.Empty):
                source, message = self._events.get(timeout=max(0.0, min(left, _TICK)))
                if source is self._worker:
                    return message
            if self._signal is not None:
                raise Interrupted(self._signal)
            if time.monotonic() >= deadline:
                raise TimeoutError

    def _answer_of(self, worker: _Worker) -> Answer | None:
        """An answer that a worker wrote before it was killed."""
        while not self._events.empty():
            source, message = self._events.get()
            if source is worker and isinstance(message, Answer):
                return message
        return None

    def _end_worker(self) -> str:
        worker, self._worker = self._worker, None
        return "" if worker is None else worker.end()

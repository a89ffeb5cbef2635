"""Answers SIGTERM: in training all processes stop after the same step, otherwise at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """Ends a run that was told to stop, with exit status 0; nothing is lost."""

    def __init__(self, after: str = ""):
        """`after` says where training stopped; it is empty outside training."""
        super().__init__(0)
        where, start = (f" {after}", "there") if after else ("", "what was saved last")
        self.message = f"stopped by SIGTERM{where}; the same command continues from {start}"


class Preemption:
    """Keeps track of SIGTERM.

    A single process has a signal handler. Several processes use that of JAX, whose protocol picks a
    number of calls of `due` that no process has made yet, the same for all.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._calls = 0
        self._training = self._received = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Installs the signal handler if this is the main thread, the only one that can have it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, number: int, frame: object) -> None:
        del number, frame
        if not self._training:
            raise Preempted()
        self._received = True

    @contextlib.contextmanager
    def deferred(self, highest: Callable[[int], int]) -> Iterator[None]:
        """Lets SIGTERM stop the run only where it calls `due`, after every step of training.

        Args:
          highest: returns the highest of the numbers that the processes call it with.
        """
        with self._lock:
            self._training = True
        self._calls = highest(self._calls)
        try:
            yield
        finally:
            with self._lock:
                self._training = False

    def due(self) -> bool:
        """Whether to stop after this step; the answer is the same on all processes."""
        if self._received:
            return True
        return jax.distributed.is_initialized() and self._count()

    def tick(self) -> bool:
        """Whether to stop outside training; every process asks in its own time."""
        with self._lock:
            return not self._training and self._count()

    def _count(self) -> bool:
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)


preemption = Preemption()

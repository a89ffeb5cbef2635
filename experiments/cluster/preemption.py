"""SIGTERM: in training all processes stop after the same step, at any other time at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """A run that was told to stop; nothing is lost, and the exit status is 0."""

    def __init__(self, after: str = ""):
        """`after` says where it stopped, if that was in training."""
        super().__init__(0)
        where, start = (f" {after}", "there") if after else ("", "what was saved last")
        self.message = f"stopped by SIGTERM{where}; the same command goes on from {start}"


class Preemption:
    """What is known of SIGTERM.

    One process has a signal handler. Several have JAX's, whose protocol finds a number of calls of
    `due` that no process has made yet: the same for all.
    """

    def __init__(self):
        """Nothing received."""
        self._lock = threading.Lock()
        self._calls = 0
        self._training = self._received = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """With a signal handler; where there can be none, outside of the main thread, without."""
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
        """While training: `due` is asked after every step, and nothing else stops the run.

        Args:
          highest: the highest of the numbers that all processes call it with.
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
        """Whether to stop after this step; all processes get the same answer."""
        if self._received:
            return True
        return jax.distributed.is_initialized() and self._count()

    def tick(self) -> bool:
        """As `due`, where nothing is trained: called by every process in its own time."""
        with self._lock:
            return not self._training and self._count()

    def _count(self) -> bool:
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)


preemption = Preemption()

"""The files of a batch run, and how SIGINT and SIGTERM end one without losing any."""

from __future__ import annotations

import contextlib
import csv
import io
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

HEADER = "onnx,vnnlib,verdict,seconds\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DONE = b"\0"  # no signal has the number 0
_MAX_NAME = 80  # characters of a file's name in the name of a counterexample


@contextlib.contextmanager
def interruptible(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `end`, which must not return, in a separate thread.

    The main thread is the wrong place: compiled code can hold it for minutes, and an exception that
    is raised inside a callback of XLA or onnxruntime is lost or ends the process. Only the main
    thread receives signals, so in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def wait() -> None:
        # Python writes the number of each signal; this module writes the last byte.
        number = receiver.recv(1)
        while number not in (b"", _DONE):
            if number[0] in _SIGNALS:
                end(signal.Signals(number[0]))
            number = receiver.recv(1)

    watch = threading.Thread(target=wait, daemon=True)
    watch.start()
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    # A signal wakes the thread only if it has a handler in Python.
    previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        sender.send(_DONE)
        watch.join()
        receiver.close()
        sender.close()


class Results:
    """The files of a batch run, written immediately so that no interruption loses a result.

    Attributes:
      path: the csv file, with a row per instance.
      folder: the folder beside it with the counterexamples, `ROW_NETWORK_PROPERTY.counterexample`;
        created for the first one.
    """

    def __init__(self, path: Path):
        """Creates the csv file.

        Raises:
          FileExistsError: if the file or the folder holds results of another run.
        """
        self.path = path
        self.folder = path.with_name(f"{path.stem}_counterexamples")
        for old in (path, self.folder):
            if old.exists():
                raise FileExistsError(
                    f"--results: expected a new file, got {old}, which holds results of another "
                    "run; name another file, or move that one away"
                )
        self._file: TextIO = path.open("x", encoding="utf-8")
        self._append(HEADER)

    def add(self, row: int, onnx: Path, vnnlib: Path, verdict: str, seconds: float) -> None:
        """Appends a row."""
        line = io.StringIO()  # names with commas need csv's quotes
        csv.writer(line, lineterminator="\n").writerow(
            [onnx.name, vnnlib.name, verdict, f"{seconds:.3f}"]
        )
        self._append(line.getvalue())

    def add_counterexample(self, row: int, onnx: Path, vnnlib: Path, text: str) -> None:
        """Writes the counterexample of a row, whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        stem = vnnlib.name.removesuffix(".gz").removesuffix(".vnnlib")
        names = f"{onnx.stem[:_MAX_NAME]}_{stem[:_MAX_NAME]}"
        path = self.folder / f"{row}_{names}.counterexample"
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def close(self) -> None:
        """Closes the csv file."""
        self._file.close()

    def _append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

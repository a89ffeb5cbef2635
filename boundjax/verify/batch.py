"""What a batch run leaves: a row per instance and a file per counterexample, as they come."""

from __future__ import annotations

import contextlib
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

HEADER = "onnx,vnnlib,verdict,seconds\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; like ``KeyboardInterrupt`` no instance's error handling.

    Attributes:
      signal: which one.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise ``Interrupted``; only for the main thread."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        del frame
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Results:
    """The files of a batch run; nothing is kept back, so that whatever ends it loses nothing.

    Attributes:
      path: the csv file, with a row per instance.
      folder: beside it, for the counterexamples, ``ROW_NETWORK_PROPERTY.txt``; made when there is
        one.
    """

    def __init__(self, path: Path):
        """Begins the csv file.

        Raises:
          FileExistsError: if there are results of another run already.
        """
        self.path = path
        self.folder = path.with_name(f"{path.stem}_counterexamples")
        for old in (path, self.folder):
            if old.exists():
                raise FileExistsError(
                    f"--results: expected a new file, but {old} holds results of another run; "
                    "name another file, or move that one away"
                )
        self._file: TextIO = path.open("x", encoding="utf-8")
        self._append(HEADER)

    def add(self, row: int, onnx: Path, vnnlib: Path, verdict: str, seconds: float) -> None:
        """Appends a row."""
        self._append(f"{onnx.name},{vnnlib.name},{verdict},{seconds:.3f}\n")

    def add_counterexample(self, row: int, onnx: Path, vnnlib: Path, text: str) -> None:
        """Writes the counterexample of a row, whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        stem = vnnlib.name.removesuffix(".gz").removesuffix(".vnnlib")
        path = self.folder / f"{row}_{onnx.stem}_{stem}.txt"
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def close(self) -> None:
        """Closes the csv file."""
        self._file.close()

    def _append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

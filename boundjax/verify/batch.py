"""The files that a batch run leaves, and how a later one continues them."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO, cast

from boundjax.verify.errors import VerifyError, one_line
from boundjax.verify.instances import Instance
from boundjax.verify.messages import ANSWERED, Answered

HEADER = "onnx,vnnlib,verdict,seconds\n"
_MAX_NAME = 80  # characters of a file's name in the names of a row's files


def names_of(row: int, onnx: Path, vnnlib: Path) -> str:
    """How the files of a row are named, before the suffix."""
    stem = vnnlib.name.removesuffix(".gz").removesuffix(".vnnlib")
    network = Path(onnx.name.removesuffix(".gz")).stem
    return f"{row}_{network[:_MAX_NAME]}_{stem[:_MAX_NAME]}"


class Row(NamedTuple):
    """The result of an instance: a verdict and seconds of wall-clock time."""

    verdict: Answered
    seconds: float


class Results:
    """The files of a batch run, written immediately so that no interruption loses a result.

    Attributes:
      path: the csv file, with a row per instance.
      folder: the folder beside it with the counterexamples, `ROW_NETWORK_PROPERTY.counterexample`;
        created for the first one.
      kept: the rows that were there before.
    """

    def __init__(self, path: Path, instances: Sequence[Instance] = (), *, resume: bool = False):
        """Creates the csv file, or continues it.

        Args:
          path: of the csv file.
          instances: those of the run; only used to resume.
          resume: continue the file if there is one. A row that was cut short is dropped.

        Raises:
          FileExistsError: if the file or the folder holds results of another run.
          VerifyError: if the file that is to be continued holds anything but the first rows of
            these instances, or another run is writing to it.
        """
        self.path = path
        self.folder = path.with_name(f"{path.stem}_counterexamples")
        self.kept: list[Row] = []
        if resume and path.exists():
            self._file: TextIO = path.open("a", encoding="utf-8")
        else:
            for old in (path, self.folder):
                if old.exists():
                    raise FileExistsError(
                        f"--results: expected a new file, got {old}, which holds results of "
                        "another run; continue that one with --resume, move it away, or name "
                        "another file"
                    )
            self._file = path.open("x", encoding="utf-8")
        try:
            self._lock()
            text = path.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]
            if complete:
                self.kept = _read_rows(path, complete, instances)
            self._file.truncate(len(complete))
            if not complete:
                self._append(HEADER)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VerifyError(
                f"--results: expected a file that nobody writes to, got {self.path}, to which "
                "another run is writing; wait for it, or name another file"
            ) from None
        except OSError:  # a file system without locks
            pass

    def add(self, onnx: Path, vnnlib: Path, row: Row) -> None:
        """Appends a row."""
        line = io.StringIO()  # names with commas need csv's quotes
        csv.writer(line, lineterminator="\n").writerow(
            [onnx.name, vnnlib.name, row.verdict, f"{row.seconds:.3f}"]
        )
        self._append(line.getvalue())

    def add_counterexample(self, row: int, onnx: Path, vnnlib: Path, text: str) -> None:
        """Writes the counterexample of a row, whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{names_of(row, onnx, vnnlib)}.counterexample"
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def close(self) -> None:
        """Closes the csv file."""
        self._file.close()

    def _append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _read_rows(path: Path, text: bytes, instances: Sequence[Instance]) -> list[Row]:
    """The rows of a results file, which must be the first of these instances.

    Raises:
      VerifyError: if they are not.
    """
    try:
        header, *lines = csv.reader(io.StringIO(text.decode()), strict=True)
    except (UnicodeDecodeError, csv.Error) as error:
        raise VerifyError(f"--resume: {path}: expected a csv file, got {one_line(error)}") from None
    if header != HEADER.strip().split(","):
        raise VerifyError(f"--resume: {path}:1: expected {HEADER.strip()}, got {','.join(header)}")
    if len(lines) > len(instances):
        raise VerifyError(
            f"--resume: {path}: expected at most {len(instances)} rows, got {len(lines)}; these "
            "are the results of other instances"
        )
    rows = []
    for number, (line, instance) in enumerate(zip(lines, instances, strict=False), start=2):
        names = [instance.onnx.name, instance.vnnlib.name]
        if line[:2] != names:
            raise VerifyError(
                f"--resume: {path}:{number}: expected {','.join(names)}, got "
                f"{','.join(line[:2])}; these are the results of other instances"
            )
        seconds = math.nan
        with contextlib.suppress(ValueError, IndexError):
            seconds = float(line[3])
        if len(line) != 4 or line[2] not in ANSWERED or not 0 <= seconds < math.inf:
            raise VerifyError(
                f"--resume: {path}:{number}: expected a verdict and seconds, got "
                f"{','.join(line[2:])}; remove this row and those below it"
            )
        rows.append(Row(cast(Answered, line[2]), seconds))
    return rows

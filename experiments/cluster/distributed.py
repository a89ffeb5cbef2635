"""Runs several processes as one: they agree, wait for each other and leave together.

Everything goes through the key-value store of JAX's coordinator, which needs no device and cannot
hang in a collective. With one process no function here communicates.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

import jax
from jax._src import distributed as _runtime  # JAX has no public name for its key-value store

from experiments.cluster.preemption import Preempted, preemption
from experiments.cluster.process_group import ProcessGroup, join
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ExperimentError, one_line

# Prefix of all keys in the store.
_PREFIX = "boundjax"
# Seconds between two looks at the other processes.
_INTERVAL = 0.5
# Seconds for a process to report an error itself after another process has failed with it.
_GRACE = 3.0
# Seconds for all processes to see a new file in a shared folder.
_FOLDER_TIMEOUT = 20.0


def process() -> int:
    """Returns the number of this process, 0 if it is alone."""
    return _runtime.global_state.process_id


def processes() -> int:
    """Returns how many processes run together."""
    return _runtime.global_state.num_processes


def is_main() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return process() == 0


@contextlib.contextmanager
def joined(group: ProcessGroup) -> Iterator[None]:
    """Runs a command as one of the processes of `group`; enter it before using JAX.

    Only process 0 prints. An error on one process ends all of them and is printed once: by process
    0 if it has the same error, otherwise by the process that raised it. SIGTERM ends all processes
    with status 0, in training after the same step with a checkpoint.

    Raises:
      ExperimentError: if the other processes cannot be joined. A single process also raises what
        the body raises; of several processes, those that fail end here with status 2.
    """
    join(group)
    if processes() == 1:
        with preemption.handled():
            try:
                yield
            except Preempted as stop:
                _say(stop.message)
                raise
        return
    _quiet()
    companion = _Companion()
    companion.start()
    try:
        yield
    except Preempted as stop:
        if is_main():
            _say(stop.message)
        companion.stop()
        raise
    except ExperimentError as error:
        _fail(one_line(error), 2)
    except SystemExit:
        companion.stop()
        raise
    except BaseException as error:
        summary = "".join(traceback.format_exception_only(error)).strip()
        _fail(summary, 1, details=traceback.format_exc())
    companion.stop()


def decided(value: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """Lets process 0 decide from the values of all processes, which must all call this.

    Args:
      value: the JSON value of this process.
      decide: (values in the order of the processes) -> JSON, called by process 0 only.
    """
    if processes() == 1:
        return decide([value])
    name = f"{_PREFIX}/decision/{next(_DECISION_NUMBERS)}"
    client = _client()
    if is_main():
        first = json.loads(json.dumps(value))  # in the form of the other values: lists for tuples
        values = [first, *(json.loads(_get(f"{name}/{i}")) for i in range(1, processes()))]
        decision = json.dumps(decide(values))
        client.key_value_set(f"{name}/0", decision)
        return json.loads(decision)
    client.key_value_set(f"{name}/{process()}", json.dumps(value))
    return json.loads(_get(f"{name}/0"))


def from_main(value: Callable[[], Any]) -> Any:
    """Returns the JSON that `value()` gives on process 0, the only caller; all must call this."""
    if processes() == 1:
        return value()
    return decided(None, lambda values: value())


def agree(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same nested JSON `values`.

    Raises:
      ExperimentError: on every process, naming the keys that differ and the processes.
    """
    difference = decided(values, _difference)
    if difference is not None:
        raise ExperimentError(
            f"the processes differ in {difference}; start all of them with the same command, "
            "packages and data"
        )


def require_shared(folder: Path) -> None:
    """With several processes, creates a folder and checks that all see the same one.

    Raises:
      ExperimentError: on every process, naming the folder.
    """
    if processes() == 1:
        return
    token = folder / f".shared-{secrets.token_hex(8)}"
    failure = None
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            failure = (
                f"--workdir={folder}: cannot write there ({error.strerror}); choose another folder"
            )
    name, failure = from_main(lambda: [token.name, failure])
    if failure is not None:
        raise ExperimentError(failure)
    end = time.monotonic() + _FOLDER_TIMEOUT
    visible = (folder / name).exists()
    while not visible and time.monotonic() < end:
        time.sleep(_INTERVAL)
        # Listing a folder makes network file systems look again for a file that was absent.
        visible = folder.is_dir() and name in os.listdir(folder)
    apart = decided(visible, lambda answers: [i for i, answer in enumerate(answers) if not answer])
    if is_main():
        token.unlink()
        if apart and not any(folder.iterdir()):
            folder.rmdir()
    if apart:
        raise ExperimentError(
            f"--workdir={folder} is not shared: {_described(apart)} did not see a file of process "
            f"0 there within {_FOLDER_TIMEOUT:g} s; use a folder that all machines mount"
        )


def _quiet() -> None:
    """Silences standard output, where Gloo logs connections, except for Python on process 0."""
    sys.stdout.flush()
    python_output = os.dup(1) if is_main() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(python_output, "w", buffering=1, encoding="utf-8", errors="replace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


# --------------------------------------------------------------------------- the store


# Every decision has its own number in its key; all processes make them in the same order.
_DECISION_NUMBERS = itertools.count()


def _client() -> Any:
    return _runtime.global_state.client


def _get(key: str) -> str:
    """Waits for a key without limit; `_Companion` ends the wait for a process that has left."""
    while True:
        try:
            return _client().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _difference(values: list[Mapping[str, Any]]) -> str | None:
    """Describes a difference, `optim.lr (0.1 on process 1, 0.2 on processes 0 and 2)`, or None."""
    keys = sorted({key for other in values[1:] for key in differing_keys(values[0], other)})
    if not keys:
        return None
    differences = []
    for key in keys:
        indices_by_text: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            indices_by_text.setdefault(json.dumps(value), []).append(index)
        each = (f"{text} on {_described(indices)}" for text, indices in indices_by_text.items())
        differences.append(f"{key} ({', '.join(each)})")
    return ", ".join(differences)


def _described(indices: list[int]) -> str:
    shown = [str(index) for index in indices[:4]] + (["others"] if len(indices) > 4 else [])
    if len(shown) == 1:
        return f"process {shown[0]}"
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


# --------------------------------------------------------------------------- leaving


class _Companion(threading.Thread):
    """Watches the other processes, and ends this one when one of them has left.

    The main thread may be waiting for that process in a collective, which nothing can interrupt.
    Outside training, this thread answers SIGTERM as well.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the watch because this process is about to end."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Watches until `stop`."""
        while not self._stopped.wait(_INTERVAL):
            try:
                left = _left()
            except jax.errors.JaxRuntimeError:
                continue  # the coordinator is gone, so JAX itself ends this process
            if process() in left:
                continue  # `_fail` or `_leave` is ending this process
            if left:
                status, text = left.get(0, next(iter(left.values())))
                # After an error, the main thread probably raises the same one.
                if status and self._stopped.wait(_GRACE):
                    return
                _leave(status, text if not status else "")
            if preemption.tick():
                _leave(0, Preempted().message)


def _left() -> dict[int, list[Any]]:
    """Returns the status and the message of every process that has left, by its number."""
    entries = _client().key_value_dir_get(f"{_PREFIX}/left/")
    return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in entries}


def _leave(status: int, text: str) -> NoReturn:
    """Ends this process and tells the rest; process 0, which has the store, waits for them."""
    _client().key_value_set(
        f"{_PREFIX}/left/{process()}", json.dumps([status, text]), allow_overwrite=True
    )
    if is_main():
        if not status and text:
            _say(text)
        end = time.monotonic() + 2 * _GRACE
        while len(_left()) < processes() and time.monotonic() < end:
            time.sleep(_INTERVAL / 5)
        # The last process still has to read that all have left.
        time.sleep(_INTERVAL)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fail(text: str, status: int, details: str = "") -> NoReturn:
    """Ends all processes with an error of this one, which the others may have as well."""
    message = details.rstrip() or f"error: {text}"
    if is_main():
        _say(message, sys.stderr)
        _leave(status, text)
    _client().key_value_set(f"{_PREFIX}/left/{process()}", json.dumps([status, text]))
    end = time.monotonic() + 2 * _GRACE
    main = None  # status and message of process 0
    while main is None and time.monotonic() < end:
        time.sleep(_INTERVAL / 5)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            main = _left().get(0)
    if main is None or main[1] != text:
        where = "" if details else f" (on process {process()})"
        _say(message + where, sys.stderr)
    sys.stderr.flush()
    os._exit(status)


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)

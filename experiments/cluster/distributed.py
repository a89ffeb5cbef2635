"""Several processes as one run: agreeing, waiting for each other, leaving together.

All of it goes through the key-value store of JAX's coordinator, which needs no device and cannot
hang in a collective. With one process every function here does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed as _runtime  # JAX has no public name for its key-value store

from experiments.cluster.preemption import Preempted, preemption
from experiments.cluster.process_group import ProcessGroup, join
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ExperimentError, one_line

# Of all keys in the store.
_PREFIX = "boundjax"
# Seconds between two looks at the others.
_INTERVAL = 0.5
# Seconds that a process has to say itself what another one failed with.
_GRACE = 3.0
_FOLDER_TIMEOUT = 20.0


def process() -> int:
    """The number of this process, 0 if it is alone."""
    return _runtime.global_state.process_id


def processes() -> int:
    """How many processes run together."""
    return _runtime.global_state.num_processes


def is_main() -> bool:
    """Whether this process prints and writes what one process has to."""
    return process() == 0


@contextlib.contextmanager
def joined(group: ProcessGroup) -> Iterator[None]:
    """Runs a command as one of the processes of `group`, before JAX is used.

    Only process 0 prints. An error on one process ends all of them, and is printed once: by process
    0 if it has the same one, else by the process that raised it. SIGTERM ends all of them with
    status 0, in training after the same step with a checkpoint.

    Raises:
      ExperimentError: if the others cannot be joined, and whatever the body raises if this process
        is alone; of several, the failing ones end here with status 2.
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
    """What process 0 decides from the values of all processes, which must all call this.

    Args:
      value: of this process; JSON.
      decide: (values in the order of the processes) -> JSON. Called by process 0 only.
    """
    if processes() == 1:
        return decide([value])
    name = f"{_PREFIX}/decision/{next(_NUMBERS)}"
    client = _client()
    if is_main():
        own = json.loads(json.dumps(value))  # as it reaches the others: lists for tuples
        values = [own, *(json.loads(_get(f"{name}/{i}")) for i in range(1, processes()))]
        decision = json.dumps(decide(values))
        client.key_value_set(f"{name}/0", decision)
        return json.loads(decision)
    client.key_value_set(f"{name}/{process()}", json.dumps(value))
    return json.loads(_get(f"{name}/0"))


def from_main(value: Callable[[], Any]) -> Any:
    """What `value()`, JSON, is on process 0, which alone calls it; all must call this."""
    if processes() == 1:
        return value()
    return decided(None, lambda values: value())


def agree(values: Mapping[str, Any]) -> None:
    """Refuses processes that differ in nested `values`, which are JSON.

    Raises:
      ExperimentError: on every process, naming the keys and the processes.
    """
    difference = decided(values, _difference)
    if difference is not None:
        raise ExperimentError(
            f"the processes differ in {difference}; start all of them with the same command, "
            "packages and data"
        )


def require_shared(folder: Path) -> None:
    """Refuses a folder that is not one and the same to all processes; creates it.

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
            failure = f"--workdir={folder}: cannot write there ({error.strerror})"
    name, failure = from_main(lambda: [token.name, failure])
    if failure is not None:
        raise ExperimentError(failure)
    end = time.monotonic() + _FOLDER_TIMEOUT
    found = (folder / name).exists()
    while not found and time.monotonic() < end:
        time.sleep(_INTERVAL)
        # A listing makes network file systems forget what they remember as absent.
        found = folder.is_dir() and name in os.listdir(folder)
    missing = decided(found, lambda seen: [i for i, one in enumerate(seen) if not one])
    if is_main():
        token.unlink()
        if missing and not any(folder.iterdir()):
            folder.rmdir()
    if missing:
        raise ExperimentError(
            f"--workdir={folder} is not shared: what process 0 wrote there, {_named(missing)} "
            f"did not see within {_FOLDER_TIMEOUT:g} s; use a folder that all machines mount"
        )


def _quiet() -> None:
    """Standard output is for what process 0 prints from Python: Gloo tells of every connection."""
    sys.stdout.flush()
    printed = os.dup(1) if is_main() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(printed, "w", buffering=1, encoding="utf-8", errors="replace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


# --------------------------------------------------------------------------- the store


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


# Every decision has a key of its own; all processes come to them in the same order.
_NUMBERS = _numbers()


def _client() -> Any:
    return _runtime.global_state.client


def _get(key: str) -> str:
    """Waits for a key, as long as it takes: `_Companion` ends a wait for those who left."""
    while True:
        try:
            return _client().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _difference(values: list[Mapping[str, Any]]) -> str | None:
    """`optim.lr (0.1 on process 1, 0.2 on process 0 and 2)`, or None."""
    keys = sorted({key for other in values[1:] for key in differing_keys(values[0], other)})
    if not keys:
        return None
    described = []
    for key in keys:
        found: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            found.setdefault(json.dumps(value), []).append(index)
        each = (f"{text} on {_named(indices)}" for text, indices in found.items())
        described.append(f"{key} ({', '.join(each)})")
    return ", ".join(described)


def _named(indices: list[int]) -> str:
    shown = [str(index) for index in indices[:4]] + (["others"] if len(indices) > 4 else [])
    if len(shown) == 1:
        return f"process {shown[0]}"
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


# --------------------------------------------------------------------------- leaving


class _Companion(threading.Thread):
    """Looks at the others: ends this process when one of them has left.

    The main thread may wait for that one in a collective, from which nothing brings it back. While
    it is not training, SIGTERM is answered here as well.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Nothing is looked at any more: this process is at its end as well."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopped.wait(_INTERVAL):
            try:
                left = _left()
            except jax.errors.JaxRuntimeError:
                continue  # the coordinator is gone: JAX itself ends this process
            if process() in left:
                continue  # `_fail` and `_leave` know what to do
            if left:
                status, text = left.get(0, next(iter(left.values())))
                # With an error the main thread probably has the same one.
                if status and self._stopped.wait(_GRACE):
                    return
                _leave(status, text if not status else "")
            if preemption.tick():
                _leave(0, Preempted().message)


def _left() -> dict[int, list[Any]]:
    """Who has left: process -> status and what it had to say."""
    found = _client().key_value_dir_get(f"{_PREFIX}/left/")
    return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found}


def _leave(status: int, text: str) -> NoReturn:
    """Ends this process and tells the others; process 0, where the store is, waits for them."""
    _client().key_value_set(
        f"{_PREFIX}/left/{process()}", json.dumps([status, text]), allow_overwrite=True
    )
    if is_main():
        if not status and text:
            _say(text)
        end = time.monotonic() + 2 * _GRACE
        while len(_left()) < processes() and time.monotonic() < end:
            time.sleep(_INTERVAL / 5)
        # The last to come has still to read that it may go.
        time.sleep(_INTERVAL)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fail(text: str, status: int, details: str = "") -> NoReturn:
    """Ends all processes with an error that this one has, and perhaps all have."""
    message = details.rstrip() or f"error: {text}"
    if is_main():
        _say(message, sys.stderr)
        _leave(status, text)
    _client().key_value_set(f"{_PREFIX}/left/{process()}", json.dumps([status, text]))
    end = time.monotonic() + 2 * _GRACE
    said = None
    while said is None and time.monotonic() < end:
        time.sleep(_INTERVAL / 5)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            said = _left().get(0)
    if said is None or said[1] != text:
        where = "" if details else f" (on process {process()})"
        _say(message + where, sys.stderr)
    sys.stderr.flush()
    os._exit(status)


def _say(text: str, stream: Any = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)

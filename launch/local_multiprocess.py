"""Starts a command as several processes on this machine, each with its own CPU devices.

    python launch/local_multiprocess.py --processes 2 --devices 4 -- \
        python -m experiments.main --config=experiments/configs/digits_crown.py

The processes find each other through the variables BOUNDJAX_COORDINATOR, BOUNDJAX_PROCESSES and
BOUNDJAX_PROCESS, as on machines without a scheduler. Every line of output starts with the number of
its process. SIGINT and SIGTERM go to all processes. When one process fails, the others have
`--grace` seconds to end by themselves and the same time again after SIGTERM; then they are killed.

The exit status is 0, or that of the first process that failed (128 + s if signal s ended it).
`python` as the first word of the command is the interpreter that runs this file.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.children import Children, exit_status, kill_group


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    port = options.port or free_port()
    settings = [
        process_settings(index, options.processes, options.devices, port)
        for index in range(options.processes)
    ]
    if options.dry_run:
        for each in settings:
            words = [f"{name}={shlex.quote(value)}" for name, value in each.items()]
            print(*words, shlex.join(options.command))
        return 0
    command = [sys.executable if options.command[0] == "python" else options.command[0]]
    command += options.command[1:]
    try:
        return _run(command, settings, options.grace)
    except OSError as error:
        print(f"error: cannot start {command[0]!r} ({error.strerror})", file=sys.stderr)
        return 127


def process_settings(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """Returns the environment variables that give process `index` its number and devices."""
    return {
        "BOUNDJAX_COORDINATOR": f"127.0.0.1:{port}",
        "BOUNDJAX_PROCESSES": str(processes),
        "BOUNDJAX_PROCESS": str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(command: list[str], settings: list[dict[str, str]], grace: float) -> int:
    children = Children()
    readers: list[threading.Thread] = []
    ended: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
    # Show lines when they are printed, not when a buffer is full.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with children.forwarding():
        for index, each in enumerate(settings):
            process = children.start(command, environment | each, pipes=True)
            readers += [
                _background(_copy_lines, process.stdout, sys.stdout, f"[{index}] "),
                _background(_copy_lines, process.stderr, sys.stderr, f"[{index}] "),
            ]
            _background(_announce_end, process, ended)
        status = _wait_for_all(children, ended, grace)
        for reader in readers:
            reader.join()
    return status


def _wait_for_all(
    children: Children, ended: queue.Queue[subprocess.Popen[bytes]], grace: float
) -> int:
    """Waits for all; `grace` seconds after a failure sends SIGTERM, and again later SIGKILL."""
    status, deadline = 0, None
    signals = iter((signal.SIGTERM, signal.SIGKILL))
    running = len(children.processes)
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            process = ended.get(timeout=timeout)
        except queue.Empty:
            number = next(signals)
            children.send(number)
            deadline = None if number == signal.SIGKILL else time.monotonic() + grace
            continue
        running -= 1
        # Processes that it started would keep its output open.
        kill_group(process)
        if process.returncode and not status:
            status = exit_status(process.returncode)
            deadline = time.monotonic() + grace
    return status


def _background(function: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _announce_end(
    process: subprocess.Popen[bytes], ended: queue.Queue[subprocess.Popen[bytes]]
) -> None:
    process.wait()
    ended.put(process)


def _copy_lines(source: IO[bytes], target: IO[str], prefix: str) -> None:
    with source:
        for line in source:
            # One call writes the whole line, so that lines of other processes cannot mix with it.
            target.write(f"{prefix}{line.decode(errors='replace').rstrip()}\n")
            target.flush()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        usage="python launch/local_multiprocess.py [flags] -- COMMAND ...",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=_positive, default=2, help="number of processes (2)")
    parser.add_argument(
        "--devices", type=_positive, default=1, help="CPU devices of each process (1)"
    )
    parser.add_argument(
        "--grace", type=float, default=15.0, help="seconds to end after another one failed (15)"
    )
    parser.add_argument("--port", type=_positive, help="port of the coordinator (a free one)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("a command is missing: ... -- python -m experiments.main --config=FILE.py")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())

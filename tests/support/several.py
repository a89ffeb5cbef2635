"""Starts a command as several processes of one run, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
_TIMEOUT = 150.0


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    output: str
    errors: str


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start(
    arguments: Sequence[Sequence[str]],
    *,
    devices: int = 1,
    folders: Sequence[Path] | None = None,
    meanwhile: Callable[[list[subprocess.Popen]], None] = lambda processes: None,
    **environment: str,
) -> list[Ended]:
    """Runs `python ARGUMENTS` once for every entry of `arguments`, until all have ended.

    Args:
      arguments: of the processes, in their order.
      devices: of every process, on CPU.
      folders: where they run; by default in the project.
      meanwhile: called once all are started.
      **environment: of all of them; by default they find each other.
    """
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index, own in enumerate(arguments):
        result = {
            "BOUNDJAX_COORDINATOR": address,
            "BOUNDJAX_PROCESSES": str(len(arguments)),
            "BOUNDJAX_PROCESS": str(index),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(PROJECT),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *own],
                cwd=folders[index] if folders else PROJECT,
                env=os.environ | result | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    end = time.monotonic() + _TIMEOUT
    try:
        meanwhile(processes)
        texts = [process.communicate(timeout=end - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        Ended(process.returncode, *text) for process, text in zip(processes, texts, strict=True)
    ]

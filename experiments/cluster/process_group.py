"""Joins the processes of a run, named by flags, by the environment or by a cluster JAX knows.

Only `join` imports JAX, so that mistakes are reported without waiting for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from absl import flags

from experiments.settings.errors import ExperimentError, one_line

MODES = ("auto", "off")
# Exit status when other processes do not come: the same command may find them later (EX_TEMPFAIL).
NOT_JOINED = 75
# Seconds to wait for other processes, so that a user is told within 60.
_TIMEOUT = 50.0
# Environment variables, read where a flag is left out.
_TIMEOUT_VARIABLE = "BOUNDJAX_JOIN_TIMEOUT"
_COORDINATOR_VARIABLE = "BOUNDJAX_COORDINATOR"
_PROCESSES_VARIABLE = "BOUNDJAX_PROCESSES"
_PROCESS_VARIABLE = "BOUNDJAX_PROCESS"


_Number = TypeVar("_Number", int, float)


class _Flag(NamedTuple):
    """A flag of every command that several processes run together."""

    help: str
    kind: type = str
    choices: tuple[str, ...] = ()  # the first is the default
    metavar: str | None = None


_FLAGS = {
    "distributed": _Flag(
        "auto: join the processes that --coordinator or a cluster names; off: run alone.",
        choices=MODES,
    ),
    "coordinator": _Flag(
        f"HOST:PORT of process 0 (${_COORDINATOR_VARIABLE}).", metavar="HOST:PORT"
    ),
    "processes": _Flag(
        f"How many processes run together (${_PROCESSES_VARIABLE}).", kind=int, metavar="N"
    ),
    "process": _Flag(
        f"The number of this process, from 0 (${_PROCESS_VARIABLE}).", kind=int, metavar="I"
    ),
}


class ProcessGroup(NamedTuple):
    """The processes that run together.

    Attributes:
      coordinator: `HOST:PORT` of process 0; None if JAX asks `cluster`.
      processes: number of processes; None if JAX asks `cluster`.
      process: number of this process; None if JAX asks `cluster`.
      cluster: name of the cluster that started this process; None without one, or if `coordinator`
        says everything.
      timeout: seconds to wait for a coordinator or a process.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None
    timeout: float = _TIMEOUT

    @property
    def alone(self) -> bool:
        """Whether there is nothing to join."""
        return self.coordinator is None and self.cluster is None


def define_flags() -> dict[str, flags.FlagHolder]:
    """Defines the flags for absl; `from_flags` takes their values."""

    def define(name: str, flag: _Flag) -> flags.FlagHolder:
        if flag.choices:
            return flags.DEFINE_enum(name, flag.choices[0], flag.choices, flag.help)
        kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
        return kinds[flag.kind](name, None, flag.help)

    return {name: define(name, flag) for name, flag in _FLAGS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines the flags for argparse; `from_flags` takes their values."""
    for name, flag in _FLAGS.items():
        parser.add_argument(
            f"--{name}",
            type=flag.kind,
            choices=flag.choices or None,
            default=flag.choices[0] if flag.choices else None,
            metavar=flag.metavar,
            help=flag.help,
        )


def take_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Removes these flags from the values of a command's flags, and returns them."""
    return {name: values.pop(name) for name in _FLAGS}


def from_flags(
    distributed: str = "auto",
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ProcessGroup:
    """Makes a group from flags, then the environment's variables, then the cluster.

    Raises:
      ExperimentError: for values that do not fit together.
    """
    environment = os.environ if environment is None else environment
    if distributed == "off":
        return ProcessGroup()
    coordinator = coordinator or environment.get(_COORDINATOR_VARIABLE) or None
    cluster = _cluster(environment)
    timeout = _number(environment, _TIMEOUT_VARIABLE, float) or _TIMEOUT
    processes = _value_or_variable(processes, environment, _PROCESSES_VARIABLE)
    process = _value_or_variable(process, environment, _PROCESS_VARIABLE)
    if coordinator is None:
        if processes is not None or process is not None:
            raise ExperimentError(
                "--processes and --process need --coordinator=HOST:PORT, the address of process 0"
            )
        return ProcessGroup(cluster=cluster, timeout=timeout)
    if cluster == "Open MPI":  # its newer versions set everything but the coordinator
        processes = _value_or_variable(processes, environment, "OMPI_COMM_WORLD_SIZE")
        process = _value_or_variable(process, environment, "OMPI_COMM_WORLD_RANK")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ExperimentError(
            f"--coordinator must be HOST:PORT like 10.0.0.1:12345, got {coordinator!r}"
        )
    if processes is None or process is None:
        raise ExperimentError(
            f"--coordinator={coordinator} needs --processes=N and --process=I, the number of this "
            "process from 0"
        )
    if not 0 <= process < processes:
        raise ExperimentError(
            f"--process must be in 0 ... --processes - 1 = {processes - 1}, got {process}"
        )
    return ProcessGroup(coordinator, processes, process, timeout=timeout)


def _cluster(environment: Mapping[str, str]) -> str | None:
    """Names the cluster that started this process as one of several, of those that JAX detects."""
    slurm_tasks = _number(environment, "SLURM_NTASKS", int) or 1
    mpi_processes = _number(environment, "OMPI_COMM_WORLD_SIZE", int) or 1
    # A batch script, outside `srun`, sees the number of tasks but is not one of them.
    if slurm_tasks > 1 and {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environment):
        return "SLURM"
    if mpi_processes > 1:
        return "Open MPI"
    # Every pod has the first variable, but only the pods of an indexed job have a number.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment):
        return "Kubernetes"
    # Only JAX can tell whether this is a TPU machine.
    return "TPU" if importlib.util.find_spec("libtpu") else None


def _value_or_variable(value: int | None, environment: Mapping[str, str], name: str) -> int | None:
    return _number(environment, name, int) if value is None else value


def _number(
    environment: Mapping[str, str], name: str, kind: Callable[[str], _Number]
) -> _Number | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise ExperimentError(f"${name} must be a number, got {text!r}") from error


# --------------------------------------------------------------------------- joining


def join(group: ProcessGroup) -> None:
    """Joins the processes of `group`; does nothing if there are none to join.

    If a process does not come in time, this one ends with status `NOT_JOINED`.

    Raises:
      ExperimentError: if the processes cannot be joined.
    """
    import jax

    if group.alone or jax.distributed.is_initialized():
        return
    arguments: dict[str, Any] = {}
    if group.coordinator is not None:
        arguments = {
            "coordinator_address": group.coordinator,
            "num_processes": group.processes,
            "process_id": group.process,
            "cluster_detection_method": "deactivate",
        }
        if group.process == 0:
            _require_free(int(group.coordinator.rpartition(":")[2]))
    # This time-out comes before that of JAX, which aborts the process with a C++ stack trace.
    watchdog = threading.Timer(group.timeout, _give_up, [group])
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=int(group.timeout) + 300)
    except Exception as error:  # wrongly detected clusters and bad ports raise many types
        if group.cluster == "TPU" and "coordinator_address" in str(error):
            return  # libtpu is installed, but this is not a TPU machine
        reason = one_line(error)
        if group.coordinator is None:
            raise ExperimentError(
                f"JAX cannot join the processes that {group.cluster} started ({reason}); give "
                "--coordinator=HOST:PORT --processes=N --process=I, or --distributed=off to run "
                "this process alone"
            ) from error
        raise ExperimentError(
            f"cannot join the processes at {group.coordinator} ({reason}); check --coordinator, "
            "--processes and --process of every process"
        ) from error
    finally:
        watchdog.cancel()


def _require_free(port: int) -> None:
    """Checks that no program listens on the port, where JAX's coordinator would crash."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise ExperimentError(
                f"--coordinator: port {port} of this machine cannot be used ({error.strerror}); "
                "choose another one in the command of every process"
            ) from error


def _give_up(group: ProcessGroup) -> NoReturn:
    """Ends a process that waits for others, from a thread because the main thread is blocked."""
    coordinator = f"the coordinator {group.coordinator or f'that JAX found for {group.cluster}'}"
    wait = f"within {group.timeout:g} s"
    if group.process != 0 and not _answers(group.coordinator):
        problem = (
            f"{coordinator} did not answer {wait}; check that process 0 is running and that its "
            "port is open to this machine"
        )
    else:
        count = "" if group.processes is None else f"{group.processes} "
        problem = f"not all {count}processes joined {coordinator} {wait}; start the missing ones"
    print(f"error: {problem}", file=sys.stderr, flush=True)
    os._exit(NOT_JOINED)


def _answers(coordinator: str | None) -> bool:
    if coordinator is None:
        return False
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True

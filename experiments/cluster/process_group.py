"""How a process finds and joins the others: flags, environment, the clusters that JAX knows.

Only `join` needs JAX: mistakes are reported without waiting for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from absl import flags

from experiments.settings.errors import ExperimentError, one_line

MODES = ("auto", "off")
# The exit status when the others do not come: the same command may find them later (EX_TEMPFAIL).
NOT_JOINED = 75
# Seconds; below the 60 s in which a user is told.
_TIMEOUT, _TIMEOUT_VARIABLE = 50.0, "BOUNDJAX_JOIN_TIMEOUT"


class _Flag(NamedTuple):
    """A flag of every command that several processes run together."""

    help: str
    kind: type = str
    choices: tuple[str, ...] = ()  # the first is the default
    metavar: str | None = None
    variable: str | None = None  # of the environment, read where the flag is left out


_FLAGS = {
    "distributed": _Flag(
        "auto: join the other processes where --coordinator or a cluster says so; off.",
        choices=MODES,
    ),
    "coordinator": _Flag(
        "HOST:PORT at which process 0 is reached ($BOUNDJAX_COORDINATOR).",
        metavar="HOST:PORT",
        variable="BOUNDJAX_COORDINATOR",
    ),
    "processes": _Flag(
        "How many processes run together ($BOUNDJAX_PROCESSES).",
        kind=int,
        metavar="N",
        variable="BOUNDJAX_PROCESSES",
    ),
    "process": _Flag(
        "The number of this one, from 0 ($BOUNDJAX_PROCESS).",
        kind=int,
        metavar="I",
        variable="BOUNDJAX_PROCESS",
    ),
}


class ProcessGroup(NamedTuple):
    """Which processes run together.

    Attributes:
      coordinator: `HOST:PORT` of process 0; None: what JAX finds out in `cluster`.
      processes, process: how many there are, and which one this is; None: as JAX finds out.
      cluster: the name of the cluster that started this process; None: none, or it does not matter.
      timeout: seconds after which a coordinator or a process that does not come is given up.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None
    timeout: float = _TIMEOUT

    @property
    def alone(self) -> bool:
        """Nothing is to be joined."""
        return self.coordinator is None and self.cluster is None


def define_flags() -> dict[str, flags.FlagHolder]:
    """Defines the flags for absl; their values go to `from_flags`."""

    def define(name: str, flag: _Flag) -> flags.FlagHolder:
        if flag.choices:
            return flags.DEFINE_enum(name, flag.choices[0], flag.choices, flag.help)
        kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
        return kinds[flag.kind](name, None, flag.help)

    return {name: define(name, flag) for name, flag in _FLAGS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines the flags for argparse; their values go to `from_flags`."""
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
    """Removes these flags from a command's values: what is left are the command's own."""
    return {name: values.pop(name) for name in _FLAGS}


def from_flags(
    distributed: str = "auto",
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ProcessGroup:
    """What the flags say; what they leave out the environment says, in the end its cluster.

    Raises:
      ExperimentError: for values that do not go together.
    """
    environment = os.environ if environment is None else environment
    if distributed == "off":
        return ProcessGroup()
    coordinator = coordinator or environment.get(_FLAGS["coordinator"].variable) or None
    cluster = _cluster(environment)
    timeout = _number(environment, _TIMEOUT_VARIABLE, float) or _TIMEOUT
    processes = _first(processes, environment, _FLAGS["processes"].variable)
    process = _first(process, environment, _FLAGS["process"].variable)
    if coordinator is None:
        if processes is not None or process is not None:
            raise ExperimentError(
                "--processes and --process need --coordinator=HOST:PORT, where process 0 is reached"
            )
        return ProcessGroup(cluster=cluster, timeout=timeout)
    if cluster == "Open MPI":  # its newer versions tell everything but the coordinator
        processes = _first(processes, environment, "OMPI_COMM_WORLD_SIZE")
        process = _first(process, environment, "OMPI_COMM_WORLD_RANK")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ExperimentError(
            f"--coordinator must be HOST:PORT like 10.0.0.1:12345, got {coordinator!r}"
        )
    if processes is None or process is None:
        raise ExperimentError(
            f"--coordinator={coordinator} needs --processes=N and --process=I, the number of this "
            "one from 0"
        )
    if not 0 <= process < processes:
        raise ExperimentError(
            f"--process must be in 0 ... --processes - 1 = {processes - 1}, got {process}"
        )
    return ProcessGroup(coordinator, processes, process, timeout=timeout)


def _cluster(environment: Mapping[str, str]) -> str | None:
    """The cluster that started this process as one of several, among those that JAX detects."""
    several = {
        "SLURM": _number(environment, "SLURM_NTASKS", int),
        "Open MPI": _number(environment, "OMPI_COMM_WORLD_SIZE", int),
    }
    # Outside of `srun`, as in a batch script, SLURM knows of tasks but this is none of them.
    if (several["SLURM"] or 1) > 1 and {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environment):
        return "SLURM"
    if (several["Open MPI"] or 1) > 1:
        return "Open MPI"
    # Any pod knows that it is one; only those of an indexed job know which.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment):
        return "Kubernetes"
    # Only JAX can tell whether this is a TPU machine.
    return "TPU" if importlib.util.find_spec("libtpu") else None


def _first(value: int | None, environment: Mapping[str, str], name: str) -> int | None:
    return _number(environment, name, int) if value is None else value


def _number(environment: Mapping[str, str], name: str, kind: type) -> Any:
    text = environment.get(name)
    if not text:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise ExperimentError(f"${name} must be a number, got {text!r}") from error


# --------------------------------------------------------------------------- joining


def join(group: ProcessGroup) -> None:
    """Joins the processes that `group` names, or does nothing if it is alone.

    Raises:
      ExperimentError: if they cannot be joined. Where one does not come within the time, this
        process ends with status `NOT_JOINED`.
    """
    import jax

    if group.alone or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if group.coordinator is not None:
        given = {
            "coordinator_address": group.coordinator,
            "num_processes": group.processes,
            "process_id": group.process,
            "cluster_detection_method": "deactivate",
        }
        if group.process == 0:
            _require_free(int(group.coordinator.rpartition(":")[2]))
    # JAX's own time-out aborts the process with a stack trace of C++: ours comes before.
    watchdog = threading.Timer(group.timeout, _give_up, [group])
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=int(group.timeout) + 300)
    except Exception as error:  # many types: of clusters that are not what they seem, of ports
        if group.cluster == "TPU" and "coordinator_address" in str(error):
            return  # libtpu is installed, but this is no TPU machine
        reason = one_line(error)
        if group.coordinator is None:
            raise ExperimentError(
                f"JAX cannot join the processes that {group.cluster} started ({reason}); give "
                "--coordinator=HOST:PORT --processes=N --process=I, or --distributed=off to run "
                "this process alone"
            ) from error
        raise ExperimentError(
            f"cannot join the processes at {group.coordinator} ({reason})"
        ) from error
    finally:
        watchdog.cancel()


def _require_free(port: int) -> None:
    """JAX's coordinator crashes on a port that another program listens to."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise ExperimentError(
                f"--coordinator: port {port} of this machine cannot be used ({error.strerror}); "
                "take another one, in the command of every process"
            ) from error


def _give_up(group: ProcessGroup) -> NoReturn:
    """Ends a process that waits for others: from a thread, the main one does not come back."""
    where = group.coordinator or f"that JAX found for {group.cluster}"
    wait = f"within {group.timeout:g} s"
    if group.process != 0 and not _answers(group.coordinator):
        problem = (
            f"the coordinator {where} did not answer {wait}; is process 0 running, and is its port "
            "open to this machine?"
        )
    else:
        problem = (
            f"not all {group.processes or ''} processes joined at {where} {wait}; start the "
            "missing ones"
        ).replace("  ", " ")
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

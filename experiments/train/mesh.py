"""The mesh of a run: how its devices share the work.

Axis `data` divides the batch. Axis `fsdp` divides the batch, the parameters and the state of the
optimizer (fully sharded data parallelism). Axis `spec` divides the rows of the specification (the
classes) of linear bounds.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from boundjax.typing import Device
from experiments.cluster import distributed
from experiments.settings.config import MeshConfig
from experiments.settings.errors import ExperimentError

AXES = ("data", "fsdp", "spec")
# The axes that divide a batch.
BATCH = ("data", "fsdp")
# Leaves with fewer entries stay whole on every device, because sending them takes longer.
_SMALL = 1024


def create_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Creates the mesh over the devices of all processes.

    A single process may leave devices unused. Several must use all, because a process without a
    device could do nothing.

    Args:
      config: the size of every axis; one may be -1, the remaining devices.
      devices: the devices to use; None: all.

    Raises:
      ExperimentError: if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    layout = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if fixed > count or count % fixed:
        raise ExperimentError(
            f"config.mesh {layout} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, "
            f"and {fixed} must divide the {count} available; change the sizes"
        )
    sizes = [count // fixed if size == -1 else size for size in sizes]
    used = math.prod(sizes)
    if used < count and len({device.process_index for device in devices}) > 1:
        raise ExperimentError(
            f"config.mesh {layout} has {used} devices, but the processes have {count}; set one "
            "axis to -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:used])


def device_name(devices: Sequence[Any]) -> str:
    """Describes the number and kind of `devices`, and the number of processes if several."""
    name = f"{len(devices)} x {devices[0].device_kind}"
    if name.endswith("cpu"):
        name += f" ({platform.machine()}, {os.cpu_count()} cores)"
    count = distributed.processes()
    return name if count == 1 else f"{name} in {count} processes"


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, together: bool = False) -> NamedSharding:
    """Returns the sharding of a batch; with `together`, its first axis is that of the seeds."""
    return NamedSharding(mesh, PartitionSpec(*((None,) if together else ()), BATCH))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises an ExperimentError if a batch cannot be divided equally between the devices."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size % parts:
        raise ExperimentError(
            f"config.train.batch_size must be a multiple of the {parts} devices, got {batch_size} "
            f"(config.mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} divides a batch)"
        )


def state_shardings(state: Any, mesh: Mesh, together: bool = False) -> Any:
    """Returns the shardings of a train state: `fsdp` divides parameters and optimizer state.

    Each leaf is divided along its largest axis that `fsdp` divides. A leaf of the optimizer has the
    shape of its parameter and the same sharding. Everything else is whole.

    Args:
      state: collections of arrays, or of their shapes, by name.
      mesh: the mesh of `create_mesh`.
      together: whether every leaf has a leading axis with one entry per seed.
    """
    size = mesh.shape["fsdp"]

    def divided(leaf: Any) -> NamedSharding:
        shape = leaf.shape[1:] if together else leaf.shape
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or math.prod(shape) < _SMALL or not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: shape[axis]) + together
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))

    return {
        name: jax.tree.map(
            divided if name in ("params", "opt_state") else lambda leaf: replicated(mesh), value
        )
        for name, value in state.items()
    }


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Makes a global array of one that every process has; processes send each other nothing."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_host(tree: Any) -> Any:
    """Returns whole NumPy arrays on every process; all processes must call this."""

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(fetch, tree))
